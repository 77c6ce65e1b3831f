"""Checkpoints of any trainer: written aside, given a manifest, renamed into place; a run that cannot save stops.

Every process calls `save` and `publish` together, and each decision is taken by all of them before any of them acts.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from errors import Stopped, one_line
from run import checkpoints
from run.files import size_text
from run.folder import RunFolder
from run.heartbeat import Heartbeat

ADAM_BYTES = 12  # of a trained parameter: two float32 moments, and the optimiser's own float32 copy
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # of file, torch's zip writer and safetensors on a full disk
# What tells that trained weights are complete is put in place last.
LAST = ("config.json", "adapter_config.json", "ema")


class Saver:
    """Saves a run's state as `checkpoint-N`, complete or not at all.

    Args:
        folder: of the run.
        heartbeat: of this process.
        keep: checkpoints that stay on the disk; None for all.
        first_size: bytes of a checkpoint, roughly, while there is none to go by.
    """

    def __init__(self, folder: RunFolder, heartbeat: Heartbeat, keep: int | None, first_size: Callable[[], int]):
        self.folder, self.heartbeat, self.keep, self.first_size = folder, heartbeat, keep, first_size
        self.state = PartialState()
        self.staging = folder.path / checkpoints.STAGING

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Save the state after optimiser step `step`; `write` writes this process's files into the folder it is given.

        Raises:
            Stopped: the disk is full, or cannot be written to.
        """
        self.heartbeat.enter("save", step)
        self._on_main(step, self._clear_and_make_room)
        staged = self.staging / f"checkpoint-{step}"
        self._write(step, lambda: write(staged))
        self.state.wait_for_everyone()
        self._on_main(step, lambda: self._put_in_place(staged, step))

    def publish(self, step: int, write: Callable[[Path], None]) -> None:
        """Put what was trained into the run folder itself, its configuration last."""
        aside = self.staging / "policy"
        self._write(step, lambda: write(aside))
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            for path in sorted(aside.iterdir(), key=lambda path: path.name in LAST):
                shutil.rmtree(self.folder.path / path.name, ignore_errors=True)  # a folder that a killed run left
                path.replace(self.folder.path / path.name)
            shutil.rmtree(self.staging)

    def has(self, step: int) -> bool:
        """Whether the state after `step` is on the disk."""
        return self._good(self.folder.path / f"checkpoint-{step}")

    def _put_in_place(self, staged: Path, step: int) -> None:
        checkpoints.write_manifest(staged, step, self.folder.resume_key)
        checkpoints.put_in_place(staged, self.folder.path / staged.name)
        self.staging.rmdir()
        if self.keep:
            checkpoints.prune(self.folder.path, self.folder.resume_key, self.keep)

    def _clear_and_make_room(self) -> None:
        """Remove what a killed save left; then pictures and older checkpoints, as far as a new one needs the room."""
        run = self.folder.path
        shutil.rmtree(self.staging, ignore_errors=True)
        good = [path for path in checkpoints.found(run) if self._good(path)]
        needed = checkpoints.size_of(good[0]) if good else self.first_size()
        if shutil.disk_usage(run).free < needed:
            self.folder.make_room()
        if shutil.disk_usage(run).free < needed:
            checkpoints.prune(run, self.folder.resume_key, keep=1)
        if (free := shutil.disk_usage(run).free) < needed:
            raise Stopped(
                f"{size_text(free)} free at {run}, a checkpoint takes about {size_text(needed)}: free some space, "
                f"then continue with --resume; {self._last()}"
            )

    def _on_main(self, step: int, work: Callable[[], None]) -> None:
        """Do `work` on the main process; if it cannot be done, all processes stop with the reason."""
        reason = [""]
        if self.state.is_main_process:
            try:
                work()
            except Stopped as error:
                reason = [str(error)]
            except CANNOT_WRITE as error:
                reason = [self._cannot_write(step, error)]
        if self.state.num_processes > 1:
            broadcast_object_list(reason)
        if reason[0]:
            raise Stopped(reason[0])

    def _write(self, step: int, write: Callable[[], None]) -> None:
        """`write`; if it fails, once more in place of the pictures, then stop with what to do.

        Of several processes the one that cannot write ends alone, and the launcher ends the others, because they may
        be waiting for it inside DeepSpeed.
        """
        try:
            write()
        except CANNOT_WRITE as error:
            if self.state.num_processes > 1 or not self.folder.make_room():
                shutil.rmtree(self.staging, ignore_errors=True)
                raise Stopped(self._cannot_write(step, error)) from error
            self._write(step, write)

    def _cannot_write(self, step: int, error: Exception) -> str:
        free = size_text(shutil.disk_usage(self.folder.path).free)
        return (
            f"step {step} cannot be saved in {self.folder.path} ({one_line(error)}; {free} free): repair that, then "
            f"continue with --resume; {self._last()}"
        )

    def _last(self) -> str:
        good = [path.name for path in checkpoints.found(self.folder.path) if self._good(path)]
        return f"the last checkpoint is {good[0]}" if good else "there is no checkpoint yet"

    def _good(self, checkpoint: Path) -> bool:
        return checkpoints.problem_with(checkpoint, self.folder.resume_key, contents=False) is None


def checkpoint_size(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of a checkpoint with an Adam optimiser; of an adapter alone where not all parameters are trained."""
    trained = (parameter for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() * (parameter.element_size() + ADAM_BYTES) for parameter in trained)


def random_state() -> dict[str, Any]:
    """The random states of this process that a checkpoint holds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
