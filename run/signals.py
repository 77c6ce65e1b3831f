"""Signals that ask a run to save, or to save and leave: noted when they come, obeyed where the work can be cut.

SIGTERM (Slurm, Kubernetes, `kill`) and the first Ctrl-C: save and leave, with 143 and 130. SIGUSR1: save and go on.
A second Ctrl-C is Python's own. Whatever takes long asks `leaving()` between its parts, the renderer between chunks,
the judge's client between calls, and returns what it has; the trainer then agrees with the other processes.

No torch here.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

LEAVE = {signal.SIGTERM: 143, signal.SIGINT: 130}  # signal -> exit code, 128 + its number as in a shell

_received: set[signal.Signals] = set()


class Leave(SystemExit):
    """A run that was told to leave has saved what it had; `code` is that of the signal."""


def listen() -> None:
    """Note SIGTERM, SIGINT and SIGUSR1 from now on; in a thread other than the main one, nothing is changed."""
    _received.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (*LEAVE, signal.SIGUSR1):
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.add(signal.Signals(number))
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leaving() -> int:
    """Exit code of the signal that told this process to leave, 0 if none did."""
    return max((code for number, code in LEAVE.items() if number in _received), default=0)


def saving() -> bool:
    """Whether this process was told to save and go on; asking again, it is False until the next signal."""
    told = signal.SIGUSR1 in _received
    _received.discard(signal.SIGUSR1)
    return told
