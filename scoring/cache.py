"""Pictures of a run that may be wanted again, on disk: drawn once by whichever process comes first.

Pictures of raw prompts (`Sample.baseline_images`) are needed once an epoch; those of rewrites are needed again only
under `--fresh_seeds false`, where a prompt keeps its noise from step to step. Files are named by the hash of text and
seed, so equal pictures are one file and no name comes from a prompt. They are lossless.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from run.files import atomic_write

logger = logging.getLogger(__name__)


class PictureCache:
    """(text, seed) -> picture, up to a number of bytes; the longest unused go first. All processes read all of it.

    Each process throws away its own files only: those that it wrote, and its share of what an earlier start left.

    Args:
        folder: made when the first picture is kept. It belongs to one renderer with one set of settings.
        limit: bytes in all, of all processes together.
        rank, ranks: this process, and how many there are.
    """

    def __init__(self, folder: Path, limit: float, rank: int = 0, ranks: int = 1):
        self.folder, self.limit = folder, limit / ranks
        here = [path for path in folder.glob("*.png") if int(path.stem[:8], 16) % ranks == rank]
        here.sort(key=lambda path: path.stat().st_mtime)
        self._mine: OrderedDict[Path, int] = OrderedDict((path, path.stat().st_size) for path in here)
        self._bytes = sum(self._mine.values())

    def get(self, text: str, seed: int) -> Image.Image | None:
        """The picture if it is here and whole."""
        path = self._path(text, seed)
        try:
            image = Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"])
            image.load()
        except FileNotFoundError:
            return None
        except (OSError, SyntaxError) as error:  # PIL's for a damaged PNG
            logger.warning("%s cannot be read (%s): drawn again", path, error)
            self._drop(path)
            return None
        if path in self._mine:
            self._mine.move_to_end(path)
        return image

    def put(self, text: str, seed: int, image: Image.Image) -> None:
        """Keep a picture; on a full disk everything here goes and nothing more is kept."""
        content = io.BytesIO()
        image.save(content, format="PNG", compress_level=1)
        size = content.tell()
        while self._mine and self._bytes + size > self.limit:
            self._drop(next(iter(self._mine)))
        if size > self.limit:
            return
        path = self._path(text, seed)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content.getvalue())
        except OSError as error:
            logger.warning("%s: %s: no more pictures are kept for later steps", self.folder, error.strerror)
            for path in list(self._mine):
                self._drop(path)
            self.limit = 0
            return
        self._bytes += size - self._mine.pop(path, 0)
        self._mine[path] = size

    def _drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._bytes -= self._mine.pop(path, 0)

    def _path(self, text: str, seed: int) -> Path:
        key = f"{seed}/{text}".encode("utf-8", "surrogatepass")
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.png"
