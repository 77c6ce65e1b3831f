"""The folder of one run, `run.json`, `metrics.jsonl`, `rollouts/`, `images/`, `checkpoint-N/`, and who may write it.

A folder belongs to one configuration, known by a hash. Another run's folder, or one with foreign files in it, is
refused; the same run continues with `--resume` from its newest whole checkpoint, and what was logged after that
checkpoint is cut off, so that no step is logged twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

PACKAGES = ("accelerate", "deepspeed", "diffusers", "peft", "torch", "transformers", "trl")
# What may differ between a run and its continuation: where it writes, how often, and how fast; not what it learns.
NOT_IDENTITY = {
    "outdir",
    "output_dir",
    "resume",
    "dry_run",
    "resume_from_checkpoint",
    "logging_dir",
    "report_to",
    "disable_tqdm",
    "save_images_every",
    "save_images_max",
    "save_total_limit",
    "render_batch_size",
    "reward_batch_size",
    "reward_device",
    "reward_offload",
    "judge_url",
    "judge_concurrency",
    "judge_timeout",
    "judge_batch_timeout",
    "judge_cache",
    "log_level",
    "ddp_timeout",
    "dataloader_num_workers",
}


class RunFolderError(RuntimeError):
    """The output folder cannot be used for this run; the message says why and what to do."""


class RunFolder:
    """One run's files. Every process may construct and `check` it; `open` and the writers are for one process.

    Args:
        path: the `--outdir`.
        config: the resolved configuration, JSON-able, without secrets.
        resume: whether `--resume` was given.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, resume: bool = False):
        self.path, self.config, self.resume = Path(path), dict(config), resume
        self.started = time.time()

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration, NOT_IDENTITY left out."""
        identity = {key: value for key, value in self.config.items() if key not in NOT_IDENTITY}
        return hashlib.sha256(_json(identity).encode()).hexdigest()[:16]

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint: TRL writes `trainer_state.json` last."""
        whole = [path.parent for path in self.path.glob("checkpoint-*/trainer_state.json")]
        return max(whole, key=_step_of, default=None)

    @property
    def resume_step(self) -> int:
        """Optimiser steps already done: those of the checkpoint under `--resume`, else 0."""
        return _step_of(self.checkpoint) if self.resume and self.checkpoint else 0

    def check(self, steps: int | None = None) -> None:
        """Raise unless this run, of `steps` optimiser steps in all, may write here. Reads only.

        Raises:
            RunFolderError: the folder holds another run or foreign files, or `--resume` does not fit what it holds.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"--outdir {self.path} is a file: name a folder")
        record = self.path / "run.json"
        if not record.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise RunFolderError(f"--outdir {self.path} is not empty and holds no run: choose another folder")
            if self.resume:
                raise RunFolderError(f"--resume: {self.path} holds no run: leave --resume out to start one")
            return
        self._check_same(record)
        if self.resume and self.checkpoint is None:
            raise RunFolderError(f"--resume: {self.path} holds no whole checkpoint: leave --resume out to start again")
        if steps is not None and self.resume_step >= steps:  # a Trainer would take one step more than was asked for
            raise RunFolderError(f"--resume: {self.path} is complete; its policy is {self.checkpoint}")
        if not self.resume and self.checkpoint is not None:
            raise RunFolderError(
                f"--outdir {self.path} holds this same run up to {self.checkpoint.name}: continue it with "
                "--resume, or choose another folder"
            )

    def _check_same(self, record: Path) -> None:
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunFolderError(f"{record} cannot be read ({error}): choose another --outdir") from error
        if stored.get("config_hash") == self.config_hash:
            return
        theirs = stored.get("config") or {}
        names = sorted((theirs.keys() | self.config.keys()) - NOT_IDENTITY)
        differing = [name for name in names if _json(theirs.get(name)) != _json(self.config.get(name))]
        shown = ", ".join(f"{n} {_json(theirs.get(n))} -> {_json(self.config.get(n))}" for n in differing[:3])
        raise RunFolderError(f"--outdir {self.path} holds another run ({shown}): choose another folder")

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
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "derived": dict(derived),
            "config": self.config,
        }
        write_whole(self.path / "run.json", json.dumps(record, indent=2, default=str).encode())

    def _cut_after(self, step: int) -> None:
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if _logged_by(line, step)]
            write_whole(metrics, "".join(f"{line}\n" for line in kept).encode())
        for rollouts in (self.path / "rollouts").glob("step_*.jsonl"):
            if int(rollouts.stem.removeprefix("step_")) > step:
                rollouts.unlink()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; `seconds_since_start` counts from this process's start."""
        row = {"step": step, "seconds_since_start": round(time.time() - self.started, 3), **metrics}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rollouts/step_NNNNNN.jsonl`, whole or not at all."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(self.path / "rollouts" / f"step_{step:06d}.jsonl", text.encode("utf-8", "surrogatepass"))

    def save_image(self, image: Image.Image) -> str:
        """Store a picture once, under the hash of its PNG; returns its path inside the folder."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"images/{hashlib.sha256(buffer.getvalue()).hexdigest()[:20]}.png"
        path = self.path / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, buffer.getvalue())
        return name


def git_commit(repository: Path) -> str | None:
    """The commit checked out at `repository`, "+changes" if tracked files differ from it; None where git says none."""
    git = ["git", "-C", str(repository)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


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


def write_whole(path: Path, content: bytes) -> None:
    """Write a temporary file of this process, then rename it: a reader sees the old file or the new, never half."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
