"""Files that are complete or absent, and what a program records of itself: its commit and versions. No torch here."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from errors import UserError

Contents = Mapping[str, tuple[str, str]]
"""Option that names a model -> (the path that it was given, `models.weights.fingerprint` of what lies there)."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, a used-up quota, a limit on file sizes
PACKAGES = ("accelerate", "deepspeed", "diffusers", "peft", "torch", "transformers", "trl")


def atomic_write(path: Path, content: bytes) -> None:
    """Write a temporary file of this process, then rename it: a reader sees the old file or the new, never half."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, or nothing: half a row would spoil the next one."""
    content = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if file.write(content) < len(content):  # the disk filled up in the middle
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def complete_lines(path: Path, cut: bool) -> list[bytes]:
    """The lines of a file, without a last one that has no line end because its writer was killed.

    Args:
        cut: remove that last one from the file too; for the process that appends to it.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if cut and end < len(content):
        os.truncate(path, end)
    return content[:end].splitlines()


def png_bytes(image: Image.Image, **options: Any) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG file, complete or not at all."""
    atomic_write(path, png_bytes(image))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two settings, as 'seed 1 -> 2; ...', 600 characters at most; "" if nothing does.

    Where both have "contents" (`Contents`) of a model, its fingerprints are compared and its paths are not.
    """
    before, now = old.get("contents", {}), new.get("contents", {})
    others = sorted({*old, *new} - {"contents", *(before.keys() & now.keys())})
    said = [f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in others if old.get(name) != new.get(name)]
    for name in sorted({*before, *now}):
        (was_at, was), (is_at, now_is) = (side.get(name, ("none", "not known")) for side in (before, now))
        said += [f"contents of {name}: {was} ({was_at}) -> {now_is} ({is_at})"] if was != now_is else []
    return "; ".join(said)[:600]


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError if the settings file at `path` holds other settings than these."""
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): name another --out") from error
    if changed := differences(stored, json.loads(json.dumps(settings))):
        raise UserError(f"--out {path.parent} was made with other settings ({changed}): name another folder")


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what `check_settings` compares with later."""
    atomic_write(path, json.dumps(settings, indent=1, sort_keys=True).encode())


def git_commit(repository: Path) -> str | None:
    """The commit checked out at `repository`, "+changes" if tracked files differ from it; None without git."""
    git = ["git", "-C", str(repository)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def installed_versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes: name -> version."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def size_text(count: int) -> str:
    """Bytes as "1.6 GB" or "12.0 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
