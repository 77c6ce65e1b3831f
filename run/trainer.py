"""What every trainer of the house adds to TRL's: nothing is lost when a run is killed, starved or told to leave.

    checkpoints   written by TRL's own saving, through `run.saver`: complete or absent
    signals       obeyed between optimiser steps, or where the scorer was cut short (run/signals.py)
    exact resume  a run that is cut inside a generation is saved as it stood before it, random states included
    numbers       a step whose gradient is not finite is skipped on all processes; several in a row stop the run
    loggers       TensorBoard, W&B and the like may fail; training goes on
    epochs        the order of the prompts is a function of seed and epoch

Every process takes each decision with the others, before any of them branches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import ModelConfig
from trl.trainer.utils import RepeatSampler

from errors import ScoringError
from report.page import write_card, write_report
from run import signals
from run.checkpoints import STAGING
from run.folder import Resume, RunFolder
from run.heartbeat import Heartbeat
from run.loop import FiniteSteps, signals_of_all
from run.progress import StepLog
from run.saver import Saver, checkpoint_size, random_state, set_random_state

logger = logging.getLogger(__name__)

Shown = Callable[[Mapping[str, Any]], Mapping[str, float | None]]


class RunTrainer(Trainer):
    """To stand before a TRL trainer among a class's bases.

    Args:
        folder, resume: of the run, as `run.progress.start_run` returned it.
        heartbeat: of this process.
        shown: a row of metrics -> the few of its values that a user watches.
        cycle: optimiser steps from one state that can be saved to the next: those that one generation serves.
    """

    def __init__(
        self,
        *args: Any,
        folder: RunFolder,
        resume: Resume,
        heartbeat: Heartbeat,
        shown: Shown,
        cycle: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.folder, self.resume, self.heartbeat, self.cycle, self.shown = folder, resume, heartbeat, cycle, shown
        self.saver = Saver(
            folder, heartbeat, self.args.save_total_limit, lambda: checkpoint_size(self.model.parameters())
        )
        self._saves_aside = False
        loggers = tuple(get_reporting_integration_callbacks(self.args.report_to))
        handler = self.callback_handler
        handler.callbacks = [_Shielded(c) if isinstance(c, loggers) else c for c in handler.callbacks]
        self.guard = _Guard(self)
        self.add_callback(self.guard)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_RunLog(folder, shown))

    def run_to_end(self) -> None:
        """Train from where the run resumes; then save the policy and write the report.

        Raises:
            Leave: a signal asked for it; what had been learnt is saved.
            Stopped: the run cannot go on; what had been learnt is saved where the disk allows it.
        """
        signals.listen()
        start = self.resume.checkpoint
        try:
            self.train(resume_from_checkpoint=str(start) if start else None)
            if self.guard.leave and self.state.global_step < self.state.max_steps:
                raise signals.Leave(self.guard.leave)
            self.saver.publish(self.state.global_step, lambda path: self.save_model(str(path)))
        except (signals.Leave, ScoringError) as error:
            self._save_where_it_stands()
            if self.is_world_process_zero() and isinstance(error, signals.Leave):
                step = self.state.global_step
                print(f"told to leave after step {step}: continue with --resume, from {self.folder.path}", flush=True)
            raise
        finally:
            self.heartbeat.close()
        if self.is_world_process_zero():
            print(f"policy: {self.folder.path}\nreport: {write_report(self.folder.path)}", flush=True)

    def _save_where_it_stands(self) -> None:
        """Save the last state between two generations, if it is not on the disk and anything has been learnt."""
        step = self.state.global_step
        if step == 0 or step % self.cycle or self.saver.has(step):
            return
        set_random_state(self.guard.random_state)
        self.state.num_input_tokens_seen = self.guard.tokens_seen
        self._save_checkpoint(self.model, trial=None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's draft knows nothing of the run; `_save` writes a card beside the weights."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        shown = [pair for row in self.state.log_history for pair in self.shown(row).items() if pair[1] is not None]
        logged = {"step": self.state.global_step, "metrics": dict(shown), "tags": self._tag_names}
        base = self.folder.config["gpt_path"]
        write_card(self.folder.path, Path(output_dir or self.args.output_dir), base=base, **logged)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / STAGING) if self._saves_aside else run

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._saves_aside = True
        try:
            save = super()._save_checkpoint  # which names the staged folder as the saver does
            self.saver.save(self.state.global_step, lambda staged: save(model, trial))
        finally:
            self._saves_aside = False


class _Guard(TrainerCallback):
    """Looks at signals and random states after each step, and at gradients before it."""

    def __init__(self, trainer: RunTrainer):
        self.trainer, self.finite = trainer, FiniteSteps()
        self.leave = 0  # exit code of a signal, the same on every process
        self.asked_to_save = self.skipped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.heartbeat.enter("train", state.global_step + 1)
        self._remember(state)

    def _remember(self, state) -> None:
        """What a generation changes and a checkpoint holds, as it is before the next generation."""
        self.random_state, self.tokens_seen = random_state(), state.num_input_tokens_seen

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Gradients are the same on all processes by now, so all see it; DeepSpeed has looked for itself."""
        deepspeed = self.trainer.is_deepspeed_enabled
        self.skipped = not deepspeed and self.finite.drop_bad_gradients(model.parameters())

    def on_optimizer_step(self, args, state, control, **kwargs):
        skipped = self.skipped or self.trainer.accelerator.optimizer_step_was_skipped
        self.trainer._metrics["train"]["steps/skipped"].append(float(skipped))
        self.finite.count(skipped, state.global_step + 1, args.learning_rate)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.heartbeat.enter("train", state.global_step + 1)
        self.leave, asked_to_save = signals_of_all()
        self.asked_to_save |= asked_to_save
        if state.global_step % self.trainer.cycle:
            return
        self._remember(state)
        if self.asked_to_save or self.leave:
            control.should_save, self.asked_to_save = True, False
        if self.leave:
            control.should_training_stop = True


class _RunLog(TrainerCallback):
    """Passes what TRL logs to the run's `StepLog`."""

    def __init__(self, folder: RunFolder, shown: Shown):
        self.folder, self.shown = folder, shown

    def on_train_begin(self, args, state, control, **kwargs):
        first, is_main = state.global_step, state.is_world_process_zero
        self.step_log = StepLog(self.folder, state.max_steps, first, self.shown, is_main)
        self.step_log.open()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs:  # the closing summary has no step of its own
            return
        row = dict(logs)
        if "step_time" in logs:
            phases = [logs.get(f"seconds/{phase}", 0.0) for phase in ("generate", "render", "score")]
            row["seconds/train"] = logs["step_time"] - sum(phases)
        self.step_log.write(state.global_step, row)

    def on_train_end(self, args, state, control, **kwargs):
        self.step_log.close()


class _Shielded(TrainerCallback):
    """A logger whose failure is reported once and costs its records, not the run."""

    def __init__(self, inner: TrainerCallback):
        self.inner, self.failed = inner, False

    def _pass_on(self, event: Callable, args, state, control, **kwargs) -> None:
        if self.failed:
            return
        try:
            event(args, state, control, **kwargs)
        except Exception as error:  # whatever somebody else's logger raises: its outage must not end a training
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


class EpochOrder(TrainerCallback):
    """Seeds a shuffling `sampler` with its seed + the epoch whenever one begins; epoch 0 is TRL's own order.

    TRL's `RepeatSampler` draws each epoch's order from one generator that starts anew with the process, so a run that
    is continued in its second epoch would meet the first epoch's order again.
    """

    def __init__(self, sampler: RepeatSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler.shuffle:
            epoch = math.floor(state.epoch + 1e-6)
            self.sampler.generator.manual_seed(self.sampler.seed + epoch)


def warn_if_bf16_loses_updates(training: TrainingArguments, model: ModelConfig) -> list[str]:
    """A line of warning if the policy's weights are too coarse for its steps; else none."""
    if model.dtype != "bfloat16" or model.use_peft or training.deepspeed_plugin is not None:
        return []
    return [
        "note: full fine-tuning of bfloat16 weights without DeepSpeed keeps no float32 copy, and updates below "
        "0.4 % of a weight are lost: launch with deepspeed_2.yaml, or give --dtype float32 or --use_peft true"
    ]
