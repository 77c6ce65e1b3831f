"""Other people's weights: which are locked, whether a file is the one that is meant, and the one way tensors are read.

`checkpoints.lock` names, for each repository that this code knows, its commit, its licence and its files' sizes and
SHA-256. What lies in the hub's cache at that commit is compared with it before it is loaded (`verify`). A pickle is
only ever read with `weights_only=True`: nothing in it can run. Files that a user names by a path of their own have no
known hash, but a `<file>.sha256` beside one, a line of `sha256sum`, is taken at its word.

A model is known by its contents (`fingerprint`), not by its path. Hashing is slow (34 GB take a minute or more,
derived), so a file's hash is remembered with its path, size and time in `$XDG_CACHE_HOME/r1-prompter/verified.json`;
one process hashes while others wait.

Left out: signatures, and distrust of whoever can write to this user's caches.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from errors import UserError, listed, one_line
from run.files import atomic_write

LOCK = Path(__file__).resolve().parent.parent / "checkpoints.lock"
PICKLES = (".pt", ".pth", ".bin")
# What decides beside the weights what a model computes; no README, no run.json, so a run folder stays one policy.
DECISIVE = ("*config*.json", "*token*.json", "*index.json", "vocab.*", "merges.txt", "*template*", "*.model", "*.py")
PICKLED_WEIGHTS = ("pytorch_model", "diffusion_pytorch_model", "adapter_model")  # not optimizer.bin, training_args.bin


@dataclass(frozen=True)
class Checkpoint:
    """A repository on the hub, and what the lock says of it; an unlocked one has its name alone.

    Attributes:
        repo: "owner/name".
        licence: its name; "" if not known.
        size: of what is fetched, as text ("1.6 GB"); "" if not known.
        include: patterns of the files that are read; none means all.
        exclude: patterns of files that would be read but for them: second copies in another layout or precision.
        revision: the commit that is loaded, None for whatever the hub has.
        files: name -> {"size": bytes or None, "sha256": hex digits or None}.
    """

    repo: str
    licence: str = ""
    size: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    revision: str | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What fetches it, and no more than is read."""
        words = ["hf", "download", self.repo]
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            words += [word for pattern in patterns for word in (flag, f"'{pattern}'")]
        return " ".join([*words, *(["--revision", self.revision] if self.revision else [])])


@cache
def lock() -> dict[str, Checkpoint]:
    """The lock: repository -> what is known of it."""
    entries = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    return {
        repo: Checkpoint(
            repo, **{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        )
        for repo, row in entries.items()
    }


def locked(repo: str) -> Checkpoint:
    """What the lock says of `repo`; nothing but its name if it is not in it."""
    return lock().get(repo, Checkpoint(repo))


# Is it the file that is meant? ------------------------------------------------------------------------------------


def verify(path: Path) -> None:
    """Compare a file, or all files of a folder, with what is known of them, and with any `<file>.sha256` beside them.

    Known are the files of a locked repository in the hub's cache, at the locked commit.

    Raises:
        UserError: a file of another size or hash; with both, and what to do.
    """
    cached = re.search(
        r"(.*/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40}))(?:/(.+))?$", path.absolute().as_posix()
    )
    if cached is not None:
        snapshot, owner, name, revision, inside = cached.groups()
        known = locked(f"{owner}/{name}")
        files = known.files if revision == known.revision else {}
        for file, expected in files.items():
            if inside in (None, file) and Path(snapshot, file).is_file():
                check(Path(snapshot, file), expected["size"], expected["sha256"], "checkpoints.lock")
    beside = path.glob("*.sha256") if path.is_dir() else [path.with_name(f"{path.name}.sha256")]
    for sums in beside:
        if sums.is_file() and sums.with_suffix("").is_file():
            line = sums.read_text(encoding="utf-8", errors="replace").lower()
            if not re.match(r"[0-9a-f]{64}\b", line):
                raise UserError(f"{sums} is no line of sha256sum: correct or delete it")
            check(sums.with_suffix(""), None, line[:64], sums.name)


def check(path: Path, size: int | None, sha256: str | None, source: str) -> None:
    """Compare one file with what `source` says of it; what is None is not compared.

    Raises:
        UserError: another size or hash, with both and what to do.
    """
    if size is not None and path.stat().st_size != size:
        found, expected = f"{path.stat().st_size} bytes", size
    elif sha256 is not None and (digest := _digest(path)) != sha256:
        found, expected = f"SHA-256 {digest}", sha256
    else:
        return
    raise UserError(
        f"{path} has {found}, {source} says {expected}: it is damaged or not the file that is meant, and was neither "
        f"loaded nor deleted; delete {path.resolve()} and fetch it again (python scripts/fetch.py)"
    )


def fingerprint(path: Path) -> str:
    """16 hex digits: the same for the same contents of a model's file or folder, wherever it lies, others for others.

    Of a folder the files count that are read: weights (pickles where there are no safetensors), and those of DECISIVE;
    of a pipeline those of its parts.
    """
    if path.is_file():
        return _digest(path)[:16]
    digests = {file.relative_to(path).as_posix(): _digest(file) for file in _decisive(path)}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _decisive(folder: Path) -> set[Path]:
    pipeline = folder / "model_index.json"
    if pipeline.is_file():  # weights beside it are another copy, of another library's layout
        return {pipeline}.union(*map(_decisive, parts_of(folder)))
    weights = set(folder.glob("*.safetensors")) or {path for path in folder.iterdir() if path.suffix in PICKLES}
    return weights.union(*map(folder.glob, DECISIVE))


def parts_of(pipeline: Path) -> list[Path]:
    """The folders of a pipeline's models, by its index; a run folder has others beside them."""
    return [pipeline / name for name in _read_json(pipeline / "model_index.json") if (pipeline / name).is_dir()]


def _digest(path: Path) -> str:
    """The SHA-256 of a file, which is not read again while its size and ctime stay; a copy may bring an old mtime."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1-prompter"
    state = os.stat(path)  # of what a link points at
    now = [state.st_size, state.st_ctime_ns]
    try:
        home.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(home / "verified.lock"):
            verified = _read_json(home / "verified.json")
            *before, digest = verified.get(str(path.resolve()), [""])
            if before == now:
                return digest
            if state.st_size > 1e9:
                print(f"checking the SHA-256 of {path.name}, {state.st_size / 1e9:.1f} GB, once", file=sys.stderr)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            verified[str(path.resolve())] = [*now, digest]
            atomic_write(home / "verified.json", json.dumps(verified, indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot check {path} ({error}): XDG_CACHE_HOME must name a writable folder") from error
    return digest


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


# Reading ----------------------------------------------------------------------------------------------------------


def read_weights(path: Path, under: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, from `.safetensors`, or from a `.pt`, `.pth` or `.bin` of which only they are read.

    Args:
        path: the file; verified before it is opened.
        under: the key of a pickle that holds the tensors; None if it is they.

    Raises:
        UserError: another kind of file, another hash, a damaged file, or one that holds anything else than tensors.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"{path} is neither .safetensors nor {', '.join(PICKLES)}: give weights in one of these")
    verify(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # as torch writes since 1.6; older files cannot be mapped
        held = torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)
    except Exception as error:  # the readers have raised eleven kinds of error on damaged files
        raise UserError(f"{path} is no checkpoint of plain tensors, fetch it again ({one_line(error)})") from error
    if under is not None:
        held = held.get(under) if isinstance(held, dict) else None
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        where = f" under the key {under!r}" if under else ""
        raise UserError(f"{path} does not hold tensors by name{where}, and nothing else: fetch it again")
    return held


def check_folder(folder: Path, pickles: bool = False) -> None:
    """Check the folder of one model before a library loads it: what the lock says, and that its weights are safe.

    Raises:
        UserError: a file that is not as locked, a damaged safetensors file, one that an index names and that is not
            there, or, unless `pickles` are allowed, weights that are there as a pickle alone.
    """
    verify(folder)
    tensors = sorted(folder.glob("*.safetensors"))
    for path in tensors:
        try:
            with safe_open(path, framework="pt"):  # reads the header and compares it with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): fetch or save it again") from error
    if absent := absent_shards(folder):
        raise UserError(f"{folder} has no {listed(absent, ', ')}, which its index names: fetch it again")
    pickled = sorted(path for path in folder.glob("*.bin") if path.name.startswith(PICKLED_WEIGHTS))
    if pickled and not tensors and not pickles:
        raise UserError(
            f"{pickled[0]} is a pickle, which could run code, and no safetensors lie beside it: convert it to "
            "safetensors, or name a folder that has them"
        )


def absent_shards(folder: Path) -> list[str]:
    """The safetensors files that an index in `folder` names and that are not there."""
    indices = [_read_json(path) for path in folder.glob("*.safetensors.index.json")]
    shards = {shard for index in indices for shard in index.get("weight_map", {}).values()}
    return sorted(shard for shard in shards if not (folder / shard).is_file())
