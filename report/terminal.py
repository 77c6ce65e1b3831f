"""Plain-text pictures of a run for a terminal: a sparkline of a metric and the table of oracle accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

POLICIES = {
    "raw": "raw prompt",
    "start": "policy before",
    "trained": "policy after",
    "written": "written by the world",
}
CATEGORIES = ("single", "two", "colors", "counting", "position", "attr")
BARS = "▁▂▃▄▅▆▇█"


def number(value: object) -> float | None:
    """`value` as a finite float; None for null, NaN, infinity and whatever is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def thin(values: Sequence[float | None], most: int) -> list[float | None]:
    """At most `most` values: means of neighbours, absent ones left out; None where all neighbours are absent."""
    width = max(1, math.ceil(len(values) / most))
    chunks = [[v for v in values[i : i + width] if v is not None] for i in range(0, len(values), width)]
    return [sum(chunk) / len(chunk) if chunk else None for chunk in chunks]


def sparkline(values: Sequence[float | None], width: int = 60) -> str:
    """One line of at most `width` bars from the lowest to the highest value; a blank where a value is absent."""
    heights = thin([number(value) for value in values], width)
    known = [height for height in heights if height is not None]
    if not known:
        return " " * len(heights)
    low, span = min(known), max(known) - min(known)
    top = len(BARS) - 1
    return "".join(
        " " if height is None else BARS[round(top * (height - low) / span) if span else top // 2] for height in heights
    )


def oracle_table(summary: dict) -> str:
    """Oracle accuracy as aligned columns, from the `summary.json` of a run; "-" where it was not measured."""
    oracle = summary.get("oracle") or {}
    rows = [["oracle accuracy", "mean ± 95 %", *CATEGORIES]]
    for name, label in POLICIES.items():
        scores = oracle.get(name) or {}
        rows.append([label, _mean(scores), *(_decimals(scores.get(category), 2) for category in CATEGORIES)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    if number(summary.get("gap_closed")) is not None:
        lines += ["", f"gap closed, (after - raw) / (written - raw): {summary['gap_closed']:.2f}"]
    return "\n".join(lines)


def _mean(scores: dict) -> str:
    mean, interval = _decimals(scores.get("mean"), 3), [number(end) for end in scores.get("ci95") or ()]
    if len(interval) != 2 or None in interval:
        return mean
    return f"{mean} ± {(interval[1] - interval[0]) / 2:.3f}"


def _decimals(value: object, places: int) -> str:
    finite = number(value)
    return "-" if finite is None else f"{finite:.{places}f}"
