"""Advantages of a plain GRPO loop: a score less its group's mean, over a spread. `r1_prompter` keeps TRL's own.

Sources: GRPO (arXiv 2402.03300) divides by the group's standard deviation; GDPO (arXiv 2601.05242) does so for each
reward, and by the batch's after the sum; Pref-GRPO (arXiv 2508.20751) mixes so. Ours is the floor: a tiny spread
within a group is noise, and dividing by it makes noise as loud as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

EPSILON = 1e-4  # as TRL's


class Mixed(NamedTuple):
    """One advantage for each sample, and by reward the share of groups in which nothing but chance was seen."""

    advantages: list[float]
    by_chance: dict[str, float]


def mix(
    columns: Mapping[str, Sequence[float | None]],
    weights: Sequence[float],
    group: int,
    *,
    floor: float = 0.0,
    chance: Mapping[str, float] | None = None,
) -> Mixed:
    """Each reward normalised within its groups, then weighted and summed, then divided by the batch's spread.

    Args:
        columns: reward name -> its scores, None where absent; whole groups, adjacent.
        weights: of the rewards in that order.
        floor: a group's spread counts as no less than this share of the batch's, of scores less their group's mean.
        chance: reward name -> the spread within a group of scores given at random: what is not above it teaches
            nothing.
    """
    total_PG, by_chance = 0, {}
    known = max(1, *(len(scores) - list(scores).count(None) for scores in columns.values()))
    for weight, (name, scores) in zip(weights, columns.items(), strict=True):
        centred_PG, spread_P1 = _centred(scores, group)
        varied_P1 = spread_P1 > EPSILON
        if chance and name in chance and varied_P1.any():
            heard_P1 = spread_P1 > chance[name]
            by_chance[name] = 1 - float(heard_P1[varied_P1].mean())
            centred_PG = centred_PG * heard_P1
        least = floor * math.sqrt((centred_PG**2).sum() / known)  # deviations have the mean 0, absent ones are 0
        total_PG = total_PG + weight * centred_PG / (np.maximum(spread_P1, least) + EPSILON)
    return Mixed((total_PG / (math.sqrt((total_PG**2).sum() / known) + EPSILON)).ravel().tolist(), by_chance)


def advantages(totals: Sequence[float | None], group: int) -> list[float]:
    """One advantage for each total, in units of its group's spread; whole groups, adjacent.

    An absent member (None) gets 0 and is left out of mean and spread.
    """
    centred_PG, spread_P1 = _centred(totals, group)
    return (centred_PG / (spread_P1 + EPSILON)).ravel().tolist()


def spread_by_chance(group: int, partners: int) -> float:
    """The spread of win rates within a group whose winners are drawn by lot, each member meeting so many others."""
    of_one = 0.25 / partners  # variance of a mean of fair coins; the mean of a group is always one half
    return math.sqrt(of_one * group / (group - 1))


def _centred(scores: Sequence[float | None], group: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, G) scores less their group's mean, 0 where absent; (P, 1) standard deviations of groups."""
    scores_PG = np.array([np.nan if score is None else score for score in scores], dtype=float).reshape(-1, group)
    known_PG = ~np.isnan(scores_PG)
    counts_P1 = np.maximum(known_PG.sum(axis=1, keepdims=True), 1)
    means_P1 = np.where(known_PG, scores_PG, 0).sum(axis=1, keepdims=True) / counts_P1
    centred_PG = np.where(known_PG, scores_PG - means_P1, 0)
    return centred_PG, np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(counts_P1 - 1, 1))
