"""Plain-text pictures of a run for a terminal: a sparkline of a metric and a table of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    top = len(BARS) - 1
    return "".join(
        " " if height is None else BARS[round(top * (height - low) / span) if span else top // 2] for height in heights
    )


def text_table(table: dict) -> str:
    """The table of a `summary.json` (see report/page.py) as aligned columns; "-" where nothing was measured."""
    rows = [[table["title"], "mean ± 95 %", *table["columns"]]]
    for row in table["rows"]:
        mean = "-" if row["mean"] is None else f"{row['mean']:.3f} ± {(row['ci95'][1] - row['ci95'][0]) / 2:.3f}"
        rows.append([row["label"], mean, *("-" if cell is None else f"{cell:.2f}" for cell in row["cells"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
