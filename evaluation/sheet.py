"""One picture of an evaluation: a prompt of each category, as every system drew it, judged right or not."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from evaluation.pipeline import Row

MOST = 8  # categories shown
RIGHT, WRONG, UNJUDGED = "#2e9e48", "#d62828", "#999999"


def draw_sheet(rows: Mapping[str, Sequence[Row]], out: Path) -> Path:
    """Write OUT/examples.png: the first prompt of each category, whatever came of it, first sample.

    A green frame: all that was asked of the picture was found; red: not all; grey: it could not be judged.
    """
    first: dict[str, str] = {}
    for row in next(iter(rows.values())):
        first.setdefault(row["category"], row["id"])
    shown = list(first.items())[:MOST]
    figure = Figure(figsize=(2.1 * len(shown), 2.5 * len(rows)), layout="constrained")
    cells = figure.subplots(len(rows), len(shown), squeeze=False)
    for line, (system, of) in zip(cells, rows.items(), strict=True):
        line[0].set_ylabel(system, fontsize=10)
        known = {row["id"]: row for row in of if row["sample"] == 0}
        for cell, (_, id) in zip(line, shown, strict=True):
            _fill(cell, known[id], out)
    for cell, (category, _) in zip(cells[0], shown, strict=True):
        cell.set_title(category.replace("_", " "), fontsize=10, fontweight="bold")
    figure.savefig(out / "examples.png", dpi=110)
    return out / "examples.png"


def _fill(cell, row: Row, out: Path) -> None:
    if row["image"] is not None:
        cell.imshow(Image.open(out / row["image"]), interpolation="lanczos")
    cell.set(xticks=[], yticks=[])
    cell.set_xlabel(textwrap.fill(textwrap.shorten(row["final_prompt"], 110), 26), fontsize=8)
    scores = [score for scores in row["parts"].values() for score in scores]
    colour = UNJUDGED if None in scores else RIGHT if min(scores) >= 0.5 else WRONG
    for side in cell.spines.values():
        side.set(color=colour, linewidth=2.5)
