"""Rollouts as rows of `rollouts/step_NNNNNN.jsonl`, the same from every trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from run.folder import RunFolder
from scoring.judge import Scored


def rollout_rows(
    scored: Sequence[Scored], advantages: Sequence[float], weights: Sequence[float], folder: RunFolder, room: int
) -> list[dict[str, Any]]:
    """One row a rollout; the pictures of the first ones are kept in `folder`, `room` of them at most.

    Args:
        advantages: of each rollout, as it is trained on.
        weights: of each reward, in the order of `Scored.parts`.
    """
    rows = []
    for one, advantage in zip(scored, advantages, strict=True):
        kept = one.sample.images if room >= len(one.sample.images) else ()
        room -= len(kept)
        files = [None if image is None else folder.save_image(image) for image in kept]
        rows.append(_row(one, advantage, weights, files or [None] * len(one.sample.images)))
    return rows


def _row(scored: Scored, advantage: float, weights: Sequence[float], images: list[str | None]) -> dict[str, Any]:
    prompt, total = scored.sample.prompt, None
    if not scored.absent:
        total = sum(weight * part for weight, part in zip(weights, scored.parts.values(), strict=True))
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "task": prompt.task,
        "completion": scored.sample.completion,
        "reasoning": scored.reasoning,
        "rewrite": scored.sample.rewrite,
        "seeds": list(scored.seeds),
        "tokens": scored.tokens,
        "parts": scored.parts,
        "held_out": scored.held_out,
        "total": total,
        "advantage": advantage,
        "images": images,
    }
