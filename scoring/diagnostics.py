"""What a batch of rollouts says beside its reward: do the rewards speak, do they agree, and is the policy cheating?

Pure functions of the rows that `rollouts/step_NNNNNN.jsonl` holds, those of all processes, so every rank computes the
same numbers. An absent score is left out of every mean, never counted as zero; a metric that nothing is known for is
not in the result at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from data.text import fold

Row = Mapping[str, Any]


def diagnose(rows: Sequence[Row], group: int, max_tokens: int) -> dict[str, float]:
    """All metrics of one generation batch.

    Args:
        rows: rollouts with `prompt`, `rewrite`, `parts`, `held_out`, `total` and `tokens`; whole groups, adjacent.
        group: rows of a group.
        max_tokens: what the renderer reads of a rewrite, in its own tokens.
    """
    return {
        "samples/absent": absent(rows),
        "rewrites/unreadable": float(np.mean([row["rewrite"] is None for row in rows])),
        **rewrites([row for row in rows if row["rewrite"] is not None], max_tokens),
        **equal_groups(rows, group),
        **rewards(rows, group),
        **held_out(rows, group),
    }


def of_pictures(rows: Sequence[Row], group: int) -> dict[str, float]:
    """All metrics of a rollout without rewrites, with the means that TRL would log."""
    totals = [row["total"] for row in rows if row["total"] is not None]
    means = {"reward": float(np.mean(totals))} if totals else {}
    for name in rows[0]["parts"]:
        known = [row["parts"][name] for row in rows if row["parts"][name] is not None]
        means |= {f"rewards/{name}/mean": float(np.mean(known))} if known else {}
    found = {**equal_groups(rows, group), **rewards(rows, group), **held_out(rows, group)}
    return {"samples/absent": absent(rows), **means, **found}


def absent(rows: Sequence[Row]) -> float:
    """Share without a score of the rollouts that could be read, of all where none could.

    What could not be read has its low score without asking anybody: counted in, a policy that often fails to answer
    would hide a judge that always does.
    """
    asked = [row for row in rows if row["rewrite"] is not None] or rows
    return float(np.mean([row["total"] is None for row in asked]))


def rewrites(readable: Sequence[Row], max_tokens: int) -> dict[str, float]:
    """How long, how far from the user's words, and how varied the rewrites are; {} if none could be read."""
    if not readable:
        return {}
    lengths = [row["tokens"] for row in readable]
    texts = [(fold(row["rewrite"]).split(), fold(row["prompt"]).split()) for row in readable]
    return {
        "rewrites/tokens": float(np.mean(lengths)),
        "rewrites/overflow": float(np.mean([length > max_tokens for length in lengths])),
        "rewrites/copied": float(np.mean([rewrite == prompt for rewrite, prompt in texts])),
        "rewrites/edit_distance": float(np.mean([edit_distance(*pair) for pair in texts])),
        "rewrites/distinct_1": distinct([rewrite for rewrite, _ in texts], 1),
        "rewrites/distinct_2": distinct([rewrite for rewrite, _ in texts], 2),
    }


def equal_groups(rows: Sequence[Row], group: int) -> dict[str, float]:
    """Share of the groups with two totals or more whose totals are all equal, and so teach nothing; {} if none has."""
    totals_PG = _scores([row["total"] for row in rows], group)
    known = [row[~np.isnan(row)] for row in totals_PG]
    equal = [np.ptp(row) < 1e-6 for row in known if len(row) > 1]
    return {"groups/equal": float(np.mean(equal))} if equal else {}


def rewards(rows: Sequence[Row], group: int) -> dict[str, float]:
    """Of each reward, the spread within groups and the share of groups without any; of each pair, the correlation; and
    each reward's agreement, the mean of its correlations.

    Correlations are of scores less their group's mean: what two rewards say of the members of a group, not of how easy
    its prompt is.
    """
    found, centred = {}, {}
    for name in rows[0]["parts"]:
        scores_PG = _scores([row["parts"][name] for row in rows], group)
        deviations_PG = scores_PG - _row_means(scores_PG)
        found |= _spread(f"rewards/{name}", deviations_PG)
        centred[name] = deviations_PG.ravel()
    agreeing: dict[str, list[float]] = {}
    for one, other in combinations(centred, 2):
        if (value := correlation(centred[one], centred[other])) is not None:
            found[f"correlation/{one}~{other}"] = value
            for name in (one, other):
                agreeing.setdefault(name, []).append(value)
    return found | {f"agreement/{name}": float(np.mean(values)) for name, values in agreeing.items()}


def held_out(rows: Sequence[Row], group: int) -> dict[str, float]:
    """Mean, and correlation within groups with the total, of each scorer that the policy is not trained on."""
    found = {}
    total_PG = _scores([row["total"] for row in rows], group)
    for name in rows[0]["held_out"]:
        scores_PG = _scores([row["held_out"][name] for row in rows], group)
        missing = [row["held_out"][name] is None for row in rows if row["rewrite"] is not None]
        if missing:  # what could not be read was not drawn, and is no failure of the scorer
            found[f"held_out/{name}/absent"] = float(np.mean(missing))
        if not np.isnan(scores_PG).all():
            found[f"held_out/{name}/mean"] = float(np.nanmean(scores_PG))
        value = correlation((scores_PG - _row_means(scores_PG)).ravel(), (total_PG - _row_means(total_PG)).ravel())
        if value is not None:
            found[f"held_out/{name}/correlation"] = value
    return found


def means(seen: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each metric's mean over the passes in which it was seen."""
    return {name: float(np.mean(values)) for name, values in seen.items()}


def mean_of_processes(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over the processes that have it."""
    names = dict.fromkeys(name for metrics in measured for name in metrics)
    return {name: float(np.mean([metrics[name] for metrics in measured if name in metrics])) for name in names}


def edit_distance(one: Sequence[str], other: Sequence[str]) -> float:
    """Words to insert, delete or replace to turn one text into the other, over the longer one's length: 0 to 1."""
    distances = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        row = [i]
        for j, candidate in enumerate(other, 1):
            row.append(min(row[-1] + 1, distances[j] + 1, distances[j - 1] + (word != candidate)))
        distances = row
    return distances[-1] / max(len(one), len(other), 1)


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams (n = 1 or 2) of all texts over all of them: near 0 where the policy repeats itself."""
    grams = [gram for text in texts for gram in (text if n == 1 else pairwise(text))]
    return len(set(grams)) / max(len(grams), 1)


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's r over the places where both are known; None if fewer than three are, or one of them is constant."""
    known = ~np.isnan(one) & ~np.isnan(other)
    one, other = one[known], other[known]
    if len(one) < 3 or min(np.ptp(one), np.ptp(other)) < 1e-12:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _scores(values: Sequence[float | None], group: int) -> np.ndarray:
    """(P, G) with NaN where a score is absent."""
    return np.array([np.nan if value is None else value for value in values], dtype=float).reshape(-1, group)


def _row_means(scores_PG: np.ndarray) -> np.ndarray:
    """(P, 1) mean of what is known in each row; NaN where nothing is."""
    known = ~np.isnan(scores_PG)
    counts = known.sum(axis=1, keepdims=True)
    sums = np.where(known, scores_PG, 0).sum(axis=1, keepdims=True)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _spread(name: str, deviations_PG: np.ndarray) -> dict[str, float]:
    """Mean standard deviation within a group, and the share of groups with none, of groups with two known scores."""
    groups = [row[~np.isnan(row)] for row in deviations_PG]
    spreads = np.array([row.std(ddof=1) for row in groups if len(row) > 1])
    if not len(spreads):
        return {}
    return {f"{name}/spread": float(spreads.mean()), f"{name}/zero_spread": float((spreads < 1e-6).mean())}
