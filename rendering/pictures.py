"""A folder of pictures that can be continued: what is there stays and is not drawn again.

OUT/pictures.json   all that the pictures depend on; a folder of others is refused
OUT/*.png           named by a prompt's place in its file, its id and the sample; no name comes from a prompt
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from errors import UserError
from interfaces import Renderer
from rendering import RenderOptions, renderer_contents
from rendering.rows import Row
from run.files import check_settings, save_png
from run.seeds import render_seed

RECORD = "pictures.json"


def picture_rows(index: int, id: str, text: str, samples: int, seed: int, suffix: str = "") -> dict[str, Row]:
    """File name -> (text, seed) of each sample of a prompt, of which `text` is drawn."""
    names = [f"{index:06d}_{id[:8]}_{sample}{suffix}.png" for sample in range(samples)]
    return {name: (text, render_seed(seed, id, 0, sample)) for sample, name in enumerate(names)}


def check_pictures(out: Path, settings: Mapping[str, Any], render: RenderOptions) -> dict[str, Any]:
    """The record to write as RECORD: the settings, and what the renderer's models hold.

    Raises:
        UserError: `out` holds pictures of other settings or models, or nobody knows of which.
    """
    record = {**settings, "contents": renderer_contents(render)}
    if any(out.glob("*.png")) and not (out / RECORD).exists():
        raise UserError(f"--out {out} holds pictures but no {RECORD}: name another folder")
    check_settings(out / RECORD, record)
    return record


def missing(out: Path, names: Iterable[str]) -> dict[str, None]:
    """Those of the files, in order, that are not there: not drawn yet, or they could not be."""
    return {name: None for name in names if not (out / name).exists()}


def draw_missing(out: Path, rows: Mapping[str, Row], batch: int, renderer: Renderer, shown: bool = True) -> None:
    """Draw what is missing of `rows`, file name -> (text, seed), `batch` at once; `shown`: with a progress bar."""
    todo = list(missing(out, rows))
    there = len(rows) - len(todo)
    with tqdm(total=len(rows), initial=there, desc="drawing", unit="picture", disable=not shown) as bar:
        for start in range(0, len(todo), batch):
            names = todo[start : start + batch]
            pictures = renderer(*zip(*(rows[name] for name in names), strict=True))
            for name, picture in zip(names, pictures, strict=True):
                if picture is not None:
                    save_png(picture, out / name)
            bar.update(len(names))
