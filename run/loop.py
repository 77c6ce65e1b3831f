"""The loop of a trainer that owns its loop: what `run.trainer` adds to TRL's trainers, for everybody else.

    with Loop(accelerator, folder, resume, heartbeat, total=100, save_every=20, model=model) as loop:
        for step in loop.steps():
            accelerator.backward(loss)
            loop.optimizer_step(optimizer)
            loop.log(metrics, rollouts)
    loop.saver.publish(loop.done, lambda path: ...)

Accelerate is underneath: DDP, ZeRO and FSDP save and load their own states. What else must be saved is given to
`accelerator.register_for_checkpointing`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object

from errors import ScoringError, Stopped
from run import signals
from run.folder import Resume, RunFolder
from run.heartbeat import Heartbeat
from run.progress import StepLog
from run.saver import Saver, checkpoint_size, random_state, set_random_state

logger = logging.getLogger(__name__)

PATIENCE = 3  # skipped optimiser steps in a row before the run stops


def signals_of_all() -> tuple[int, bool]:
    """Exit code to leave with, 0 to stay, and whether to save: the same on all processes."""
    told = gather_object([(signals.leaving(), signals.saving())])
    return max(code for code, _ in told), any(save for _, save in told)


def make_accelerator(passes: int = 1, batch_size: int = 1, max_norm: float = 1.0) -> Accelerator:
    """What the launcher asks for, for a loop without data loaders.

    Args:
        passes: backward passes of one optimiser step, on each process.
        batch_size: rows of one of them; DeepSpeed wants to know that, and
        max_norm: as given to `Loop.optimizer_step`.
    """
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # or accelerate counts one process where DeepSpeed runs several on CPUs
    accelerator = Accelerator(gradient_accumulation_steps=passes)
    if accelerator.distributed_type == "DEEPSPEED":
        known = {"train_micro_batch_size_per_gpu": batch_size, "gradient_clipping": max_norm}
        config = accelerator.deepspeed_plugin.deepspeed_config
        config.update(known)
        if (
            config["zero_optimization"]["stage"] == 3
        ):  # or small weights stay whole, and copies cannot take their place
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return accelerator


class FiniteSteps:
    """Skips optimiser steps whose gradient is not finite, and stops the run after PATIENCE of them in a row."""

    def __init__(self) -> None:
        self.skipped = 0  # in a row

    def drop_bad_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Drop all gradients if one is not finite, which is the same on all processes; returns whether it did."""
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in with_gradient]
        if not gradients or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return False
        for parameter in with_gradient:
            parameter.grad = None  # an optimiser passes over parameters without gradient
        return True

    def count(self, skipped: bool, step: int, learning_rate: float) -> None:
        """Note whether step `step` was skipped.

        Raises:
            Stopped: it is the last of PATIENCE in a row.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        if skipped:
            logger.warning("step %d skipped: its loss or gradient is not finite", step)
        if self.skipped >= PATIENCE:
            raise Stopped(
                f"the loss or gradient of {PATIENCE} optimiser steps in a row is not finite, up to step {step}; none "
                f"of them was taken: look at the last rollouts, lower learning_rate {learning_rate} or leave float16, "
                "then start anew or continue with --resume"
            )


class Loop:
    """The steps of one run, to be entered once all models and optimisers are prepared.

    Args:
        accelerator: has prepared whatever is to be saved.
        folder, resume: of the run, as `run.progress.start_run` returned it.
        heartbeat: of this process.
        total: steps of the whole run.
        save_every: steps between checkpoints; the last step is always saved.
        model: what is trained; its size tells how much room a checkpoint needs.
        keep: checkpoints that stay on the disk; None for all.
        shown: a row of metrics -> the few of its values that a user watches.

    Attributes:
        done: steps completed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        resume: Resume,
        heartbeat: Heartbeat,
        *,
        total: int,
        save_every: int,
        model: torch.nn.Module,
        keep: int | None = None,
        shown: Callable[[Mapping[str, Any]], Mapping[str, float | None]] = dict,
    ):
        self.accelerator, self.folder, self.resume, self.heartbeat = accelerator, folder, resume, heartbeat
        self.total, self.save_every, self.done = total, save_every, resume.step
        self.model, self.finite, self.metrics = model, FiniteSteps(), {}
        self.saver = Saver(folder, heartbeat, keep, lambda: checkpoint_size(model.parameters()))
        self.step_log = StepLog(folder, total, resume.step, shown, accelerator.is_main_process)
        self._moved = False  # whether an optimiser step was taken since `done`

    def __enter__(self) -> Loop:
        signals.listen()
        if self.resume.checkpoint:
            self.accelerator.load_state(str(self.resume.checkpoint))
        self.step_log.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """A run that leaves, or whose scoring failed, saves the state before the step that was cut short."""
        try:
            if isinstance(error, signals.Leave | ScoringError):
                if self.done and not self._moved and not self.saver.has(self.done):
                    set_random_state(self._before)
                    self._save()
                if self.accelerator.is_main_process and isinstance(error, signals.Leave):
                    print(f"told to leave after step {self.done}: continue with --resume, from {self.folder.path}")
        finally:
            self.step_log.close()
            self.heartbeat.close()

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do, from 1; between two of them signals are obeyed and checkpoints saved."""
        asked_to_save = False
        while self.done < self.total:
            self._before, self._moved = random_state(), False
            self.heartbeat.enter("train", self.done + 1)
            yield self.done + 1
            self.done, self._moved = self.done + 1, False
            leave, asked_to_save = signals_of_all()
            if asked_to_save or leave or self.done % self.save_every == 0 or self.done == self.total:
                self._save()
            if leave and self.done < self.total:
                raise signals.Leave(leave)

    def optimizer_step(self, optimizer: AcceleratedOptimizer, max_norm: float | None = None) -> bool:
        """Clip the gradients, take the step and clear them; False if it was skipped because one is not finite.

        Raises:
            Stopped: PATIENCE steps in a row were skipped.
        """
        skipped, parameters = False, []
        if self.accelerator.distributed_type != "DEEPSPEED":  # which has looked, clipped and stepped in `backward`
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            skipped = self.finite.drop_bad_gradients(parameters)
        if max_norm is not None and not skipped:
            self.metrics["grad_norm"] = float(self.accelerator.clip_grad_norm_(parameters, max_norm))
        optimizer.step()
        skipped |= self.accelerator.optimizer_step_was_skipped
        optimizer.zero_grad()
        self._moved |= not skipped
        self.metrics["steps/skipped"] = float(skipped)
        self.finite.count(skipped, self.done + 1, optimizer.param_groups[0]["lr"])
        return not skipped

    def log(self, metrics: Mapping[str, float], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write this step's metrics and rollouts, those of all processes, and show the progress."""
        if self.accelerator.is_main_process:
            if rollouts:
                self.folder.write_rows("rollouts", self.done + 1, rollouts)
            self.step_log.write(self.done + 1, {**metrics, **self.metrics})

    def _save(self) -> None:
        self.saver.save(self.done, lambda path: self.accelerator.save_state(str(path)))
