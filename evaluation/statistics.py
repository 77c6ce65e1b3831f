"""Means with paired bootstrap intervals: is one system better than another on these very prompts?

Prompts are resampled with replacement, each within its own category so that no category empties; a prompt brings all
its pictures and test points along, and every system gets the same draw. Intervals are the 2.5 % and 97.5 % percentiles
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). What was not judged is in no mean or draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.benchmark import Item, Verdict

DRAWS = 2000
OVERALL = "overall"
Overall = Callable[[Mapping[str, float]], float]
_Verdicts = Mapping[str, Sequence[Verdict]]  # item id -> a verdict per picture


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, and the number of scores (of OVERALL, of prompts) that it is made of."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Table:
    """What was measured: system -> category or OVERALL -> estimate, where anything was judged; and of each system but
    the first its difference from the first. `points` is category -> number of scores of the first system."""

    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    points: dict[str, int]


def measure(
    items: Sequence[Item], verdicts: Mapping[str, _Verdicts], categories: Sequence[str], overall: Overall
) -> Table:
    """All means, their intervals and their differences.

    Args:
        items: prompts.
        verdicts: system -> item id -> a verdict per picture, in the same order; every system has every item.
        categories: of the verdicts' parts, in the order of the table.
        overall: see `Benchmark.overall`.
    """

    def estimates(of: _Verdicts, other: _Verdicts, minus: bool = False) -> dict[str, Estimate]:
        """From what was judged of both systems; with `minus` of the difference between them."""
        sums_IC, counts_IC = _totals(items, of, other, categories)
        judged_I = counts_IC.any(axis=1)
        weights_DI = np.vstack([np.ones(len(items)), _resampled(items, judged_I, np.random.default_rng(0))])
        values_DC = _values(weights_DI, sums_IC, counts_IC, categories, overall)
        if minus:
            values_DC -= _values(weights_DI, *_totals(items, other, of, categories), categories, overall)
        columns = zip((*categories, OVERALL), values_DC.T, (*counts_IC.sum(axis=0), judged_I.sum()), strict=True)
        return {name: _estimate(values_D, int(n)) for name, values_D, n in columns if n}

    (baseline, first), *others = verdicts.items()
    parts = (verdict.parts for of in verdicts.values() for some in of.values() for verdict in some)
    asked = {item.category for item in items}.union(*parts)
    scores = {system: estimates(of, of) for system, of in verdicts.items()}
    numbers = {name: one.n for name, one in scores[baseline].items()}
    points = {name: numbers.get(name, 0) for name in categories if name in asked}
    return Table(scores, {system: estimates(of, first, minus=True) for system, of in others}, points)


def _totals(
    items: Sequence[Item], verdicts: _Verdicts, other: _Verdicts, categories: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the scores that `other` has too, (I, C) each."""
    column = {name: i for i, name in enumerate(categories)}
    sums, counts = np.zeros((2, len(items), len(categories)))
    for i, item in enumerate(items):
        for verdict, twin in zip(verdicts[item.id], other[item.id], strict=True):
            for name, scores in verdict.parts.items():
                pairs = zip(scores, twin.parts.get(name, ()), strict=False)
                both = [score for score, its in pairs if score is not None and its is not None]
                if both:
                    sums[i, column[name]] += sum(both)
                    counts[i, column[name]] += len(both)
    return sums, counts


def _resampled(items: Sequence[Item], judged_I: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS, I): how often each judged item is in each draw."""
    weights = np.zeros((DRAWS, len(items)))
    groups: dict[str, list[int]] = {}
    for i in np.flatnonzero(judged_I):
        groups.setdefault(items[i].category, []).append(i)
    for members in groups.values():
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=DRAWS)
    return weights


def _values(
    weights_DI: np.ndarray, sums_IC: np.ndarray, counts_IC: np.ndarray, categories: Sequence[str], overall: Overall
) -> np.ndarray:
    """(draws, C + 1): each category's mean and the overall number, NaN where a draw has nothing of it."""
    totals, points = weights_DI @ sums_IC, weights_DI @ counts_IC
    means = np.divide(totals, points, out=np.full_like(totals, np.nan), where=points > 0)
    known = [{name: m for name, m in zip(categories, row, strict=True) if not np.isnan(m)} for row in means]
    headline = [overall(row) if row else np.nan for row in known]
    return np.column_stack([means, headline])


def _estimate(draws: np.ndarray, n: int) -> Estimate:
    """The first is the measurement, the others are resampled."""
    low, high = np.nanquantile(draws[1:], (0.025, 0.975))
    return Estimate(float(draws[0]), float(low), float(high), n)
