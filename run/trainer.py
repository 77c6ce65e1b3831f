"""What every trainer of the house adds to TRL's: nothing lost when a run is killed, starved or told to leave.

    checkpoints   written aside by TRL's own saving, sealed, renamed by the main process after a barrier, then pruned
    signals       obeyed between optimiser steps, or where the scorer was cut short (run/signals.py)
    exact resume  a run that is cut inside a generation is saved as it stood before it, random states included
    numbers       a step whose gradient is not finite is skipped on all processes; PATIENCE in a row stop the run
    full disk     pictures go first, then the older checkpoints; then the run stops, its last checkpoint untouched
    loggers       TensorBoard, W&B and the like may fail; training goes on

Every process takes each decision with the others, before any of them branches.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from errors import Stopped
from run import checkpoints, signals
from run.folder import RunFolder
from run.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

PATIENCE = 3  # skipped optimiser steps in a row before the run stops
ADAM_BYTES = 12  # a trained parameter's two float32 moments, and DeepSpeed's float32 copy of it
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # of file, torch's zip writer and safetensors on a full disk


class RunTrainer(Trainer):
    """To stand before a TRL trainer among a class's bases.

    Args:
        folder: of the run.
        heartbeat: told what this process is doing.
        cycle: optimiser steps from one state that can be saved to the next: those that one generation serves.
    """

    def __init__(self, *args: Any, folder: RunFolder, heartbeat: Heartbeat, cycle: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder, self.heartbeat, self.cycle = folder, heartbeat, cycle
        self.told_to_leave = 0  # exit code, the same on every process
        self._aside = False  # whether TRL's saving is redirected
        loggers = tuple(get_reporting_integration_callbacks(self.args.report_to))
        handler = self.callback_handler
        handler.callbacks = [_Shielded(c) if isinstance(c, loggers) else c for c in handler.callbacks]
        self.add_callback(_Guard(self))

    def save_where_it_stands(self) -> None:
        """Save the last state between two generations, if it is not on the disk and anything has been learnt."""
        step = self.state.global_step
        target = self.folder.path / f"checkpoint-{step}"
        if step == 0 or step % self.cycle or self._good(target):
            return
        _set_random_state(self.random_state)
        self.state.num_input_tokens_seen = self.tokens_seen
        self._save_checkpoint(self.model, trial=None)

    def save_policy(self) -> None:
        """Put the trained policy into the run folder; its configuration comes last, and without it there is none."""
        aside = self.folder.path / checkpoints.STAGING / "policy"
        self._or_stop(lambda: self.save_model(str(aside)))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in sorted(aside.iterdir(), key=lambda path: path.name in ("config.json", "adapter_config.json")):
                path.replace(self.folder.path / path.name)
            shutil.rmtree(aside.parent)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / checkpoints.STAGING) if self._aside else run

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        self.heartbeat.enter("save", step)
        self._on_main(self._clear_and_make_room)
        self._aside = True
        try:
            self._or_stop(lambda: super(RunTrainer, self)._save_checkpoint(model, trial))
        finally:
            self._aside = False
        self.accelerator.wait_for_everyone()
        self._on_main(lambda: self._put_in_place(step))

    def _put_in_place(self, step: int) -> None:
        run, name = self.folder.path, f"checkpoint-{step}"
        checkpoints.write_manifest(run / checkpoints.STAGING / name, step, self.folder.resume_key)
        checkpoints.put_in_place(run / checkpoints.STAGING / name, run / name)
        (run / checkpoints.STAGING).rmdir()
        if self.args.save_total_limit:
            checkpoints.prune(run, self.folder.resume_key, self.args.save_total_limit)

    def _clear_and_make_room(self) -> None:
        """Remove what a killed save left; then pictures and older checkpoints, as far as a new one needs the room."""
        run = self.folder.path
        shutil.rmtree(run / checkpoints.STAGING, ignore_errors=True)
        needed = self._expected_bytes()
        if shutil.disk_usage(run).free < needed:
            self.folder.make_room()
        if shutil.disk_usage(run).free < needed:
            checkpoints.prune(run, self.folder.resume_key, keep=1)
        if (free := shutil.disk_usage(run).free) < needed:
            raise Stopped(
                f"{_size(free)} free at {run}, a checkpoint takes about {_size(needed)}: free some space, then "
                f"continue with --resume; {self._last()}"
            )

    def _expected_bytes(self) -> int:
        there = [path for path in checkpoints.found(self.folder.path) if self._good(path)]
        if there:
            return checkpoints.size_of(there[0])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        saved = trained if len(trained) < len(list(self.model.parameters())) else self.model.parameters()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
        return weights + ADAM_BYTES * sum(parameter.numel() for parameter in trained)

    def _good(self, checkpoint: Path) -> bool:
        return checkpoints.problem_with(checkpoint, self.folder.resume_key, contents=False) is None

    def _last(self) -> str:
        good = [path.name for path in checkpoints.found(self.folder.path) if self._good(path)]
        return f"the last checkpoint is {good[0]}" if good else "there is no checkpoint yet"

    def _on_main(self, work: Callable[[], None]) -> None:
        """Do `work` on the main process; if it cannot be done, all processes stop with the reason."""
        reason = [""]
        if self.accelerator.is_main_process:
            try:
                work()
            except (Stopped, *CANNOT_WRITE) as error:
                reason = [str(error) if isinstance(error, Stopped) else self._cannot_write(error)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(reason)
        if reason[0]:
            raise Stopped(reason[0])

    def _or_stop(self, save: Callable[[], None]) -> None:
        """`save`; if it cannot be written, once more in place of the pictures, then stop with what to do.

        Of several processes the one that cannot write ends alone, and the launcher ends the others: they may be
        waiting for it inside DeepSpeed.
        """
        try:
            save()
        except CANNOT_WRITE as error:
            again = self.accelerator.num_processes == 1 and self.folder.make_room()
            if not again:
                shutil.rmtree(self.folder.path / checkpoints.STAGING, ignore_errors=True)
                raise Stopped(self._cannot_write(error)) from error
            self._or_stop(save)

    def _cannot_write(self, error: Exception) -> str:
        free = _size(shutil.disk_usage(self.folder.path).free)
        reason = " ".join(str(error).split())[:200]
        return (
            f"step {self.state.global_step} cannot be saved in {self.folder.path} ({reason}; {free} free): "
            f"repair that, then continue with --resume; {self._last()}"
        )


class _Guard(TrainerCallback):
    """The guard's eyes on the loop: signals and random states after each step, gradients before it."""

    def __init__(self, trainer: RunTrainer):
        self.trainer, self.skipped, self.save_asked = trainer, 0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.heartbeat.enter("train", state.global_step + 1)
        self._remember(state)

    def _remember(self, state) -> None:
        """What a generation changes and a checkpoint holds, as it is before the next generation."""
        self.trainer.random_state, self.trainer.tokens_seen = _random_state(), state.num_input_tokens_seen

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Gradients are the same on all processes by now, so all see it; DeepSpeed has looked for itself."""
        self.bad = False
        if not self.trainer.is_deepspeed_enabled:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                self.bad = True
                model.zero_grad(set_to_none=True)  # an optimiser passes over parameters without gradient

    def on_optimizer_step(self, args, state, control, **kwargs):
        bad = self.bad or self.trainer.accelerator.optimizer_step_was_skipped
        self.skipped = self.skipped + 1 if bad else 0
        self.trainer._metrics["train"]["steps/skipped"].append(float(bad))
        if bad:
            logger.warning("step %d skipped: its loss or gradient is not finite", state.global_step + 1)
        if self.skipped >= PATIENCE:
            raise Stopped(
                f"the loss or gradient of {PATIENCE} optimiser steps in a row is not finite, up to step "
                f"{state.global_step + 1}; none of them was taken: look at the last rollouts, lower learning_rate "
                f"{args.learning_rate} or leave float16, then start anew or continue with --resume"
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.heartbeat.enter("train", state.global_step + 1)
        told = gather_object([(signals.leaving(), signals.saving())])
        self.trainer.told_to_leave = max(leave for leave, _ in told)
        self.save_asked |= any(save for _, save in told)
        if state.global_step % self.trainer.cycle:
            return
        self._remember(state)
        if self.save_asked or self.trainer.told_to_leave:
            control.should_save, self.save_asked = True, False
        if self.trainer.told_to_leave:
            control.should_training_stop = True


class _Shielded(TrainerCallback):
    """A logger whose failure is told once and costs its records, not the run."""

    def __init__(self, inner: TrainerCallback):
        self.inner, self.failed = inner, False

    def _pass_on(self, event: Callable, args, state, control, **kwargs) -> None:
        if self.failed:
            return
        try:
            event(args, state, control, **kwargs)
        except Exception as error:  # whatever a logger of somebody else's raises: its outage must not end a training
            self.failed = True
            name = type(self.inner).__name__
            logger.warning("%s failed (%s: %s) and is not asked again", name, type(error).__name__, error)

    def on_train_begin(self, args, state, control, **kwargs):
        self._pass_on(self.inner.on_train_begin, args, state, control, **kwargs)

    def on_log(self, args, state, control, **kwargs):
        self._pass_on(self.inner.on_log, args, state, control, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        self._pass_on(self.inner.on_save, args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self._pass_on(self.inner.on_train_end, args, state, control, **kwargs)


def _random_state() -> dict[str, Any]:
    """What `Trainer._save_rng_state` saves of this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
