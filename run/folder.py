"""The folder of one run, `run.json`, `metrics.jsonl`, `rollouts/`, `images/`, `checkpoint-N/`, and who may write it.

A folder belongs to one configuration, known by a hash. Another run's folder, or one with foreign files in it, is
refused; the same run continues with `--resume` from its newest good checkpoint, and what was logged after that
checkpoint is cut off, so that no step is logged twice.

A full disk costs pictures first, then rows of the logs, never a checkpoint that is there.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from errors import UserError
from run import checkpoints
from run.checkpoints import ResumeKey

logger = logging.getLogger(__name__)

AUTO = "auto"  # of --resume
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, a used-up quota, a limit on file sizes
PACKAGES = ("accelerate", "deepspeed", "diffusers", "peft", "torch", "transformers", "trl")
FOLLOWING = {"generation_batch_size"}  # options derived from the number of processes


class RunFolder:
    """One run's files. Every process may construct and `check` it; `open` and the writers are for one process.

    Args:
        path: the `--outdir`.
        config: all options, JSON-able, without secrets.
        may_differ: names of those that may be others when the run is continued (`run.options.may_differ`).
        resume: `--resume`: AUTO for the newest good checkpoint, or the beginning where there is none; "checkpoint-N";
            None for a new run.

    Attributes:
        start: the checkpoint that the run continues from, None for none; known after `check`.
        skipped: checkpoint -> why it is not continued from, newest first.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        may_differ: Set[str] = frozenset(),
        resume: str | None = None,
    ):
        self.path, self.config, self.resume = Path(path), dict(config), resume
        self.may_differ = may_differ
        self.started = time.time()
        self.start: Path | None = None
        self.skipped: dict[Path, str] = {}
        self._full = False

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration, without what may differ."""
        identity = {key: value for key, value in self.config.items() if key not in self.may_differ}
        return hashlib.sha256(_json(identity).encode()).hexdigest()[:16]

    @property
    def resume_key(self) -> ResumeKey:
        """What this run writes into the manifests of its checkpoints, and asks of those that it continues from."""
        config = self.config
        return ResumeKey(self.config_hash, config.get("data_hash", ""), config.get("num_processes", 1), _versions())

    @property
    def resume_step(self) -> int:
        """Optimiser steps already done, 0 for a run from the beginning."""
        return checkpoints.step_of(self.start) if self.start else 0

    def check(self, steps: int | None = None) -> None:
        """Raise unless this run, of `steps` optimiser steps in all, may write here. Reads only; hashes nothing.

        Raises:
            UserError: the folder holds another run or foreign files, or `--resume` does not fit what it holds.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--outdir {self.path} is a file: name a folder")
        there = checkpoints.found(self.path)
        record = self.path / "run.json"
        if record.exists():
            self._check_same(record)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"--outdir {self.path} is not empty and holds no run: choose another folder")
        if self.resume is None and there:
            raise UserError(
                f"--outdir {self.path} holds this same run up to {there[0].name}: continue it with --resume, or "
                "choose another folder"
            )
        self.choose(contents=False)
        if steps is not None and self.resume_step >= steps:  # a Trainer would take one step more than was asked for
            raise UserError(f"--resume: {self.path} is complete; its policy is {self.start}")

    def choose(self, *, contents: bool) -> None:
        """Set `start` to the checkpoint that `--resume` means, `skipped` to the newer ones that cannot be used.

        Args:
            contents: hash every file of a checkpoint before it is chosen; else sizes alone are compared.

        Raises:
            UserError: there are checkpoints and none is good, or the one that was named is not.
        """
        if self.resume is None:
            return
        named = [path for path in checkpoints.found(self.path) if self.resume in (AUTO, path.name)]
        if not named and self.resume != AUTO:
            there = ", ".join(path.name for path in checkpoints.found(self.path)) or "none"
            raise UserError(f"--resume {self.resume}: {self.path} has {there}; give one of them, or {AUTO}")
        self.start, self.skipped = None, {}
        for path in named:
            if (why := checkpoints.problem_with(path, self.resume_key, contents=contents)) is None:
                self.start = path
                return
            self.skipped[path] = why
        if self.skipped:
            reasons = "; ".join(f"{path.name}: {why}" for path, why in self.skipped.items())
            raise UserError(
                f"--resume: no checkpoint in {self.path} can be continued ({reasons}): repair or remove what is "
                "named, or start anew in another --outdir"
            )

    def derived(self) -> dict[str, Any]:
        """The numbers that this run wrote down when it last began; {} for a new one. To be asked after `check`."""
        record = self.path / "run.json"
        return json.loads(record.read_text(encoding="utf-8"))["derived"] if record.exists() else {}

    def resume_messages(self) -> list[str]:
        """Lines that say where a continued run starts, which checkpoints it passed over, and what has changed."""
        passed = [f"passed over {path.name}: {why}" for path, why in self.skipped.items()]
        if self.start is None:
            return [f"--resume: no checkpoint in {self.path}, starting at step 0"] if self.resume else []
        changed = checkpoints.other_versions(self.start, self.resume_key)
        note = f"note: made with other versions ({', '.join(changed)}), so not bit for bit the same run"
        return [*passed, f"continuing after step {self.resume_step}, from {self.start}", *([note] if changed else [])]

    def _check_same(self, record: Path) -> None:
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{record} cannot be read ({error}): choose another --outdir") from error
        if stored.get("config_hash") == self.config_hash:
            return
        theirs = stored.get("config") or {}
        names = sorted((theirs.keys() | self.config.keys()) - self.may_differ)
        differing = [name for name in names if _json(theirs.get(name)) != _json(self.config.get(name))]
        if "num_processes" in differing and not set(differing) - {"num_processes", *FOLLOWING}:
            raise UserError(
                f"--outdir {self.path} holds this run on {theirs['num_processes']} processes, these are "
                f"{self.config['num_processes']}: launch as many, or choose another folder"
            )
        shown = ", ".join(f"{n} {_json(theirs.get(n))} -> {_json(self.config.get(n))}" for n in differing[:3])
        raise UserError(f"--outdir {self.path} holds another run ({shown}): choose another folder")

    def open(self, derived: Mapping[str, Any], command: Sequence[str], commit: str | None) -> None:
        """Create the folder, cut what a continued run logged after its checkpoint, and write `run.json`."""
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        self._cut_after(self.resume_step)
        record = {
            "config_hash": self.config_hash,
            "seed": self.config.get("seed"),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "resumed_from_step": self.resume_step or None,
            "command": shlex.join(_without_secrets(command)),
            "commit": commit,
            "versions": _versions(),
            "derived": dict(derived),
            "config": self.config,
        }
        atomic_write(self.path / "run.json", json.dumps(record, indent=2, default=str).encode())

    def _cut_after(self, step: int) -> None:
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if _logged_by(line, step)]
            atomic_write(metrics, "".join(f"{line}\n" for line in kept).encode())
        for rollouts in (self.path / "rollouts").glob("step_*.jsonl"):
            if int(rollouts.stem.removeprefix("step_")) > step:
                rollouts.unlink()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; `seconds_since_start` counts from this process's start."""
        row = {"step": step, "seconds_since_start": round(time.time() - self.started, 3), **metrics}
        self.append("metrics.jsonl", row)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one row to the file of that name."""
        self._record(lambda: _append(self.path / name, json.dumps(row) + "\n"))

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rollouts/step_NNNNNN.jsonl`, whole or not at all."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = text.encode("utf-8", "surrogatepass")
        self._record(lambda: atomic_write(self.path / "rollouts" / f"step_{step:06d}.jsonl", content))

    def save_image(self, image: Image.Image) -> str | None:
        """Store a picture once, under the hash of its PNG; returns its path inside the folder, None on a full disk."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"images/{hashlib.sha256(buffer.getvalue()).hexdigest()[:20]}.png"
        path = self.path / name
        if self._full or path.exists():
            return None if self._full else name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, buffer.getvalue())
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._say_full(error)
            return None
        return name

    def make_room(self) -> bool:
        """Delete all pictures, keep no more of them, and say so; False if there was nothing to delete."""
        pictures = [path for kept in ("images", "cache") for path in (self.path / kept).glob("*.png")]
        freed = sum(path.stat().st_size for path in pictures)
        for path in pictures:
            path.unlink(missing_ok=True)
        if pictures:
            logger.warning("%s: %d pictures deleted, %.1f MB", self.path, len(pictures), freed / 1e6)
        self._full = True
        return bool(pictures)

    def _record(self, write: Callable[[], None]) -> None:
        """Write a record; on a full disk in place of the pictures, and if that is not enough not at all."""
        try:
            write()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._say_full(error)
            if self.make_room():
                self._record(write)

    def _say_full(self, error: OSError) -> None:
        if not self._full:
            logger.warning("%s: %s: no more pictures are kept; free some space", self.path, error.strerror)
        self._full = True


def complete_lines(path: Path, cut: bool) -> list[bytes]:
    """The lines of a file but for a last one that a kill tore; `cut` takes it off the file, for who appends to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if cut and whole < len(content):
        os.truncate(path, whole)
    return content[:whole].splitlines()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two settings, as 'seed 1 -> 2; ...', 300 characters at most; "" if nothing does."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)[:300]


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())


def git_commit(repository: Path) -> str | None:
    """The commit checked out at `repository`, "+changes" if tracked files differ from it; None where git says none."""
    git = ["git", "-C", str(repository)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _append(path: Path, line: str) -> None:
    """Add a line, whole or not at all: half a row would spoil the next one."""
    content = line.encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if file.write(content) < len(content):  # a disk that filled up in the middle
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _logged_by(line: str, step: int) -> bool:
    """Whether a metrics row is of `step` or before; a half-written last row is not."""
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError):
        return False


def _without_secrets(command: Sequence[str]) -> list[str]:
    """The command line with the values of `--*token`, `--*key`, `--*secret` and `--*password` replaced by ***."""
    clean, hide = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and flag.lower().endswith(("token", "key", "secret", "password"))
        clean.append("***" if hide else f"{flag}=***" if secret and equals else word)
        hide = secret and not equals
    return clean


def atomic_write(path: Path, content: bytes) -> None:
    """Write a temporary file of this process, then rename it: a reader sees the old file or the new, never half."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
