"""One picture of what was drawn: a column a category, a row a system, a frame for what was judged of each."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from evaluation.pipeline import Row, finished

MOST = 8  # categories shown
FRAMES = {True: "#2e9e48", False: "#d62828", None: "#999999"}


@dataclass(frozen=True)
class Cell:
    """A picture (None: there is none), the text that it was drawn from, and whether it is right; None: not judged."""

    picture: Path | None
    text: str
    right: bool | None


def contact_sheet(path: Path, titles: Sequence[str], lines: Mapping[str, Sequence[Cell]]) -> None:
    """Write a PNG, a labelled line of cells per system; green frames are right, red ones wrong, grey not judged."""
    figure = Figure(figsize=(2.1 * len(titles), 2.4 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(titles), squeeze=False)
    for row, (label, cells) in zip(axes, lines.items(), strict=True):
        row[0].set_ylabel(label, fontsize=10)
        for place, cell in zip(row, cells, strict=True):
            if cell.picture is not None:
                place.imshow(Image.open(cell.picture), interpolation="lanczos")
            place.set(xticks=[], yticks=[])
            place.set_xlabel(textwrap.fill(textwrap.shorten(cell.text, 110), 26), fontsize=8)
            for side in place.spines.values():
                side.set(color=FRAMES[cell.right], linewidth=2.5)
    for place, title in zip(axes[0], titles, strict=True):
        place.set_title(title.replace("_", " "), fontsize=10, fontweight="bold")
    figure.savefig(path, dpi=110)


def draw_examples(rows: Mapping[str, Sequence[Row]], out: Path) -> Path:
    """Write OUT/examples.png: the first prompt of each category, whatever came of it, first sample of each system."""
    first: dict[str, str] = {}
    for row in next(iter(rows.values())):
        first.setdefault(row["category"], row["id"])
    shown = dict(list(first.items())[:MOST])
    lines = {}
    for system, of in rows.items():
        known = {row["id"]: row for row in of if row["sample"] == 0}
        lines[system] = [_cell(known[id], out) for id in shown.values()]
    contact_sheet(out / "examples.png", list(shown), lines)
    return out / "examples.png"


def _cell(row: Row, out: Path) -> Cell:
    scores = [score for scores in row["parts"].values() for score in scores]
    right = min(scores) >= 0.5 if finished(row) else None
    return Cell(out / row["image"] if row["image"] else None, row["final_prompt"], right)
