"""Rewards that read the answer and no picture: could it be read at all, and is it of a sane length?

They judge the form of the rewrite only; what it says is judged by what it draws. Source: RePrompt, arXiv 2505.17540,
with 0 in place of its -1 and a slope in place of its step, so that a slightly long rewrite is told which way to go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from errors import UserError
from interfaces import Reward, Sample


class Format(Reward):
    """1.0 if the answer could be read (`rewrite is not None`), else 0.0."""

    name = "format"
    range = (0.0, 1.0)
    needs_images = False

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score per sample, never None."""
        return [0.0 if sample.rewrite is None else 1.0 for sample in samples]


class Length(Reward):
    """1.0 for a rewrite of `low` to `high` tokens; linear to 0 at no tokens and at twice `high`; unreadable is 0.0.

    Args:
        count_tokens: length of a text in the renderer's own tokens, before truncation.
        low: fewest tokens with the full score, at least 1.
        high: most tokens with the full score, at most `max_tokens`.
        max_tokens: tokens of a text that the renderer reads.

    Raises:
        UserError: unless 1 <= low <= high <= max_tokens.
    """

    name = "length"
    range = (0.0, 1.0)
    needs_images = False

    def __init__(self, count_tokens: Callable[[str], int], low: int, high: int, max_tokens: int):
        if not 1 <= low <= high:
            raise UserError(f"length_low {low} and length_high {high} must satisfy 1 <= low <= high")
        if high > max_tokens:
            raise UserError(f"length_high {high} rewards text that the renderer cuts: it reads {max_tokens} tokens")
        self.count_tokens, self.low, self.high = count_tokens, low, high

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score per sample, never None."""
        return [0.0 if sample.rewrite is None else self._score(sample.rewrite) for sample in samples]

    def _score(self, rewrite: str) -> float:
        tokens = self.count_tokens(rewrite)
        return max(0.0, min(1.0, tokens / self.low, 2 - tokens / self.high))
