"""The seam between our rewards and TRL: completions -> rewrites -> pictures -> one column of scores per reward.

One generation batch is read, drawn and scored once, at the first reward function that TRL calls; the others return
their column of the same result. Two rules shape the numbers:

- *Absent is not zero.* If any part of a sample could not be had (failed render, dead judge, non-finite score), all its
  parts are None: TRL then leaves the row out of its group's baseline and gives it advantage 0.
- *Bad is not absent.* An answer that cannot be read is not drawn; from each image reward it gets the lowest score of
  its group's scored members (the reward's lower bound if there is none), so one bad answer is worst in its group
  without blowing up the group's spread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object
from PIL import Image

from errors import ScoringError, UserError
from interfaces import Prompt, Renderer, Reward, Sample
from prompting import parse
from run.seeds import render_seed
from run.signals import Leave, leaving
from scoring.cache import PictureCache
from scoring.prefetch import Prefetcher

logger = logging.getLogger(__name__)

PATIENCE = 3  # generation batches in a row: with too many absent samples the run stops, with equal rewards it warns
Row = tuple[str, int]  # a text to draw, and the seed of its noise
# What a renderer or reward may raise because of its input or machine; anything else is a bug and ends at once.
FAILURES = (UserError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Scored:
    """One rollout with its scores.

    Attributes:
        sample: what was asked, answered and drawn.
        reasoning: the think block, None if the answer could not be read.
        seeds: noise of each picture; () if nothing was drawn.
        tokens: length of the rewrite in the renderer's tokens, None if there is none.
        parts: reward name -> score, all None if the sample is absent.
        held_out: scorer name -> score that nothing is trained on; absent only where that scorer has none.
    """

    sample: Sample
    reasoning: str | None
    seeds: tuple[int, ...]
    tokens: int | None
    parts: dict[str, float | None]
    held_out: dict[str, float | None]

    @property
    def absent(self) -> bool:
        return any(value is None for value in self.parts.values())


@dataclass(frozen=True)
class _Rollout:
    """What is to be drawn for one sample; `baseline` is the raw prompt where its pictures are wanted too."""

    prompt: Prompt
    completion: str
    rewrite: str | None
    seeds: tuple[int, ...]
    baseline: str | None
    baseline_seeds: tuple[int, ...]

    @property
    def rows(self) -> list[Row]:
        """Each (text, seed) of which it needs the picture."""
        texts = ((self.rewrite, self.seeds), (self.baseline, self.baseline_seeds))
        return [(text, seed) for text, seeds in texts if text is not None for seed in seeds]

    def sample(self, drawn: Mapping[Row, Image.Image | None]) -> Sample:
        """The sample with its pictures."""
        images = () if self.rewrite is None else tuple(drawn[self.rewrite, seed] for seed in self.seeds)
        baseline_images = (
            () if self.baseline is None else tuple(drawn[self.baseline, seed] for seed in self.baseline_seeds)
        )
        return Sample(self.prompt, self.completion, self.rewrite, images, baseline_images)


class Scorer:
    """Draws and scores generation batches; deliberately not an `nn.Module`, which TRL would run as a classifier.

    Args:
        renderer: frozen.
        rewards: in the order of TRL's `reward_weights`, with distinct names.
        prompts: `Prompt.id` -> prompt, for the dataset's `prompt_id` column.
        num_generations: completions per prompt; each batch must be whole groups of them.
        images_per_rewrite: pictures per rewrite, one seed each, that image rewards average over.
        reasoning: whether an answer has a think block.
        common_seeds: whether all members of a group start from the same noise.
        run_seed: the run's `--seed`.
        max_absent_share: above this share of absent samples a batch counts against PATIENCE, in [0, 1].
        held_out: scorers that are asked and logged but feed no advantage.
        fresh_seeds: whether a prompt's rewrites get new noise each step; its baseline pictures never do.
        cache: of pictures that may be wanted again at a later step; None keeps none.
        score_while_drawing: whether all scorers, not judges alone, score a group while others are being drawn.
        enter: called with the name of each phase as it starts ("render", "score hps", "train") and its optimiser step.
    """

    def __init__(
        self,
        renderer: Renderer,
        rewards: Sequence[Reward],
        prompts: Mapping[str, Prompt],
        *,
        num_generations: int,
        images_per_rewrite: int = 1,
        reasoning: bool = True,
        common_seeds: bool = True,
        run_seed: int = 0,
        max_absent_share: float = 0.5,
        held_out: Sequence[Reward] = (),
        fresh_seeds: bool = True,
        cache: PictureCache | None = None,
        score_while_drawing: bool = False,
        enter: Callable[[str, int], None] = lambda phase, step: None,
    ):
        self.renderer, self.rewards, self.prompts = renderer, list(rewards), prompts
        self.held_out, self.num_generations = list(held_out), num_generations
        self.run_seed, self.max_absent_share = run_seed, max_absent_share
        self.reasoning, self.common_seeds, self.enter = reasoning, common_seeds, enter
        self.fresh_seeds, self.cache, self.score_while_drawing = fresh_seeds, cache, score_while_drawing
        scorers = [*self.rewards, *self.held_out]
        self._pictures = images_per_rewrite if any(scorer.needs_images for scorer in scorers) else 0
        self._baseline_images = any(scorer.needs_baseline_images for scorer in scorers)
        self.last: list[Scored] = []
        self.metrics: dict[str, float] = {}
        self._completions: list | None = None
        self._bad_batches = self._equal_batches = 0

    def reward_functions(self) -> list[Callable[..., list[float | None]]]:
        """One plain function per reward, named after it: TRL gives each its own column, weight and curve."""
        return [self._reward_function(reward.name) for reward in self.rewards]

    def _reward_function(self, name: str) -> Callable[..., list[float | None]]:
        def column(*, completions, prompt_id, trainer_state, **_) -> list[float | None]:
            if completions is not self._completions:  # the first reward of this batch: draw and score it
                texts = [turns[0]["content"] for turns in completions]
                self.last = self.score_together(texts, prompt_id, trainer_state.global_step + 1)
                self._completions = completions
            return [scored.parts[name] for scored in self.last]

        column.__name__ = name
        return column

    def score_together(self, completions: Sequence[str], prompt_ids: Sequence[str], step: int) -> list[Scored]:
        """`score`, on every process; if one of them fails or was told to leave, all raise the same.

        Raises:
            Leave: a process was told to leave; the batch is given up.
            ScoringError: on a process the renderer or a reward failed, with that process's reason.
        """
        scored, failure = [], ""
        try:
            scored = self.score(completions, prompt_ids, step)
        except Leave:
            logger.info("told to leave: this batch of step %d is given up", step)
        except ScoringError as error:
            failure = str(error)
        except FAILURES as error:
            logger.exception("step %d could not be scored", step)
            failure = f"scoring failed ({type(error).__name__}: {error}); see the log above, then --resume"
        told = gather_object([(failure, leaving())])
        failures = [f"process {rank}: {reason}" for rank, (reason, _) in enumerate(told) if reason]
        if failures:
            raise ScoringError("; ".join(failures) if len(told) > 1 else failure)
        if code := max(code for _, code in told):
            raise Leave(code)
        self.enter("train", step)
        return scored

    def score(self, completions: Sequence[str], prompt_ids: Sequence[str], step: int) -> list[Scored]:
        """Read, draw and score one process's batch of whole groups; also fills `metrics`.

        Raises:
            ScoringError: a group is not one prompt's, or the renderer or a reward broke its contract.
            Leave: this process was told to leave.
        """
        self._check_groups(prompt_ids)
        answers = [parse(completion, self.reasoning) for completion in completions]
        seeds = [
            self._seeds(id, step, i % self.num_generations) if answer else ()
            for i, (id, answer) in enumerate(zip(prompt_ids, answers, strict=True))
        ]
        rollouts = [
            self._rollout(self.prompts[id], completion, answer.rewrite if answer else None, row)
            for id, completion, answer, row in zip(prompt_ids, completions, answers, seeds, strict=True)
        ]
        scorers = [*self.rewards, *self.held_out]
        started = time.perf_counter()
        self.enter("render", step)
        with Prefetcher(scorers, _column, locally=self.score_while_drawing) as prefetcher:
            drawn, counts = self._draw(rollouts, prefetcher)
            rendered = time.perf_counter()
        samples = [rollout.sample(drawn) for rollout in rollouts]
        columns = {
            scorer.name: self._ask(scorer, samples, step, prefetcher.prefetched[scorer.name]) for scorer in scorers
        }
        missing = self._missing(samples, columns)
        parts, held_out = self._parts(samples, columns), _rows(self.held_out, columns, len(samples))
        scored = [
            Scored(
                sample,
                answer.reasoning if answer else None,
                seeds[i],
                self.renderer.count_tokens(answer.rewrite) if answer else None,
                parts[i],
                held_out[i],
            )
            for i, (sample, answer) in enumerate(zip(samples, answers, strict=True))
        ]
        self.metrics = {
            "seconds/render": rendered - started,
            "seconds/score": time.perf_counter() - rendered,
            **counts,
            **missing,
        }
        for scorer in (*self.rewards, *self.held_out):
            self.metrics.update(scorer.metrics)
        return scored

    def check(self, found: Mapping[str, float]) -> None:
        """Look at a batch's metrics, those of all processes: stop on too many absent samples, warn of equal rewards.

        Raises:
            ScoringError: `samples/absent` was too high in PATIENCE batches in a row; with what was missing.
        """
        share = found["samples/absent"]
        self._bad_batches = self._bad_batches + 1 if share > self.max_absent_share else 0
        if self._bad_batches >= PATIENCE:
            causes = {name.removeprefix("absent/"): found[name] for name in found if name.startswith("absent/")}
            listed = ", ".join(f"{cause} in {part:.0%}" for cause, part in causes.items() if part > 0)
            raise ScoringError(
                f"{share:.0%} of the samples have no score, above --max_absent_share {self.max_absent_share:.0%} for "
                f"the {PATIENCE}rd batch in a row; missing: {listed}: see the log above, "
                "repair the cause, then continue with --resume"
            )
        self._equal_batches = self._equal_batches + 1 if found.get("groups/equal") == 1 else 0
        if self._equal_batches == PATIENCE:
            logger.warning(
                "%d batches in a row in which every group's members scored alike: nothing is being learnt; look at "
                "the pictures and parts in rollouts/, raise --temperature, or give rewards that differ",
                PATIENCE,
            )

    def _check_groups(self, prompt_ids: Sequence[str]) -> None:
        size = self.num_generations
        if len(prompt_ids) % size:
            raise ScoringError(f"{len(prompt_ids)} rollouts on this process are not whole groups of {size}")
        for start in range(0, len(prompt_ids), size):
            group = set(prompt_ids[start : start + size])
            if len(group) > 1:
                raise ScoringError(f"rollouts {start} to {start + size - 1} mix prompts {sorted(group)}: no group")

    def _seeds(self, id: str, step: int, member: int) -> tuple[int, ...]:
        """One seed a picture; a group's member has its own pictures' indices only where seeds are not common."""
        step = step if self.fresh_seeds else 0
        first = 0 if self.common_seeds else member * self._pictures
        return tuple(render_seed(self.run_seed, id, step, k) for k in range(first, first + self._pictures))

    def _rollout(self, prompt: Prompt, completion: str, rewrite: str | None, seeds: tuple[int, ...]) -> _Rollout:
        if not self._baseline_images or not seeds:
            return _Rollout(prompt, completion, rewrite, seeds, None, ())
        baseline_seeds = tuple(render_seed(self.run_seed, prompt.id, 0, k) for k in range(self._pictures))
        return _Rollout(prompt, completion, rewrite, seeds, prompt.text, baseline_seeds)

    def _draw(
        self, rollouts: Sequence[_Rollout], prefetcher: Prefetcher
    ) -> tuple[dict[Row, Image.Image | None], dict[str, float]]:
        """Every distinct picture once, from the cache or drawn, and the counts; `prefetcher` gets whole groups."""
        groups = _Groups(rollouts, self.num_generations, prefetcher)
        kept = self._kept(rollouts) if self.cache else set()
        for row in sorted(kept):
            if (picture := self.cache.get(*row)) is not None:
                groups.add(row, picture)
        cached = len(groups.drawn)
        wanted = dict.fromkeys(row for rollout in rollouts for row in rollout.rows)
        rows = [row for row in wanted if row not in groups.drawn]
        told = {"on_image": lambda i, picture: groups.add(rows[i], picture)} if prefetcher.scorers else {}
        pictures = self.renderer([text for text, _ in rows], [seed for _, seed in rows], **told) if rows else []
        if len(pictures) != len(rows):
            raise ScoringError(f"the renderer returned {len(pictures)} images for {len(rows)} rewrites")
        for row, picture in zip(rows, pictures, strict=True):
            if row not in groups.drawn:
                groups.add(row, picture)
            if row in kept and picture is not None:
                self.cache.put(*row, picture)
        counts = {"images/drawn": float(len(rows))}
        rewrites = [(rollout.rewrite, seed) for rollout in rollouts for seed in rollout.seeds]
        if rewrites:
            counts["images/distinct"] = len(set(rewrites)) / len(rewrites)
        if kept:
            counts["images/cached"] = cached / len(groups.drawn)
        return groups.drawn, counts

    def _kept(self, rollouts: Sequence[_Rollout]) -> set[Row]:
        """The pictures that may be wanted again at a later step."""
        baseline_images = {(r.baseline, seed) for r in rollouts if r.baseline is not None for seed in r.baseline_seeds}
        return (
            baseline_images
            if self.fresh_seeds
            else baseline_images | {row for rollout in rollouts for row in rollout.rows}
        )

    def _ask(
        self, scorer: Reward, samples: Sequence[Sample], step: int, prefetched: Mapping[int, float | None]
    ) -> list[float | None]:
        self.enter(f"score {scorer.name}", step)
        if code := leaving():
            raise Leave(code)
        rest = [i for i in range(len(samples)) if i not in prefetched]  # whole groups
        remaining = dict(zip(rest, _column(scorer, [samples[i] for i in rest]), strict=True)) if rest else {}
        if code := leaving():  # its answers may have been cut short
            raise Leave(code)
        return [(prefetched if i in prefetched else remaining)[i] for i in range(len(samples))]

    def _missing(self, samples: Sequence[Sample], columns: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
        """Share of the readable samples without a picture, and of those a reward could score without its score."""
        drawn = [i for i, s in enumerate(samples) if s.rewrite is not None and None not in s.images]
        readable = sum(sample.rewrite is not None for sample in samples)
        shares = {"absent/pictures": 1 - len(drawn) / readable} if readable else {}
        for reward in self.rewards:
            rows = drawn if reward.needs_images else range(len(samples))
            if rows:
                shares[f"absent/{reward.name}"] = sum(columns[reward.name][i] is None for i in rows) / len(rows)
        return shares

    def _parts(
        self, samples: Sequence[Sample], columns: Mapping[str, list[float | None]]
    ) -> list[dict[str, float | None]]:
        """Scores of each sample by reward name, after both rules of this module."""
        unreadable = [sample.rewrite is None for sample in samples]
        columns = {reward.name: list(columns[reward.name]) for reward in self.rewards}
        absent = [
            any(image is None for image in sample.images)
            or any(columns[r.name][i] is None for r in self.rewards if not (unreadable[i] and r.needs_images))
            for i, sample in enumerate(samples)
        ]
        for column in columns.values():
            column[:] = [None if gone else score for score, gone in zip(column, absent, strict=True)]
        to_fill = [bad and not gone for bad, gone in zip(unreadable, absent, strict=True)]
        for reward in self.rewards:
            if reward.needs_images:
                self._give_lowest(columns[reward.name], reward.range[0], to_fill)
        return _rows(self.rewards, columns, len(samples))

    def _give_lowest(self, column: list[float | None], floor: float, to_fill: Sequence[bool]) -> None:
        """Give the rows `to_fill` (unreadable answers) the lowest score of their group in `column`, in place."""
        for start in range(0, len(column), self.num_generations):
            group = range(start, start + self.num_generations)
            lowest = min((column[i] for i in group if column[i] is not None), default=floor)
            for i in group:
                column[i] = lowest if to_fill[i] else column[i]


def _rows(
    scorers: Sequence[Reward], columns: Mapping[str, Sequence[float | None]], count: int
) -> list[dict[str, float | None]]:
    """A dict of scores per sample."""
    return [{scorer.name: columns[scorer.name][i] for scorer in scorers} for i in range(count)]


class _Groups:
    """Which groups have all their pictures, as pictures come in."""

    def __init__(self, rollouts: Sequence[_Rollout], size: int, prefetcher: Prefetcher):
        self.drawn: dict[Row, Image.Image | None] = {}
        self._prefetcher = prefetcher
        self._groups = {first: rollouts[first : first + size] for first in range(0, len(rollouts), size)}
        self._lacks = {first: {row for r in group for row in r.rows} for first, group in self._groups.items()}

    def add(self, row: Row, picture: Image.Image | None) -> None:
        self.drawn[row] = picture
        for first, rows in self._lacks.items():
            if row in rows:
                rows.remove(row)
                if not rows:
                    self._prefetcher.ready(first, [rollout.sample(self.drawn) for rollout in self._groups[first]])


def _column(reward: Reward, samples: Sequence[Sample]) -> list[float | None]:
    """Scores of all samples, right in number and range; None if not finite, or without the pictures it needs."""
    rows = [i for i, s in enumerate(samples) if not reward.needs_images or (s.images and None not in s.images)]
    scores = reward([samples[i] for i in rows])
    if len(scores) != len(rows):
        raise ScoringError(f"reward {reward.name!r} returned {len(scores)} scores for {len(rows)} samples")
    low, high = reward.range
    column: list[float | None] = [None] * len(samples)
    for i, score in zip(rows, scores, strict=True):
        if score is None or not math.isfinite(score):
            continue
        if not low <= score <= high:
            text = samples[i].prompt.text
            raise ScoringError(f"reward {reward.name!r} gave {score} for {text!r}: outside its range [{low}, {high}]")
        column[i] = float(score)
    return column
