"""Plain text for any terminal: a sparkline of a metric, a table of scores, and no text that cannot be printed."""

from __future__ import annotations

import codecs
import io
import math
import sys
from collections.abc import Sequence

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
NEAREST = str.maketrans(
    {"±": "+-", "→": "->", "−": "-", "×": "x", "–": "-", "Δ": "change of", "…": "...", "‘": "'", "’": "'"}
)


def print_anywhere() -> None:
    """Let stdout and stderr print every text: what their encoding lacks becomes like ASCII, or backslash and hex."""
    codecs.register_error("nearest", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none, and takes every text
            stream.reconfigure(errors="nearest")


def _nearest(error: UnicodeError) -> tuple[str, int]:
    text = error.object[error.start : error.end].translate(NEAREST)
    return text.encode("ascii", "backslashreplace").decode(), error.end


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
    top, encoding = len(BARS) - 1, sys.stdout.encoding or "utf-8"
    bars = BARS if BARS.encode(encoding, "ignore").decode(encoding) == BARS else ASCII_BARS
    return "".join(
        " " if height is None else bars[round(top * (height - low) / span) if span else top // 2] for height in heights
    )


def text_table(table: dict) -> str:
    """The table of a `summary.json` (see report/page.py) as aligned columns; "-" where nothing was measured."""
    rows = [[table["title"], "mean ± 95 %", *table["columns"]]]
    for row in table["rows"]:
        mean = "-" if row["mean"] is None else f"{row['mean']:.3f} ± {(row['ci95'][1] - row['ci95'][0]) / 2:.3f}"
        rows.append([row["label"], mean, *("-" if cell is None else f"{cell:.2f}" for cell in row["cells"])])
    return "\n".join(aligned(rows, ruled=(0,)))


def aligned(rows: Sequence[Sequence[str]], ruled: Sequence[int] = ()) -> list[str]:
    """Columns padded to their widest cell, the first to the left; a rule under each row in `ruled`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        lines.append("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())
        if i in ruled:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines
