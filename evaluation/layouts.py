"""Pictures that are there already, where each benchmark's own scripts put them.

geneval        N/samples/K.png, by the tag and include in N/metadata.jsonl, or by N if that file is not there
compbench      samples/{prompt}_{K}.png, {category}/samples/{prompt}_{K}.png
wise           {prompt_id}.png
unigenbench    {index}_{K}.png
dpg            {item_id}.png, a grid of 2 x 2, cut into four where several pictures are asked for
geneval2       a .json file: prompt -> path of its picture
any            {id}.png, {id}_{K}.png, as this project writes them

Zeros before a number do not matter. Of a.png, a.jpg, a.jpeg and a.webp the first counts; no other file does.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data.text import json_value, normalize, read_text
from errors import UserError, listed
from evaluation.benchmark import Item
from evaluation.systems import Drawn

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def pictures_in(place: Path, benchmark: str) -> dict[str, list[tuple[int, Path]]]:
    """(number, file) of the pictures in a folder, or in a .json file, by each name that a prompt may have there."""
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    if place.is_file():
        listing = json_value(read_text(place), str(place))
        if not isinstance(listing, dict) or not all(isinstance(path, str) for path in listing.values()):
            raise UserError(f"--images {place}: not a JSON object, prompt -> path of its picture")
        for prompt, path in listing.items():
            found[_name(prompt)].append((0, Path(path) if Path(path).is_file() else place.parent / path))
    for folder in (place, *place.glob("samples"), *place.glob("*/samples")):
        of_prompt = benchmark == "geneval" and folder.parent.parent == place and folder.parent.name.isdecimal()
        metadata, name = folder.with_name("metadata.jsonl"), _name(folder.parent.name)
        if of_prompt and metadata.is_file():
            name = _row(json_value(read_text(metadata), str(metadata)))
        files = [path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES]
        files.sort(key=lambda path: SUFFIXES.index(path.suffix.lower()), reverse=True)
        for path in {path.stem: path for path in files}.values():
            stem, (before, _, number) = path.stem, path.stem.rpartition("_")
            if of_prompt:
                found[name] += [(int(stem), path)] if stem.isdecimal() else []
            else:
                found[_name(stem)].append((0, path))
                found[_name(before)] += [(int(number), path)] if number.isdecimal() else []
    return found


def _paths(found: dict[str, list[tuple[int, Path]]], item: Item) -> list[Path]:
    """A prompt's pictures in the order of their numbers, by the surest of its names that has some."""
    names = [_row(item.meta), _name(item.prompt.text), _name(item.id)]
    return next(([path for _, path in sorted(found[name])] for name in names if found.get(name)), [])


def _row(row: Mapping[str, Any]) -> str:
    """What GenEval judges by."""
    return json.dumps([row.get("tag"), row.get("include")], sort_keys=True)


def _name(text: str) -> str:
    """Without zeros before a number; macOS writes "é" as two characters."""
    return str(int(text)) if text.isdecimal() else normalize(text)


class There:
    """A system whose pictures are at `place`; UserError if prompts have fewer than `samples` of them."""

    def __init__(self, place: Path, benchmark: str, items: Sequence[Item], samples: int):
        found = pictures_in(place, benchmark)
        self.paths = {item.id: _paths(found, item) for item in items}
        self.grids = benchmark == "dpg" and 1 < samples <= 4
        lacking = [
            f"{len(self.paths[item.id])} of {item.id} ({item.prompt.text[:60]!r})"
            for item in items
            if len(self.paths[item.id]) < samples and not (self.grids and len(self.paths[item.id]) == 1)
        ]
        if lacking:
            raise UserError(
                f"--images {place}: {len(lacking)} prompts have fewer than {samples} pictures: {listed(lacking)}; "
                "draw them, or lower --samples"
            )

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        return [
            Drawn(item.prompt.text, True, image, 0, 0.0)
            for item in items
            for image in self._pictures(self.paths[item.id])[: len(samples)]
        ]

    def _pictures(self, paths: Sequence[Path]) -> list[Image.Image]:
        pictures = [picture(path) for path in paths]
        return quarters(pictures[0]) if self.grids and len(pictures) == 1 else pictures


def quarters(grid: Image.Image) -> list[Image.Image]:
    """A 2 x 2 grid as four pictures, row by row."""
    width, height = grid.width // 2, grid.height // 2
    return [grid.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width)]


def picture(path: Path) -> Image.Image:
    """A picture from disk as RGB, upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # the latter two are Pillow's for a PNG that is broken inside
        raise UserError(f"{path} is no picture ({error}): draw it again, or leave it out") from error
