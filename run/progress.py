"""How a training begins, what it shows while it runs, and how it ends; the same for every trainer.

Rows in `metrics.jsonl`, a bar on a terminal, plain lines elsewhere; then the policy and the report in the run folder.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from errors import UserError
from run.files import git_commit
from run.folder import Resume, RunFolder

ROOT = Path(__file__).resolve().parent.parent


def start_run(folder: RunFolder, numbers: Mapping[str, int], lines: Sequence[str]) -> Resume:
    """Start the run folder and print what is about to run, on the main process; every process calls this.

    Returns:
        Where the run begins: checkpoints that are damaged are skipped by now.

    Raises:
        UserError: all checkpoints to continue from are damaged, or the folder cannot be written.
    """
    state = PartialState()
    state.wait_for_everyone()  # every process has planned before one writes into the folder
    started: list[Any] = [None, ""]
    if state.is_main_process:
        try:
            command = [Path(sys.argv[0]).name, *sys.argv[1:]]
            started[0] = folder.start(numbers, command, git_commit(ROOT))
            print("\n".join([*lines, *folder.resume_messages(started[0])]), flush=True)
        except UserError as error:
            started[1] = str(error)
        except OSError as error:
            started[1] = (
                f"--outdir {folder.path} cannot be written ({error.strerror}): name another, or free some space"
            )
    if state.num_processes > 1:
        broadcast_object_list(started)
    if started[1]:
        raise UserError(started[1])
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
    return started[0]


class StepLog:
    """Each logged step: a row in `metrics.jsonl`, and a progress bar, or a plain line where there is no terminal.

    Args:
        folder: of the run.
        total: steps of the whole run.
        first: steps that were done before.
        shown: a row -> the few of its values, by name, that a user watches; absent ones are None.
        is_main: whether this process writes and shows.
    """

    def __init__(
        self,
        folder: RunFolder,
        total: int,
        first: int,
        shown: Callable[[Mapping[str, Any]], Mapping[str, float | None]],
        is_main: bool,
    ):
        self.folder, self.total, self.first, self.shown, self.is_main = folder, total, first, shown, is_main

    def open(self) -> None:
        """The first step begins now."""
        self.started = time.perf_counter()
        plain = not (self.is_main and sys.stdout.isatty())
        self.bar = tqdm(total=self.total, initial=self.first, unit="step", disable=plain)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Log the metrics of `step`, on the main process."""
        if not self.is_main:
            return
        self.folder.log(step, row)
        shown = {name: f"{value:.4g}" for name, value in self.shown(row).items() if value is not None}
        if not self.bar.disable:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(shown)
            return
        pace = (time.perf_counter() - self.started) / max(1, step - self.first)
        parts = "  ".join(f"{name} {value}" for name, value in shown.items())
        eta = pace * (self.total - step) / 60
        print(f"step {step}/{self.total}  {parts}  {pace:.1f} s/step  ETA {eta:.1f} min", flush=True)

    def close(self) -> None:
        """No more steps."""
        self.bar.close()
