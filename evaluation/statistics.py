"""Means with paired bootstrap intervals: is one system better than another on these very prompts?

Prompts are resampled with replacement, each within its own category so that no category empties; a prompt brings all
its pictures and test points along, and every system gets the same draw. Intervals are the 2.5 % and 97.5 % percentiles
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.benchmark import Item, Verdict

DRAWS = 2000
OVERALL = "overall"
Overall = Callable[[Mapping[str, float], Mapping[str, int]], float]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_zero(self) -> bool:
        """Whether the interval contains 0: of a difference, none was seen."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Table:
    """What was measured: system -> category or OVERALL -> estimate; and of each system but the first its difference
    from the first. `points` is category -> number of scores of the first system."""

    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    points: dict[str, int]


def measure(
    items: Sequence[Item],
    verdicts: Mapping[str, Mapping[str, Sequence[Verdict]]],
    categories: Sequence[str],
    overall: Overall,
    seed: int = 0,
) -> Table:
    """All means, their intervals and their differences.

    Args:
        items: prompts.
        verdicts: system -> item id -> a verdict per picture; every system has every item. A part of None counts 0.
        categories: of the verdicts' parts, in the order of the table.
        overall: see `Benchmark.overall`.
        seed: of the resampling.
    """
    sums, counts = zip(*(_totals(items, of, categories) for of in verdicts.values()), strict=True)  # each (I, C)
    weights_DI = np.vstack([np.ones(len(items)), _resampled(items, np.random.default_rng(seed))])
    values = [_values(weights_DI, s, c, categories, overall) for s, c in zip(sums, counts, strict=True)]
    names = [name for i, name in enumerate(categories) if counts[0][:, i].sum()]
    systems = list(verdicts)

    def estimates(values_DC: np.ndarray) -> dict[str, Estimate]:
        columns = dict(zip((*categories, OVERALL), values_DC.T, strict=True))
        return {name: _estimate(columns[name]) for name in (*names, OVERALL)}

    return Table(
        {system: estimates(value) for system, value in zip(systems, values, strict=True)},
        {system: estimates(value - values[0]) for system, value in list(zip(systems, values, strict=True))[1:]},
        {name: int(counts[0][:, i].sum()) for i, name in enumerate(categories) if name in names},
    )


def _totals(
    items: Sequence[Item], verdicts: Mapping[str, Sequence[Verdict]], categories: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of scores, (I, C) each."""
    column = {name: i for i, name in enumerate(categories)}
    sums, counts = np.zeros((len(items), len(categories))), np.zeros((len(items), len(categories)))
    for i, item in enumerate(items):
        for verdict in verdicts[item.id]:
            for name, scores in verdict.parts.items():
                sums[i, column[name]] += sum(score or 0.0 for score in scores)
                counts[i, column[name]] += len(scores)
    return sums, counts


def _resampled(items: Sequence[Item], rng: np.random.Generator) -> np.ndarray:
    """(DRAWS, I): how often each item is in each draw."""
    weights = np.zeros((DRAWS, len(items)))
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.category, []).append(i)
    for members in groups.values():
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=DRAWS)
    return weights


def _values(
    weights_DI: np.ndarray, sums_IC: np.ndarray, counts_IC: np.ndarray, categories: Sequence[str], overall: Overall
) -> np.ndarray:
    """(draws, C + 1): each category's mean, NaN where a draw has none of it, and the overall number."""
    totals, points = weights_DI @ sums_IC, weights_DI @ counts_IC
    means = np.divide(totals, points, out=np.full_like(totals, np.nan), where=points > 0)
    headline = [
        overall(
            {name: m for name, m, n in zip(categories, row, number, strict=True) if n},
            {name: int(n) for name, n in zip(categories, number, strict=True) if n},
        )
        for row, number in zip(means, points, strict=True)
    ]
    return np.column_stack([means, headline])


def _estimate(draws: np.ndarray) -> Estimate:
    """The first is the measurement, the others are resampled."""
    low, high = np.nanquantile(draws[1:], (0.025, 0.975))
    return Estimate(float(draws[0]), float(low), float(high))
