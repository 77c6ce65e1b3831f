"""Both ends of TRL's AsyncGRPOTrainer: the reward function that its worker process calls, and the trainer itself.

The worker calls it with one complete group, tells it no step, and adds up what it returns, unweighted. So it returns
one number a rollout, already weighted and added up, draws its noise from the completions, and writes down itself what
it scored. The trainer reads there what it logs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl.experimental.async_grpo import AsyncGRPOTrainer

from training.diagnostics import diagnose, mean_of_processes
from training.guard import GuardedTrainer, Stopped
from training.rollouts import rollout_rows
from training.run_folder import RunFolder, whole_lines
from training.scoring import Scored, Scorer, ScoringError
from training.signals import Leave, leaving

SCORED = "scored.jsonl"  # in the run folder: what was measured, a row for each step's worth of groups


class GroupReward:
    """One number for each rollout of one complete group, None for an absent one.

    Args:
        build: the policy's tokenizer and the scorer; called in the worker, at the first group.
        weights: of each reward.
        normalise: whether each reward is brought to unit spread in its group before they are added.
        outdir: the run folder.
        groups: of a step.
        step: number of the first file to be written in `rollouts/`.
        images_every, images_max: of how many steps one keeps pictures, and how many.
    """

    def __init__(
        self,
        build: Callable[[], tuple[PreTrainedTokenizerBase, Scorer]],
        *,
        weights: Sequence[float],
        normalise: bool,
        outdir: str,
        groups: int,
        step: int,
        images_every: int,
        images_max: int,
    ):
        self.build, self.weights, self.normalise, self.groups, self.step = build, weights, normalise, groups, step
        self.folder, self.images_every, self.images_max = RunFolder(outdir, {}), images_every, images_max
        self.scorer: Scorer | None = None
        self._rows: list[dict[str, Any]] = []
        self._measured: list[Mapping[str, float]] = []

    def __call__(
        self, *, completion_ids: Sequence[Sequence[int]], prompt_id: Sequence[str], **_
    ) -> list[float | None]:
        if self.scorer is None:
            self.tokenizer, self.scorer = self.build()
        # not TRL's messages: from those it may have taken the thinking out
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        scored = self.scorer.score(texts, prompt_id, noise(texts))
        rewards = combined([list(one.parts.values()) for one in scored], self.weights, self.normalise)
        self._record(scored, advantages(rewards))
        return [None if math.isnan(reward) else reward for reward in rewards.tolist()]

    def _record(self, scored: Sequence[Scored], advantages: Sequence[float]) -> None:
        """Write the group down; with the last one of a step's also what was measured, and look whether all is well."""
        kept = sum(image is not None for row in self._rows for image in row["images"])
        room = self.images_max - kept if (self.step - 1) % max(1, self.images_every) == 0 else 0
        self._rows += rollout_rows(scored, advantages, self.weights, self.folder, room)
        self._measured.append(self.scorer.metrics)
        self.folder.write_rollouts(self.step, self._rows)
        if len(self._measured) == self.groups:
            found = self._found()
            self.folder.append(SCORED, found)
            self.step, self._rows, self._measured = self.step + 1, [], []
            self.scorer.check(found)

    def _found(self) -> dict[str, float]:
        """r1_prompter.py's metrics of a step's groups; seconds are summed, other measures are means of groups."""
        found = mean_of_processes(self._measured)
        found |= {name: value * self.groups for name, value in found.items() if name.startswith("seconds/")}
        found |= diagnose(self._rows, self.scorer.num_generations, self.scorer.renderer.max_tokens)
        for reward in self.scorer.rewards:
            scores = [row["parts"][reward.name] for row in self._rows if row["parts"][reward.name] is not None]
            if scores:
                found[f"rewards/{reward.name}/mean"] = float(np.mean(scores))
                found[f"rewards/{reward.name}/std"] = float(np.std(scores))
        return found


def noise(completions: Sequence[str]) -> int:
    """What stands for the step in a group's seeds, in [0, 2**64): a hash of its completions, in any order.

    A counter would start anew with every worker. This way a group's members share their noise, new completions of a
    prompt get new noise, and nothing depends on arrival or on what was drawn before.
    """
    text = "\0".join(sorted(completions)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def combined(parts: Sequence[Sequence[float | None]], weights: Sequence[float], normalise: bool) -> np.ndarray:
    """One number per member of a group, NaN for an absent one, added up as TRL's GRPOTrainer does.

    Normalised, that is sum_k w_k (r_k - mean r_k) / (std r_k + 1e-4) (`normalize_then_sum`), here on top of the
    group's mean total: TRL subtracts the mean again, and its curve `reward` shows totals instead of nothing but zeros.

    Args:
        parts: G members x K rewards; an absent member has none at all.
    """
    scores_GK = np.array([[math.nan if part is None else part for part in row] for row in parts], dtype=float)
    weights_K = np.array(weights, dtype=float)
    totals_G = scores_GK @ weights_K
    known = ~np.isnan(totals_G)
    if not normalise or known.sum() < 2:
        return totals_G
    mean_K, std_K = scores_GK[known].mean(axis=0), scores_GK[known].std(axis=0, ddof=1)
    return totals_G[known].mean() + (scores_GK - mean_K) / (std_K + 1e-4) @ weights_K


def advantages(rewards: np.ndarray) -> list[float]:
    """What TRL makes of a group's numbers (`_AsyncRolloutLoop._score_group`); 0 for an absent member."""
    known = ~np.isnan(rewards)
    if not known.any():
        return [0.0] * len(rewards)
    return np.nan_to_num((rewards - rewards[known].mean()) / (rewards[known].std() + 1e-8)).tolist()


class AsyncRewriteTrainer(GuardedTrainer, AsyncGRPOTrainer):
    """TRL's, with the house's checkpoints, signals and gates; it logs what the worker measured, too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._scored = self.folder.path / SCORED
        if self.accelerator.is_main_process:
            self._scored.touch()
            self._read = len(whole_lines(self._scored, cut=True))

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.accelerator.is_main_process:
            self._rollout_dataset.check_health_fn = self._check_worker
        return loader

    def _check_worker(self, stale_after_s: float) -> None:
        """Asked every few seconds while there is no rollout. Several processes cannot be told, so there it ends."""
        alone = self.accelerator.num_processes == 1
        if alone and (code := leaving()):
            raise Leave(code)
        try:
            self.rollout_worker.check_health(stale_after_s)
        except RuntimeError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            failure = ScoringError if alone else Stopped
            raise failure(f"the rollout worker has failed: {reason}; once it is repaired, --resume goes on") from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside TRL's own: the means of what was scored since the last row, which later steps may learn from."""
        if self.accelerator.is_main_process:
            lines = whole_lines(self._scored, cut=False)
            for line in lines[self._read :]:
                for name, value in json.loads(line).items():
                    self._metrics["train"][name].append(value)
            self._read = len(lines)
        super().log(logs, start_time)
