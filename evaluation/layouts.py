"""Pictures that are there already, where each benchmark's own scripts put them.

geneval             NNNNN/samples/*.png                            in the order of the names
compbench           samples/{prompt}_{number:06d}.png              by the prompt, in the order of the numbers
wise, geneval2      {id}.png
dpg                 {id}.png, a grid of 2 x 2, cut into four
unigenbench, any    {id}_{n}.png, as this project writes them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from errors import UserError
from evaluation.benchmark import Item
from evaluation.systems import Drawn


def paths_of(folder: Path, benchmark: str, item: Item) -> list[Path]:
    """The pictures of a prompt, in the order of their samples."""
    if benchmark == "geneval":
        paths = sorted((folder / item.id / "samples").glob("*.png"))
    elif benchmark == "compbench":  # names are compared, never built: a prompt with a slash is in no name
        named = [
            path for path in (folder / "samples").glob("*.png") if path.stem.rpartition("_")[0] == item.prompt.text
        ]
        paths = sorted(named, key=lambda path: path.stem[-6:])
    else:
        paths = [path for path in (folder / f"{item.id}.png",) if path.is_file()]
    return paths or sorted(folder.glob(f"{item.id}_*.png"), key=lambda path: int(path.stem.rpartition("_")[2]))


@dataclass(frozen=True)
class There:
    """A system whose pictures are in a folder; a prompt with fewer than `samples` of them is an error by name."""

    folder: Path
    benchmark: str

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        return [
            Drawn(item.prompt.text, True, image, 0, 0.0)
            for item in items
            for image in self._pictures(item, len(samples))
        ]

    def _pictures(self, item: Item, count: int) -> list[Image.Image]:
        pictures = [_open(path) for path in paths_of(self.folder, self.benchmark, item)]
        if self.benchmark == "dpg" and len(pictures) == 1:
            pictures = quarters(pictures[0])
        if len(pictures) < count:
            raise UserError(
                f"{self.folder} has {len(pictures)} pictures of prompt {item.id} ({item.prompt.text[:60]!r}), "
                f"{count} are wanted: draw them, or lower --samples"
            )
        return pictures[:count]


def quarters(grid: Image.Image) -> list[Image.Image]:
    """A 2 x 2 grid as four pictures, row by row."""
    width, height = grid.width // 2, grid.height // 2
    return [grid.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width)]


def _open(path: Path) -> Image.Image:
    """A picture from disk as RGB, upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no picture ({error}): draw it again, or leave it out") from error
