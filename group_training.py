"""GRPO for a model that draws by itself: what `pref_grpo.py` and `t2i_r1.py` share around their methods.

For each user prompt the model draws a group of G pictures; frozen rewards compare each with the prompt; each reward is
normalised within its group, and what scores above the mean becomes likelier. A method says how a batch is drawn and
how it is learnt from; everything else of a run is here.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object

from data.prompts import prompts_of_step
from errors import UserError
from interfaces import Prompt, Reward, Sample
from models.frozen import without_zero3_init
from models.trained import Shadow
from rewards import RewardContext, RewardOptions, build, check, reward_contents
from rewards.offload import describe
from run.files import Contents, file_hash
from run.folder import Resume, RunFolder
from run.heartbeat import Heartbeat
from run.loop import Loop, make_accelerator
from run.loop_options import LoopArguments
from run.options import may_differ, option
from run.progress import start_run
from run.seeds import render_seed
from run.signals import Leave, leaving
from scoring import diagnostics
from scoring.advantages import mix, spread_by_chance
from scoring.cache import PictureCache
from scoring.judge import Judged, judge
from scoring.prefetch import Prefetcher
from scoring.progress import Draw, Evaluator, Training, WatchArguments
from scoring.rollouts import Rollout, rollout_rows, together

NEEDS_REWRITE = ("format", "length")
CACHE = 1e9  # bytes of pictures of the untrained model


# Options ---------------------------------------------------------------------------------------------------------


@dataclass
class GroupArguments:
    """Prompts, rewards, groups."""

    data: str = option(help="User prompts: .txt, one a line, or .jsonl (data/README.md).", changes="run")
    rewards: list[str] = option([], "Rewards, but format and length, which need a rewrite.", changes="run")
    reward_weights: list[float] = option([], "Of their advantages, in their order; unset: 1 each.", changes="run")
    held_out: list[str] = option([], "Scorers that are logged and never trained on.", changes="run")
    prompts_per_step: int = option(8, "Groups of a rollout, of all processes together.", changes="run", least=1)
    num_generations: int = option(8, "Pictures of a prompt: its group.", changes="run", least=2)
    updates_per_rollout: int = option(1, "Optimiser steps that share out a rollout.", changes="run", least=1)
    clip_range: float | None = option(None, "Of the ratio; unset: the method's published one.", changes="run", above=0)
    advantage_clip: float = option(5.0, "Bounds advantages.", changes="run", above=0)
    spread_floor: float = option(0.3, "Least spread of a group, as share of the batch's.", changes="run", least=0)
    beta: float = option(0.0, "Weight of the penalty for leaving the start.", changes="run", least=0)

    def check_rewards(self, reward: RewardOptions) -> None:
        """Refuse rewards and weights that cannot be meant; UserError with the names or the numbers."""
        names = [*self.rewards, *self.held_out]
        check(names, reward)
        if odd := [name for name in names if name in NEEDS_REWRITE]:
            raise UserError(f"reward {odd[0]!r} judges a rewrite, and there is none here: leave it out")
        if reward.preference_pairs == "anchor":
            raise UserError(
                "--preference_pairs anchor compares with pictures that training does not draw: give all, or 3"
            )
        if not self.rewards or len(self.reward_weights) not in (0, len(self.rewards)):
            raise UserError(f"--rewards {self.rewards} --reward_weights {self.reward_weights}: name rewards, and give "
                            "each a weight or none of them")  # fmt: skip

    def local_pictures(self, prompts: int, watched: int, processes: int, batch: int, batch_name: str) -> int:
        """Pictures of a rollout on each process; UserError if a group, a batch or an evaluation is cut in two.

        Args:
            batch: pictures that are trained on at once, the option `batch_name`.
        """
        for name, count in (("prompts_per_step", self.prompts_per_step), ("eval_prompts", watched)):
            if count % processes:
                raise UserError(
                    f"{name} {count} is not a multiple of the {processes} processes: no group may be split"
                )
        if self.prompts_per_step > prompts:
            raise UserError(f"prompts_per_step {self.prompts_per_step}: {self.data} has {prompts} prompts")
        local, parts = self.prompts_per_step // processes * self.num_generations, self.updates_per_rollout
        if local % (batch * parts):
            raise UserError(
                f"prompts_per_step {self.prompts_per_step} / {processes} process(es) x num_generations "
                f"{self.num_generations} = {local} pictures are not a multiple of {batch_name} {batch} x "
                f"updates_per_rollout {parts}"
            )
        return local

    def announce(self, numbers: Mapping[str, int], more: str) -> list[str]:
        """What a rollout is."""
        return [
            f"{self.prompts_per_step} prompts x {self.num_generations} pictures = {numbers['pictures_per_rollout']} a "
            f"rollout, on {numbers['processes']} process(es); {more}; {self.updates_per_rollout} update(s) of "
            f"{numbers['pictures_per_optimizer_step']} pictures, each in {numbers['passes_per_optimizer_step']} "
            f"passes; {numbers['pictures']} pictures in all"
        ]


def processes() -> int:
    """Of this run, before accelerate knows."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class Setup:
    """What is there before a method is made."""

    parts: tuple[Any, ...]  # the options
    accelerator: Accelerator
    folder: RunFolder
    prompts: list[Prompt]
    watched: list[Prompt]
    rewards: list[Reward]
    held_out: list[Reward]
    compared: list[Reward]
    resume: Resume

    @property
    def device(self) -> str:
        return str(self.accelerator.device)


# The method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One picture to draw.

    Attributes:
        member: its number in its group.
        seed: of its own.
    """

    prompt: Prompt
    member: int
    seed: int


@dataclass
class Batch:
    """This process's part of a rollout.

    Attributes:
        drawn: one for each chunk of rows, as the method needs it for its update.
    """

    rows: list[Row]
    samples: list[Sample]
    drawn: list[Any]
    judged: Judged
    seconds: dict[str, float]


class GroupMethod(ABC):
    """Rollouts and updates.

    Attributes:
        chunk: rows that are drawn at once.
        ema: the average of the trained weights.
        optimizer: as accelerate prepared it.
    """

    chunk: int
    ema: Shadow
    optimizer: AcceleratedOptimizer

    def __init__(self, groups: GroupArguments, loop: LoopArguments, pairs: str | int, setup: Setup):
        self.groups, self.loop_options, self.pairs = groups, loop, pairs
        self.setup, self.accelerator = setup, setup.accelerator
        self.prompts, self.rewards, self.held_out, self.seed = setup.prompts, setup.rewards, setup.held_out, loop.seed
        self.weights = groups.reward_weights or [1.0] * len(self.rewards)

    @abstractmethod
    def draw(self, step: int, rows: Sequence[Row]) -> tuple[list[Sample], Any]:
        """Pictures of these rows, and what the update needs to know of them."""

    @abstractmethod
    def update(self, step: int, batch: Batch, advantages: torch.Tensor, loop: Loop) -> dict[str, float]:
        """The optimiser steps of one rollout, (B,) advantages; metrics, with `output_norm`."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """The weights of now, as others load them; every process calls it, one writes."""

    def drawing_policy(self) -> AbstractContextManager:
        """Holds while rollouts are drawn."""
        return nullcontext()

    def more_columns(self, batch: Batch) -> Mapping[str, tuple[float, list[float]]]:
        """Name -> weight and scores of what counts beside the rewards."""
        return {}

    def learn(self, step: int, loop: Loop) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Rollout, advantages, update; metrics and rollouts of all processes."""
        batch = together(lambda: self.rollout(step, loop.heartbeat), step)
        loop.heartbeat.enter("train", step)
        started, count, judged = time.perf_counter(), len(batch.samples), batch.judged
        advantages, said = self.advantages(gather_object(judged.parts), self._more_columns_of_all(batch))
        mine = advantages[self.accelerator.process_index * count :][:count]
        for weights in self.optimizer.param_groups:
            weights["lr"] = self.loop_options.learning_rate_of(step)
        learnt = self.update(step, batch, torch.tensor(mine, dtype=torch.float32), loop)
        measured = {**learnt, **batch.seconds, "seconds/train": time.perf_counter() - started, **judged.metrics}
        rollouts = [
            Rollout(sample, sample.completion or None, (row.seed,), None, *scores)
            for sample, row, *scores in zip(batch.samples, batch.rows, judged.parts, judged.held_out, strict=True)
        ]
        room = self.loop_options.pictures_to_keep(step) // self.accelerator.num_processes
        rows = gather_object(rollout_rows(rollouts, mine, self.weights, loop.folder, room))
        found = diagnostics.of_pictures(rows, self.groups.num_generations)
        return {**diagnostics.mean_of_processes(gather_object([measured])), **said, **found}, rows

    def rollout(self, step: int, heartbeat: Heartbeat) -> Batch:
        """Draw and score this process's groups."""
        group, rows = self.groups.num_generations, self.rows_of(step)
        heartbeat.enter("render", step)
        started, drawn, samples = time.perf_counter(), [], []
        with Prefetcher([*self.rewards, *self.held_out]) as prefetcher, self.drawing_policy():
            for first in range(0, len(rows), self.chunk):
                if code := leaving():
                    raise Leave(code)
                whole = len(samples) // group
                found, kept = self.draw(step, rows[first : first + self.chunk])
                samples += found
                drawn.append(kept)
                for number in range(whole, len(samples) // group):
                    prefetcher.ready(samples[number * group :][:group])
        rendered = time.perf_counter()
        judged = judge(
            samples, self.rewards, self.held_out, group=group, on_phase=lambda phase: heartbeat.enter(phase, step)
        )
        seconds = {"seconds/render": rendered - started, "seconds/score": time.perf_counter() - rendered}
        return Batch(rows, samples, drawn, judged, seconds)

    def rows_of(self, step: int) -> list[Row]:
        """This process's groups."""
        share = self.groups.prompts_per_step // self.accelerator.num_processes
        prompts = prompts_of_step(step, self.prompts, self.groups.prompts_per_step, self.seed)
        return [
            Row(prompt, member, render_seed(self.seed, prompt.id, step, member))
            for prompt in prompts[self.accelerator.process_index * share :][:share]
            for member in range(self.groups.num_generations)
        ]

    def _more_columns_of_all(self, batch: Batch) -> dict[str, tuple[float, list[float]]]:
        return {name: (weight, gather_object(scores)) for name, (weight, scores) in self.more_columns(batch).items()}

    def advantages(
        self,
        parts: Sequence[Mapping[str, float | None]],
        more: Mapping[str, tuple[float, list[float]]] = MappingProxyType({}),
    ) -> tuple[list[float], dict[str, float]]:
        """From the scores of the whole rollout: advantages, clamped, and what there is to say of them."""
        group = self.groups.num_generations
        columns = {reward.name: [part[reward.name] for part in parts] for reward in self.rewards}
        missing = [None in part.values() for part in parts]
        for name, (_, scores) in more.items():
            columns[name] = [None if gone else score for gone, score in zip(missing, scores, strict=True)]
        weights = [*self.weights, *(weight for weight, _ in more.values())]
        partners = group - 1 if self.pairs == "all" else min(self.pairs, group - 1)
        mixed = mix(
            columns, weights, group, floor=self.groups.spread_floor,
            chance={"preference": spread_by_chance(group, partners)},
        )  # fmt: skip
        limit = self.groups.advantage_clip
        said = {f"groups/{name}_by_chance": share for name, share in mixed.by_chance.items()}
        return np.clip(mixed.advantages, -limit, limit).tolist(), said


# One run ---------------------------------------------------------------------------------------------------------


def set_up(
    parts: Sequence[Any], numbers: Mapping[str, int], batch: int, contents: Callable[[str], Contents],
    announcement: Sequence[str], prompts: list[Prompt], watched: list[Prompt],
) -> Setup:  # fmt: skip
    """Accelerator, run folder, rewards.

    Args:
        parts: all dataclasses of options.
        numbers: with `passes_per_optimizer_step`.
        batch: rows of one pass.
        contents: device -> what the trained model holds; downloads it if it must be, and settles its options.
        announcement: lines about what is about to run.
        watched: prompts of the evaluation.

    Raises:
        UserError: bad input, found before any model is loaded where that is possible.
    """
    groups, loop, reward = (
        next(part for part in parts if isinstance(part, kind))
        for kind in (GroupArguments, LoopArguments, RewardOptions)
    )
    accelerator = make_accelerator(numbers["passes_per_optimizer_step"], batch, loop.max_grad_norm)
    device = reward.reward_device or str(accelerator.device)
    held = contents(str(accelerator.device))
    reward.settle(device)
    folder = RunFolder(loop.outdir, all_options(parts, groups), may_differ=may_differ(*parts), resume=loop.resume)
    folder.plan()
    if (folder.path / "ema").exists():
        raise UserError(f"--outdir {folder.path} is complete: it holds the trained weights")
    verdicts = folder.path / f"verdicts_{accelerator.process_index}.sqlite"
    context = RewardContext(device, None, prompts, loop.seed, verdicts)
    names = [*groups.rewards, *groups.held_out]
    with without_zero3_init():
        scorers = build(names, reward, context)
    rewards, held_out = scorers[: len(groups.rewards)], scorers[len(groups.rewards) :]
    folder.contents = {**held, **reward_contents(names, reward)}
    lines = [*announcement, *(f"  {describe(scorer, prompts)}" for scorer in scorers)]
    resume = start_run(folder, numbers, lines)
    anchored = replace(reward, preference_pairs="anchor")  # in a group the mean win rate is one half
    compared = [build([r.name], anchored, context)[0] if r.name == "preference" else r for r in rewards]
    return Setup(tuple(parts), accelerator, folder, prompts, watched, rewards, held_out, compared, resume)


def run(setup: Setup, method: GroupMethod, draw: Draw, model: torch.nn.Module, more: Iterable[Callable] = ()) -> None:
    """From the first step to trained weights and report.

    Args:
        draw: pictures for the evaluation.
        model: what is trained.
        more: further measures of the evaluation, () -> metrics.

    Raises:
        ScoringError, Stopped: the run cannot go on.
        Leave: a signal told it to.
    """
    loop, watch = (next(p for p in setup.parts if isinstance(p, kind)) for kind in (LoopArguments, WatchArguments))
    heartbeat = Heartbeat(setup.folder.path, setup.accelerator.process_index, loop.phase_budget)
    steps = Loop(
        setup.accelerator, setup.folder, setup.resume, heartbeat, total=loop.max_steps, save_every=loop.save_steps,
        model=model, keep=loop.save_total_limit, shown=progress_metrics,
    )  # fmt: skip
    cache = PictureCache(setup.folder.path / "cache", CACHE)
    evaluator = Evaluator(
        draw, setup.watched, setup.compared, setup.held_out, setup.folder, cache, loop.seed, measures=tuple(more)
    )
    Training(method, steps, evaluator, watch, loop.max_absent_share).to_end()


def all_options(parts: Sequence[Any], groups: GroupArguments) -> dict[str, Any]:
    """All options in one, as `run.json` has them."""
    every = {name: value for part in parts for name, value in asdict(part).items()}
    return {**every, "num_processes": processes(), "data_hash": file_hash(Path(groups.data))}


def progress_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a step's metrics those that its progress line shows."""
    parts = {name.split("/")[1]: value for name, value in row.items() if re.fullmatch(r"rewards/\w+/mean", name)}
    return {"reward": row.get("reward"), **parts, "grad_norm": row.get("grad_norm")}
