"""How a training begins, what it tells while it runs, and how it ends; the same for every trainer.

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
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from trl import ModelConfig

from errors import UserError
from report.page import write_report
from run.folder import RunFolder, git_commit
from run.signals import Leave, listen
from run.trainer import RunTrainer
from scoring.judge import ScoringError

ROOT = Path(__file__).resolve().parent.parent


def start_run(folder: RunFolder, numbers: Mapping[str, int], lines: Sequence[str]) -> None:
    """Open the run folder and say what is about to run, on the main process; for every process to call.

    Raises:
        UserError: the checkpoints to continue from are damaged, or the folder cannot be written.
    """
    state = PartialState()
    state.wait_for_everyone()  # every process has checked the folder before one writes into it
    chosen: list = [None, ""]
    if state.is_main_process:
        try:
            folder.choose(contents=True)
            folder.open(numbers, [Path(sys.argv[0]).name, *sys.argv[1:]], git_commit(ROOT))
            print("\n".join([*lines, *folder.resume_messages()]), flush=True)
        except UserError as error:
            chosen[1] = str(error)
        except OSError as error:
            chosen[1] = (
                f"--outdir {folder.path} cannot be written ({error.strerror}): name another, or free some space"
            )
        chosen[0] = folder.start
    if state.num_processes > 1:
        broadcast_object_list(chosen)
    folder.start = chosen[0]
    if chosen[1]:
        raise UserError(chosen[1])
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))


def warn_if_bf16_loses_updates(training: TrainingArguments, model: ModelConfig) -> list[str]:
    """A line of warning if the policy's weights are too coarse for its steps; else none."""
    if model.dtype != "bfloat16" or model.use_peft or training.deepspeed_plugin is not None:
        return []
    return [
        "note: full fine-tuning of bfloat16 weights without DeepSpeed keeps no float32 copy, and updates below "
        "0.4 % of a weight are lost: launch with deepspeed_2.yaml, or give --dtype float32 or --use_peft true"
    ]


def run_to_end(trainer: RunTrainer, folder: RunFolder) -> None:
    """Train, from the checkpoint that the run continues from; then save the policy and write the report.

    Raises:
        Leave: a signal asked for it; what had been learnt is saved.
        ScoringError, Stopped: the run cannot go on; what had been learnt is saved where the disk allows it.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    listen()
    try:
        trainer.train(resume_from_checkpoint=str(folder.start) if folder.start else None)
        if trainer.told_to_leave and trainer.state.global_step < trainer.state.max_steps:
            raise Leave(trainer.told_to_leave)
        trainer.save_policy()
    except (Leave, ScoringError) as error:
        trainer.save_where_it_stands()
        if trainer.is_world_process_zero() and isinstance(error, Leave):
            step = trainer.state.global_step
            print(f"told to leave after step {step}: continue with --resume, from {folder.path}", flush=True)
        raise
    finally:
        trainer.heartbeat.close()
    if trainer.is_world_process_zero():
        print(f"policy: {folder.path}\nreport: {write_report(folder.path)}", flush=True)


class RunLog(TrainerCallback):
    """Each logged step: a row in `metrics.jsonl`, and a progress bar, or a plain line where there is no terminal.

    Args:
        folder: of the run.
        shown: a row -> the few of its values, by name, that a user watches; absent ones are None.
    """

    def __init__(self, folder: RunFolder, shown: Callable[[Mapping[str, Any]], Mapping[str, float | None]]):
        self.folder, self.shown = folder, shown

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.started = state.global_step, time.perf_counter()
        plain = not (state.is_world_process_zero and sys.stdout.isatty())
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=plain)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:  # the closing summary has no step of its own
            return
        row = dict(logs)
        if "step_time" in logs:
            phases = [logs.get(f"seconds/{phase}", 0.0) for phase in ("generate", "render", "score")]
            row["seconds/train"] = logs["step_time"] - sum(phases)
        self.folder.log(state.global_step, row)
        shown = {name: f"{value:.4g}" for name, value in self.shown(row).items() if value is not None}
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        pace = (time.perf_counter() - self.started) / max(1, state.global_step - self.first)
        parts = "  ".join(f"{name} {value}" for name, value in shown.items())
        eta = pace * (state.max_steps - state.global_step) / 60
        print(f"step {state.global_step}/{state.max_steps}  {parts}  {pace:.1f} s/step  ETA {eta:.1f} min", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
