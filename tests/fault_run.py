"""Run r1_prompter.main with one fault in it: `fault_run.py FAULT AT RANK <r1_prompter options>`.

The fault happens on process RANK, at the AT-th time (from 1) that the run comes by, "N+" from then on. Everything else
is the real program: the faults are real signals, real exceptions and real NaNs at a known moment.
"""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import r1_prompter
from rendering.local import LocalRenderer
from rewards.hps import HPS
from run import checkpoints


def before(owner, name, happen):
    """Let `happen` take place before each due call of `owner.name`; it may stand in for the call's result."""
    original, calls = getattr(owner, name), [0]

    def replaced(*args, **kwargs):
        calls[0] += 1
        if AT == str(calls[0]) or (AT.endswith("+") and calls[0] >= int(AT[:-1])):
            if (result := happen()) is not None:
                return result
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("the reward's device fell off the bus")


def not_a_number():
    original = r1_prompter.RewriteTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        due = self.state.global_step + 1
        return loss * math.nan if AT == str(due) or (AT.endswith("+") and due >= int(AT[:-1])) else loss

    r1_prompter.RewriteTrainer.compute_loss = poisoned


def fill(name):
    """Write zeros to `name` of the run folder until its file system has no byte left."""

    def happen():
        path = Path(options[options.index("--outdir") + 1], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(512)):
                pass

    return happen


FAULTS = {
    "kill_drawing": lambda: before(LocalRenderer, "_draw_chunk", send(signal.SIGKILL)),
    "terminate_drawing": lambda: before(LocalRenderer, "_draw_chunk", send(signal.SIGTERM)),
    "interrupt_drawing": lambda: before(LocalRenderer, "_draw_chunk", send(signal.SIGINT)),
    "save_drawing": lambda: before(LocalRenderer, "_draw_chunk", send(signal.SIGUSR1)),
    "kill_saving": lambda: before(checkpoints, "write_manifest", send(signal.SIGKILL)),
    "terminate_training": lambda: before(r1_prompter.RewriteTrainer, "compute_loss", send(signal.SIGTERM)),
    "fail_scoring": lambda: before(HPS, "__call__", fail),
    "hang_scoring": lambda: before(HPS, "__call__", lambda: time.sleep(4)),
    "nan_loss": not_a_number,
    "fill_with_pictures": lambda: before(LocalRenderer, "_draw_chunk", fill("images/many.png")),
    "fill_disk": lambda: before(LocalRenderer, "_draw_chunk", fill("../somebody_elses")),
}

fault, AT, rank, *options = sys.argv[1:]
if os.environ.get("RANK", "0") == rank:
    FAULTS[fault]()
sys.exit(r1_prompter.main(options))
