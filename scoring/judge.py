"""Samples -> scores: `judge` asks every reward and applies the two rules that shape its numbers.

- *Absent is not zero.* If any part of a sample could not be had (failed render, dead judge, non-finite score), all its
  parts are None. A trainer leaves such a sample out of its group's baseline and gives it advantage 0.
- *Bad is not absent.* An answer that cannot be read is not drawn. From each image reward it gets the lowest score of
  its group's scored members (the reward's lower bound if there is none), so one bad answer is worst in its group
  without blowing up the group's spread.

No renderer and no policy here; nothing is remembered from one call to the next.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from errors import ScoringError
from interfaces import Reward, Sample
from prompting import unreadable_because
from run.signals import Leave, leaving

logger = logging.getLogger(__name__)

PATIENCE = 3  # batches in a row: with too many absent samples the run stops, with equal rewards it warns
Column = list[float | None]


@dataclass(frozen=True)
class Judged:
    """The scores of one batch.

    Attributes:
        parts: for each sample, reward name -> score; all None if the sample is absent.
        held_out: for each sample, scorer name -> score that nothing is trained on; None where that scorer has none.
        metrics: shares of what is missing, and what the rewards say beside their scores.
    """

    parts: list[dict[str, float | None]]
    held_out: list[dict[str, float | None]]
    metrics: dict[str, float]


def judge(
    samples: Sequence[Sample],
    rewards: Sequence[Reward],
    held_out: Sequence[Reward] = (),
    *,
    group: int,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Judged:
    """Score whole groups of samples.

    Args:
        samples: those of one prompt adjacent, `group` of them.
        rewards: the policy is trained on these; with distinct names.
        held_out: these only watch.
        on_phase: called with "score NAME" before each scorer.

    Raises:
        ScoringError: a reward broke its contract.
        Leave: this process was told to leave; scores may have been cut short.
    """
    columns = {}
    for scorer in (*rewards, *held_out):
        on_phase(f"score {scorer.name}")
        columns[scorer.name] = _ask(scorer, samples)
    metrics = _missing(samples, rewards, columns)
    for scorer in (*rewards, *held_out):
        metrics.update(scorer.metrics)
    count = len(samples)
    return Judged(
        _rows(rewards, _parts(samples, rewards, columns, group), count), _rows(held_out, columns, count), metrics
    )


def score_column(reward: Reward, samples: Sequence[Sample]) -> Column:
    """Scores of all samples, right in number and range; None if not finite, or without the pictures it needs.

    Raises:
        ScoringError: the reward returned another number of scores, or one outside its range.
    """
    rows = [i for i, s in enumerate(samples) if not reward.needs_images or (s.images and None not in s.images)]
    scores = reward([samples[i] for i in rows])
    if len(scores) != len(rows):
        raise ScoringError(f"reward {reward.name!r} returned {len(scores)} scores for {len(rows)} samples")
    low, high = reward.range
    column: Column = [None] * len(samples)
    for i, score in zip(rows, scores, strict=True):
        if score is None or not math.isfinite(score):
            continue
        if not low <= score <= high:
            text = samples[i].prompt.text
            raise ScoringError(f"reward {reward.name!r} gave {score} for {text!r}: outside its range [{low}, {high}]")
        column[i] = float(score)
    return column


def _ask(scorer: Reward, samples: Sequence[Sample]) -> Column:
    if code := leaving():
        raise Leave(code)
    column = score_column(scorer, samples)
    if code := leaving():  # its answers may have been cut short
        raise Leave(code)
    return column


def _missing(samples: Sequence[Sample], rewards: Sequence[Reward], columns: Mapping[str, Column]) -> dict[str, float]:
    """Share of the readable samples without a picture, and of those a reward could score without its score."""
    drawn = [i for i, s in enumerate(samples) if s.rewrite is not None and None not in s.images]
    readable = sum(sample.rewrite is not None for sample in samples)
    shares = {"absent/pictures": 1 - len(drawn) / readable} if readable else {}
    for reward in rewards:
        rows = drawn if reward.needs_images else range(len(samples))
        if rows:
            shares[f"absent/{reward.name}"] = sum(columns[reward.name][i] is None for i in rows) / len(rows)
    return shares


def _parts(
    samples: Sequence[Sample], rewards: Sequence[Reward], columns: Mapping[str, Column], group: int
) -> dict[str, Column]:
    """The rewards' columns after both rules of this module."""
    unreadable = [sample.rewrite is None for sample in samples]
    absent = [
        any(image is None for image in sample.images)
        or any(columns[r.name][i] is None for r in rewards if not (unreadable[i] and r.needs_images))
        for i, sample in enumerate(samples)
    ]
    to_fill = [bad and not missing for bad, missing in zip(unreadable, absent, strict=True)]
    parts = {}
    for reward in rewards:
        scores = zip(columns[reward.name], absent, strict=True)
        parts[reward.name] = [None if missing else score for score, missing in scores]
        if reward.needs_images:
            _give_lowest(parts[reward.name], reward.range[0], to_fill, group)
    return parts


def _give_lowest(column: Column, floor: float, to_fill: Sequence[bool], size: int) -> None:
    """Give the rows `to_fill` (unreadable answers) the lowest score of their group in `column`, in place."""
    for start in range(0, len(column), size):
        group = range(start, start + size)
        lowest = min((column[i] for i in group if column[i] is not None), default=floor)
        for i in group:
            column[i] = lowest if to_fill[i] else column[i]


def _rows(scorers: Sequence[Reward], columns: Mapping[str, Column], count: int) -> list[dict[str, float | None]]:
    """A dict of scores per sample."""
    return [{scorer.name: columns[scorer.name][i] for scorer in scorers} for i in range(count)]


class Watchdog:
    """Looks at each batch's metrics, those of all processes: stops a run without scores, warns of one without signal.

    Args:
        max_absent_share: above this share of absent samples a batch counts against PATIENCE, in [0, 1].
        reasoning: whether an answer has a think block.
    """

    def __init__(self, max_absent_share: float, reasoning: bool = True):
        self.max_absent_share, self.reasoning = max_absent_share, reasoning
        self._bad_batches = self._equal_batches = self._unreadable_batches = 0

    def check(self, metrics: Mapping[str, float], completions: Sequence[str]) -> None:
        """Look at one batch.

        Raises:
            ScoringError: in PATIENCE batches in a row `samples/absent` was too high, or no answer could be read; with
                what was missing, or why.
        """
        self._unreadable_batches = self._unreadable_batches + 1 if metrics.get("rewrites/unreadable") == 1 else 0
        if self._unreadable_batches >= PATIENCE:
            reasons = Counter(unreadable_because(text, self.reasoning) for text in completions)
            (reason, count), example = reasons.most_common(1)[0], " ".join(completions[0].split())
            raise ScoringError(
                f"no answer could be read for the {PATIENCE}rd batch in a row, so nothing is learnt; of the last "
                f"{len(completions)}, {count} are {reason}, one is {example[:120]!r}...{example[-60:]!r}: teach the "
                "form first (sft.py), or raise --max_completion_length if answers are cut"
            )
        share = metrics["samples/absent"]
        self._bad_batches = self._bad_batches + 1 if share > self.max_absent_share else 0
        if self._bad_batches >= PATIENCE:
            causes = {name.removeprefix("absent/"): metrics[name] for name in metrics if name.startswith("absent/")}
            listed = ", ".join(f"{cause} in {part:.0%}" for cause, part in causes.items() if part > 0)
            raise ScoringError(
                f"{share:.0%} of the samples have no score, above --max_absent_share {self.max_absent_share:.0%} for "
                f"the {PATIENCE}rd batch in a row; missing: {listed}: see the log above, "
                "repair the cause, then continue with --resume"
            )
        self._equal_batches = self._equal_batches + 1 if metrics.get("groups/equal") == 1 else 0
        if self._equal_batches == PATIENCE:
            advice = "raise --temperature if the rewrites in rollouts/ are alike, else give rewards that differ"
            if metrics.get("rewrites/unreadable", 0) >= 0.5:
                advice = "answers cannot be read: raise --max_completion_length if they are cut, or begin with sft.py"
            logger.warning(
                "%d batches in a row in which every group's members scored alike: nothing is being learnt; %s",
                PATIENCE,
                advice,
            )
