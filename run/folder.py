"""One run's folder (`run.json`, `metrics.jsonl`, `rollouts/`, `images/`, `checkpoint-N/`), and who may write to it.

A folder belongs to one configuration, known by a hash. Another run's folder, or one with foreign files in it, is
refused. The same run continues with `--resume` from its newest good checkpoint, and what was logged after that
checkpoint is removed, so that no step is logged twice.

A trainer asks the folder twice: `plan` before any model is loaded, `start` when the run begins.

On a full disk the run deletes its pictures first, then leaves out rows of its logs; it never deletes its last
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from errors import UserError
from run import checkpoints
from run.checkpoints import ResumeKey
from run.files import FULL, append_line, atomic_write, complete_lines, differences, installed_versions, png_bytes

logger = logging.getLogger(__name__)

AUTO = "auto"  # of --resume
ROWS = ("rollouts", "evaluations")  # folders of rows by step
AVERAGED = ("ema", "best")  # folders of weights that a trainer of image models leaves beside its own
LAYOUT = 2  # of run.json; a folder of another layout was made with options that have other names


@dataclass(frozen=True)
class Resume:
    """Where a run begins.

    Attributes:
        checkpoint: the folder that it continues from, None for the beginning.
        skipped: newer checkpoints -> why each cannot be used, newest first.
        derived: the numbers that the run wrote down when it last started; {} for a new run.
    """

    checkpoint: Path | None = None
    skipped: Mapping[Path, str] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps already done."""
        return checkpoints.step_of(self.checkpoint) if self.checkpoint else 0


class RunFolder:
    """One run's files. Every process may construct it and `plan`; `start` and the writers are for one process.

    Args:
        path: the `--outdir`.
        config: all options, JSON-able, without secrets.
        may_differ: names of those that may be others when the run is continued (`run.options.may_differ`).
        resume: `--resume`: AUTO for the newest good checkpoint, or the beginning if there is none; "checkpoint-N";
            None for a new run.

    Attributes:
        contents: `run.files.Contents` of all models that the options name; set before `start`, which compares it.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        may_differ: Set[str] = frozenset(),
        resume: str | None = None,
    ):
        self.path, self.config, self.may_differ, self.resume = Path(path), dict(config), may_differ, resume
        self.contents: Mapping[str, tuple[str, str]] = {}
        self.started = time.time()
        self._keeps_images = True

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration, without what may differ."""
        identity = {key: value for key, value in self.config.items() if key not in self.may_differ}
        return hashlib.sha256(_json(identity).encode()).hexdigest()[:16]

    @property
    def resume_key(self) -> ResumeKey:
        """What this run writes into the manifests of its checkpoints, and asks of those that it continues from."""
        return ResumeKey(self.config_hash, installed_versions())

    # Who may write here ----------------------------------------------------------------------------------------------

    def plan(self, steps: int | None = None) -> Resume:
        """Where this run, of `steps` optimiser steps in all, begins. Reads only, and hashes nothing.

        Raises:
            UserError: the folder holds another run or foreign files, or `--resume` does not fit what it holds.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--outdir {self.path} is a file: name a folder")
        record, stored = self.path / "run.json", {}
        if record.exists():
            stored = self._stored(record)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"--outdir {self.path} is not empty and holds no run: choose another folder")
        if self.resume is None and (there := checkpoints.found(self.path)):
            raise UserError(
                f"--outdir {self.path} holds this same run up to {there[0].name}: continue it with --resume, or "
                "choose another folder"
            )
        resume = self._choose(stored.get("derived", {}), contents=False)
        if steps is not None and resume.step >= steps:  # a Trainer would take one step more than was asked for
            raise UserError(f"--resume: {self.path} is complete; its policy is {resume.checkpoint}")
        return resume

    def start(self, numbers: Mapping[str, Any], command: Sequence[str], commit: str | None) -> Resume:
        """Choose the checkpoint by its hashes, remove what was logged after it, and write `run.json`.

        Args:
            numbers: derived from the options, as `Resume.derived` gives them to a later start.

        Raises:
            UserError: there are checkpoints and none of them is undamaged, or a model has other contents than before.
        """
        record = self.path / "run.json"
        if record.exists():
            before = {"contents": self._stored(record).get("contents", {})}
            if changed := differences(before, {"contents": self.contents}):
                raise UserError(f"--outdir {self.path} holds a run of other models ({changed}): choose another folder")
        resume = self._choose({}, contents=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._cut_after(resume.step)
        about = {
            "layout": LAYOUT,
            "config_hash": self.config_hash,
            "seed": self.config.get("seed"),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "resumed_from_step": resume.step or None,
            "command": shlex.join(_without_secrets(command)),
            "commit": commit,
            "versions": installed_versions(),
            "derived": dict(numbers),
            "config": self.config,
            "contents": self.contents,
        }
        atomic_write(record, json.dumps(about, indent=2, default=str).encode())
        return resume

    def resume_messages(self, resume: Resume) -> list[str]:
        """Lines that say where a continued run starts, which checkpoints it skipped, and which versions changed."""
        skipped = [f"passed over {path.name}: {why}" for path, why in resume.skipped.items()]
        if resume.checkpoint is None:
            return [f"--resume: no checkpoint in {self.path}, starting at step 0"] if self.resume else []
        changed = checkpoints.other_versions(resume.checkpoint, self.resume_key)
        note = f"note: made with other versions ({', '.join(changed)}), so not bit for bit the same run"
        started = f"continuing after step {resume.step}, from {resume.checkpoint}"
        return [*skipped, started, *([note] if changed else [])]

    def _choose(self, derived: Mapping[str, Any], *, contents: bool) -> Resume:
        """The newest checkpoint that `--resume` means and that can be continued; `contents`: by the hashes, too."""
        if self.resume is None:
            return Resume(derived=derived)
        there = checkpoints.found(self.path)
        named = [path for path in there if self.resume in (AUTO, path.name)]
        if not named and self.resume != AUTO:
            names = ", ".join(path.name for path in there) or "none"
            raise UserError(f"--resume {self.resume}: {self.path} has {names}; give one of them, or {AUTO}")
        skipped: dict[Path, str] = {}
        for path in named:
            why = checkpoints.problem_with(path, self.resume_key, contents=contents)
            if why is None:
                return Resume(path, skipped, derived)
            skipped[path] = why
        if skipped:
            reasons = "; ".join(f"{path.name}: {why}" for path, why in skipped.items())
            raise UserError(
                f"--resume: no checkpoint in {self.path} can be continued ({reasons}): repair or remove what is "
                "named, or start anew in another --outdir"
            )
        return Resume(derived=derived)

    def _stored(self, record: Path) -> dict[str, Any]:
        """`run.json` of this same run.

        Raises:
            UserError: it cannot be read, or is another run's.
        """
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
            layout, commit = stored.get("layout"), stored.get("commit") or "unknown"
        except (ValueError, AttributeError) as error:
            raise UserError(f"{record} cannot be read ({error}): choose another --outdir") from error
        if layout != LAYOUT:
            raise UserError(
                f"--outdir {self.path} was made at commit {commit}, whose options have other names: "
                "continue it with that commit, or choose another folder"
            )
        if stored.get("config_hash") == self.config_hash:
            return stored
        theirs = stored.get("config") or {}
        names = sorted((theirs.keys() | self.config.keys()) - self.may_differ)
        differing = [name for name in names if _json(theirs.get(name)) != _json(self.config.get(name))]
        shown = ", ".join(f"{n} {_json(theirs.get(n))} -> {_json(self.config.get(n))}" for n in differing[:3])
        raise UserError(
            f"--outdir {self.path} holds another run ({shown}): give its options, or choose another folder"
        )

    def _cut_after(self, step: int) -> None:
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in complete_lines(metrics, cut=False) if step and _step_of(line) <= step]
            atomic_write(metrics, b"".join(line + b"\n" for line in kept))
        for rows in (path for kind in ROWS for path in (self.path / kind).glob("step_*.jsonl")):
            if int(rows.stem.removeprefix("step_")) > step:
                rows.unlink()

    # What is written -------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; `seconds_since_start` counts from this process's start."""
        row = {"step": step, "seconds_since_start": round(time.time() - self.started, 3), **metrics}
        self._with_room(lambda: append_line(self.path / "metrics.jsonl", json.dumps(row)))

    def write_rows(self, kind: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `KIND/step_NNNNNN.jsonl`, complete or not at all; `kind` is one of ROWS."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = text.encode("utf-8", "surrogatepass")
        (self.path / kind).mkdir(exist_ok=True)
        self._with_room(lambda: atomic_write(self.path / kind / f"step_{step:06d}.jsonl", content))

    def save_image(self, image: Image.Image) -> str | None:
        """Store an image once, named by the hash of its PNG; returns its path in the folder, None on a full disk."""
        if not self._keeps_images:
            return None
        content = png_bytes(image)
        name = f"images/{hashlib.sha256(content).hexdigest()[:20]}.png"
        path = self.path / name
        if path.exists():
            return name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content)
        except OSError as error:
            self._keep_no_images(error)
            return None
        return name

    def make_room(self) -> bool:
        """Delete all pictures and keep no more of them; False if there was none to delete."""
        self._keeps_images = False
        pictures = [path for kept in ("images", "cache") for path in (self.path / kept).glob("*.png")]
        freed = sum(path.stat().st_size for path in pictures)
        for path in pictures:
            path.unlink(missing_ok=True)
        if pictures:
            logger.warning("%s: %d pictures deleted, %.1f MB", self.path, len(pictures), freed / 1e6)
        return bool(pictures)

    def _with_room(self, write: Callable[[], None]) -> None:
        """Write a record; on a full disk in place of the pictures, and if that is not enough, not at all."""
        try:
            write()
        except OSError as error:
            self._keep_no_images(error)
            if self.make_room():
                self._with_room(write)

    def _keep_no_images(self, error: OSError) -> None:
        if error.errno not in FULL:
            raise error
        if self._keeps_images:
            logger.warning("%s: %s: no more pictures are kept; free some space", self.path, error.strerror)
        self._keeps_images = False


def config_of(weights: Path) -> Mapping[str, Any]:
    """The options of the run that left the weights at `weights`, or in its ema/ or best/; {} if that is not known."""
    folder = weights.parent if weights.is_file() else weights
    folder = folder.parent if folder.name in AVERAGED else folder
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _step_of(line: bytes) -> float:
    """The step of a row of metrics; infinity for a damaged one, which is removed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _without_secrets(command: Sequence[str]) -> list[str]:
    """The command line with the values of `--*token`, `--*key`, `--*secret` and `--*password` replaced by ***."""
    clean, hide = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and flag.lower().endswith(("token", "key", "secret", "password"))
        clean.append("***" if hide else f"{flag}=***" if secret and equals else word)
        hide = secret and not equals
    return clean


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
