"""Run toy_trainer.train with one fault in it: `toy_fault.py FAULT AT OUTDIR STEPS [--resume]`.

Faults of the main process: "kill_between" before step AT is saved; "terminate" after it is logged; "full_disk" while
its state is written. Real signals, a real error.
"""

import errno
import os
import signal
import sys

import toy_trainer
from accelerate import Accelerator

from run.loop import Loop
from run.options import run_main


def happen(owner, name, due, do):
    """Let `do` take place before each call of `owner.name` that is `due`."""
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        if due(*args):
            do()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


fault, at, outdir, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
resume = "auto" if "--resume" in sys.argv else None
FAULTS = {
    "kill_between": lambda: happen(Loop, "_save", lambda loop: loop.done == at, send(signal.SIGKILL)),
    "terminate": lambda: happen(Loop, "log", lambda loop, *_: loop.done + 1 == at, send(signal.SIGTERM)),
    "full_disk": lambda: happen(Accelerator, "save_state", lambda _, path: path.endswith(f"-{at}"), full),
}
if os.environ.get("RANK", "0") == "0":
    FAULTS[fault]()
sys.exit(run_main("toy_trainer", lambda: toy_trainer.train(outdir, steps, resume)))
