"""Advantages of a plain GRPO loop: a score less its group's mean, over a spread. `r1_prompter` keeps TRL's own.

Source: GRPO (arXiv 2402.03300) divides by the group's standard deviation; Dr. GRPO (arXiv 2503.20783) divides by
nothing; REINFORCE++ (arXiv 2501.03262) by the batch's. All as TRL's `--scale_rewards`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-4  # as TRL's


def advantages(totals: Sequence[float | None], group: int, scale: str = "group") -> list[float]:
    """One advantage for each total; whole groups, adjacent.

    Args:
        totals: weighted rewards, None for an absent member: it gets 0 and is left out of mean and spread.
        group: members of a group.
        scale: by which standard deviation an advantage is divided: its "group"'s, the "batch"'s, or "none".

    Raises:
        ValueError: an unknown `scale`.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale {scale!r}: give group, batch or none")
    totals_PG = np.array([np.nan if total is None else total for total in totals], dtype=float).reshape(-1, group)
    known_PG = ~np.isnan(totals_PG)
    counts_P1 = np.maximum(known_PG.sum(axis=1, keepdims=True), 1)
    means_P1 = np.where(known_PG, totals_PG, 0).sum(axis=1, keepdims=True) / counts_P1
    centred_PG = np.where(known_PG, totals_PG - means_P1, 0)
    if scale == "group":
        centred_PG = centred_PG / (
            np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(counts_P1 - 1, 1)) + EPSILON
        )
    elif scale == "batch" and known_PG.sum() > 1:
        centred_PG = centred_PG / (totals_PG[known_PG].std(ddof=1) + EPSILON)
    return centred_PG.ravel().tolist()
