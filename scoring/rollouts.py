"""Completions -> rollouts: what was asked, answered, drawn and scored; and their rows in the run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import gather_object

from errors import ScoringError, UserError
from interfaces import Prompt, Reward, Sample
from prompting import parse
from run.folder import RunFolder
from run.signals import Leave, leaving
from scoring.drawing import Answered, Drawer
from scoring.judge import judge

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# What a renderer or reward may raise because of its input or machine; anything else is a bug and ends at once.
FAILURES = (UserError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Rollout:
    """One rollout with its scores.

    Attributes:
        sample: what was asked, answered and drawn.
        reasoning: the think block, None if the answer could not be read.
        seeds: noise of each image; () if nothing was drawn.
        tokens: length of the rewrite in the renderer's tokens, None if there is none.
        parts: reward name -> score, all None if the sample is absent.
        held_out: scorer name -> score that nothing is trained on; None only where that scorer has none.
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

    def total(self, weights: Sequence[float]) -> float | None:
        """The weighted sum of its parts, None if it is absent; one weight for each part, in their order."""
        return weighted_total(self.parts, weights)


def weighted_total(parts: Mapping[str, float | None], weights: Sequence[float]) -> float | None:
    """The sum of weight x score, None if a score is absent; one weight for each, in their order."""
    if None in parts.values():
        return None
    return sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))


class Scorer:
    """Reads, draws and scores the completions of one process; deliberately not an `nn.Module`, which TRL would train.

    Args:
        drawer: draws the rewrites.
        rewards: in the order of their weights, with distinct names.
        prompts: `Prompt.id` -> prompt.
        held_out: scorers that are asked and logged but feed no advantage.
        reasoning: whether an answer has a think block.
        enter: called with the name of each phase as it starts ("render", "score hps", "train") and its optimiser step.

    Attributes:
        metrics: of the last batch.
    """

    def __init__(
        self,
        drawer: Drawer,
        rewards: Sequence[Reward],
        prompts: Mapping[str, Prompt],
        *,
        held_out: Sequence[Reward] = (),
        reasoning: bool = True,
        enter: Callable[[str, int], None] = lambda phase, step: None,
    ):
        self.drawer, self.rewards, self.held_out, self.prompts = drawer, list(rewards), list(held_out), prompts
        self.reasoning, self.enter = reasoning, enter
        self.metrics: dict[str, float] = {}

    def score_together(self, completions: Sequence[str], prompt_ids: Sequence[str], step: int) -> list[Rollout]:
        """`score`, on every process; raises as `together`."""
        rollouts = together(lambda: self.score(completions, prompt_ids, step), step)
        self.enter("train", step)
        return rollouts

    def score(self, completions: Sequence[str], prompt_ids: Sequence[str], step: int) -> list[Rollout]:
        """Read, draw and score one process's batch of whole groups; also fills `metrics`.

        Raises:
            ScoringError: a group is not one prompt's, or the renderer or a reward broke its contract.
            Leave: this process was told to leave.
        """
        readings = [parse(completion, self.reasoning) for completion in completions]
        answers = [
            Answered(self.prompts[id], completion, reading.rewrite if reading else None)
            for id, completion, reading in zip(prompt_ids, completions, readings, strict=True)
        ]
        self.enter("render", step)
        drawn = self.drawer(answers, [*self.rewards, *self.held_out], step)
        started = time.perf_counter()
        judged = judge(
            drawn.samples,
            self.rewards,
            self.held_out,
            group=self.drawer.group,
            on_phase=lambda phase: self.enter(phase, step),
        )
        self.metrics = {**drawn.metrics, "seconds/score": time.perf_counter() - started, **judged.metrics}
        count_tokens = self.drawer.renderer.count_tokens
        return [
            Rollout(
                sample,
                reading.reasoning if reading else None,
                seeds,
                count_tokens(reading.rewrite) if reading else None,
                parts,
                held_out,
            )
            for sample, reading, seeds, parts, held_out in zip(
                drawn.samples, readings, drawn.seeds, judged.parts, judged.held_out, strict=True
            )
        ]


def together(work: Callable[[], Result], step: int) -> Result:
    """The result of `work`, which draws and scores; if a process fails or was told to leave, all raise the same.

    Raises:
        Leave: a process was told to leave; the batch is given up.
        ScoringError: on a process the renderer or a reward failed, with that process's reason.
    """
    result, failure = None, ""
    try:
        result = work()
    except Leave:
        logger.info("told to leave: this batch of step %d is given up", step)
    except ScoringError as error:
        failure = str(error)
    except FAILURES as error:
        logger.exception("step %d could not be scored", step)
        failure = f"scoring failed ({type(error).__name__}: {error}); see the log above, then --resume"
    everywhere = gather_object([(failure, leaving())])
    failures = [f"process {rank}: {reason}" for rank, (reason, _) in enumerate(everywhere) if reason]
    if failures:
        raise ScoringError("; ".join(failures) if len(everywhere) > 1 else failure)
    if code := max(code for _, code in everywhere):
        raise Leave(code)
    return result


def rollout_rows(
    rollouts: Sequence[Rollout], advantages: Sequence[float], weights: Sequence[float], folder: RunFolder, room: int
) -> list[dict[str, Any]]:
    """One row a rollout; the images of the first ones are kept in `folder`, `room` of them at most.

    Args:
        advantages: of each rollout, as it is trained on.
        weights: of each reward, in the order of `Rollout.parts`.
    """
    rows = []
    for one, advantage in zip(rollouts, advantages, strict=True):
        kept = one.sample.images if room >= len(one.sample.images) else ()
        room -= len(kept)
        files = [None if image is None else folder.save_image(image) for image in kept]
        prompt = one.sample.prompt
        rows.append(
            {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "task": prompt.task,
                "completion": one.sample.completion,
                "reasoning": one.reasoning,
                "rewrite": one.sample.rewrite,
                "seeds": list(one.seeds),
                "tokens": one.tokens,
                "parts": one.parts,
                "held_out": one.held_out,
                "total": one.total(weights),
                "advantage": advantage,
                "images": files or [None] * len(one.sample.images),
            }
        )
    return rows
