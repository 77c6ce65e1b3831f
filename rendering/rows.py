"""What every renderer does with the rows of a call, and where it says why a row has no picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from interfaces import OnImage

Row = tuple[str, int]  # text, seed
Outcome = Image.Image | str  # a picture, or the reason why there is none
OnRow = Callable[[Row, Image.Image], None]


def draw_distinct(
    texts: Sequence[str],
    seeds: Sequence[int],
    on_image: OnImage | None,
    failures: Counter[str],
    draw: Callable[[list[Row], OnRow], Mapping[Row, Outcome]],
) -> list[Image.Image | None]:
    """Draw each distinct row once and blank texts not at all; equal rows share one picture object.

    Args:
        on_image: called with index and picture of a row as soon as it is drawn.
        failures: counts, for each row that is None, the reason.
        draw: gets the distinct rows, and a function to call with each row that it has drawn; returns the outcome of
            every row.
    """
    rows = list(zip(texts, seeds, strict=True))
    places: dict[Row, list[int]] = {}
    for i, row in enumerate(rows):
        if row[0].strip():
            places.setdefault(row, []).append(i)

    def on_row(row: Row, picture: Image.Image) -> None:
        for i in places[row] if on_image else ():
            on_image(i, picture)

    drawn = draw(list(places), on_row) if places else {}
    outcomes = [drawn[row] if row in places else "blank text" for row in rows]
    failures.update(outcome for outcome in outcomes if isinstance(outcome, str))
    return [None if isinstance(outcome, str) else outcome for outcome in outcomes]
