"""A file per process that says what it is doing since when, and every thread's stack when that takes too long.

`heartbeat_R.json` of the run folder names phase, step, host and process number; its age is the time that the phase has
taken so far. When a phase exceeds its budget, all stacks are written to `stacks_R.txt`, and again after each further
budget. Python's `faulthandler` does it from a thread that needs no interpreter lock, so a deadlock is seen too.
Nothing is killed.

No torch here.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import platform
import time
from pathlib import Path

from run.files import atomic_write

logger = logging.getLogger(__name__)


class Heartbeat:
    """The phases of one process. Not for several at once: `faulthandler` has one timer a process.

    Args:
        folder: the run's.
        rank: of the process.
        budget: seconds that a phase may take before stacks are written.
    """

    def __init__(self, folder: Path, rank: int, budget: float):
        self.path, self.budget = folder / f"heartbeat_{rank}.json", budget
        self.stacks = open(folder / f"stacks_{rank}.txt", "a", encoding="utf-8")

    def enter(self, phase: str, step: int) -> None:
        """The process begins `phase` ("generate", "render", "score hps", "train", "save") of an optimiser step."""
        faulthandler.dump_traceback_later(self.budget, repeat=True, file=self.stacks)
        beat = {"phase": phase, "step": step, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        where = {"host": platform.node(), "pid": os.getpid(), "budget_seconds": self.budget}
        try:
            atomic_write(self.path, json.dumps({**beat, **where}).encode())
        except OSError as error:
            logger.warning("no heartbeat in %s: %s", self.path, error.strerror)

    def close(self) -> None:
        """No phase from now on."""
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
