"""What a training tells while it runs: rows in `metrics.jsonl`, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from training.run_folder import RunFolder


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
