"""Checkpoints that are complete or absent: a manifest is written last, then the folder is renamed into place.

The trainer writes the files under `.saving/`; `write_manifest` lists them with size and SHA-256 and names the
configuration and versions that made them; one rename makes the folder `checkpoint-N`. A folder
without a manifest, or with other files than its manifest lists, is never continued from. No torch here.

Hashes find damage, not malice: optimiser states are pickles, so continue only from checkpoints of people you trust.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from run.files import file_hash

MANIFEST, STAGING = "manifest.json", ".saving"
THREADS = 8  # hashing releases the interpreter; a disk is busy from a few on


@dataclass(frozen=True)
class ResumeKey:
    """What must match for a run to resume from a checkpoint.

    Attributes:
        config_hash: of all options, the training file's bytes and the processes too: `RunFolder.config_hash`.
        versions: package -> version; another one continues, with a warning.
    """

    config_hash: str
    versions: Mapping[str, str] = field(default_factory=dict)


def write_manifest(folder: Path, step: int, resume_key: ResumeKey) -> None:
    """Write the manifest of all files in `folder`, everything flushed to the disk before it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_flushed_hash, paths))
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, **asdict(resume_key), "files": files}, indent=1), encoding="utf-8")
    for path in (manifest, folder):
        _flush(path)


def put_in_place(staged: Path, target: Path) -> None:
    """Rename a folder with a manifest to its final name; a folder that has this name already is deleted."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
    _flush(target.parent)


def found(run: Path) -> list[Path]:
    """All folders `checkpoint-N` of a run, whole or not, the newest first."""
    named = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(filter(Path.is_dir, named), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`: optimiser steps done."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def problem_with(checkpoint: Path, resume_key: ResumeKey, *, contents: bool) -> str | None:
    """Why `resume_key` cannot continue from `checkpoint`, None if it can.

    Args:
        contents: also hash every file, which takes about a second per GB and thread; else names and sizes alone.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
        step, config_hash = manifest["step"], manifest["config_hash"]
    except FileNotFoundError:
        return f"half-written: it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if step != step_of(checkpoint):
        return f"its {MANIFEST} is of step {step}"
    if config_hash != resume_key.config_hash:
        return f"it is of another configuration ({config_hash}, this is {resume_key.config_hash})"
    return _damage(checkpoint, files, contents)


def other_versions(checkpoint: Path, resume_key: ResumeKey) -> list[str]:
    """Packages that were others when `checkpoint`, which has no fault, was made: "torch 2.12.0 -> 2.13.0"."""
    theirs = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["versions"]
    names = sorted(theirs.keys() | resume_key.versions.keys())
    pairs = [(name, theirs.get(name, "none"), resume_key.versions.get(name, "none")) for name in names]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


def size_of(checkpoint: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def prune(run: Path, resume_key: ResumeKey, keep: int) -> list[Path]:
    """Delete the oldest checkpoints until `keep` good ones are left; never the newest good one, and never what it
    cannot tell to be this run's. Returns what was deleted."""
    good = [path for path in found(run) if problem_with(path, resume_key, contents=False) is None]
    surplus = good[max(keep, 1) :]
    for path in surplus:
        (path / MANIFEST).unlink()  # first: a kill in between leaves a half-written checkpoint, not a damaged one
        shutil.rmtree(path)
    return surplus


def _damage(checkpoint: Path, files: Mapping[str, tuple[int, str]], contents: bool) -> str | None:
    for name, (size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    if contents:
        with ThreadPoolExecutor(THREADS) as pool:
            for name, digest in zip(files, pool.map(file_hash, [checkpoint / name for name in files]), strict=True):
                if digest != files[name][1]:
                    return f"{name} is corrupt: SHA-256 {digest[:12]}..., not {files[name][1][:12]}..."
    return None


def _flushed_hash(path: Path) -> str:
    _flush(path)
    return file_hash(path)


def _flush(path: Path) -> None:
    """fsync of a file or folder, so that a power cut cannot leave a rename without what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
