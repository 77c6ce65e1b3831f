"""Pictures of a run that are wanted again, on disk: drawn once by whichever process comes first.

They are those of raw prompts (`Sample.baseline_images`), needed once an epoch. Files are named by the hash of text and
seed, so equal pictures are one file and no name comes from a prompt. They are lossless.

At the limit no more are kept and none is removed, because prompts come round in turn: the one unused for longest is
the one that is needed next.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path

from PIL import Image

from run.files import atomic_write, png_bytes

logger = logging.getLogger(__name__)


class PictureCache:
    """(text, seed) -> picture. All processes read all of it.

    Args:
        folder: made when the first picture is kept. It belongs to one renderer with one set of settings.
        limit: bytes in all.
        processes: that share what of it is not used yet.
    """

    def __init__(self, folder: Path, limit: float, processes: int = 1):
        self.folder = folder
        self.room = (limit - sum(path.stat().st_size for path in folder.glob("*.png"))) / processes

    def get(self, text: str, seed: int) -> Image.Image | None:
        """The picture if it is here and undamaged."""
        path = self._path(text, seed)
        try:
            image = Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"])
            image.load()
        except FileNotFoundError:
            return None
        except (OSError, SyntaxError) as error:  # PIL's for a damaged PNG
            logger.warning("%s cannot be read (%s): drawn again", path, error)
            return None
        return image

    def put(self, text: str, seed: int, image: Image.Image) -> None:
        """Keep a picture while there is room; after an error of the disk none is kept any more."""
        content = png_bytes(image, compress_level=1)
        if len(content) > self.room:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path(text, seed), content)
        except OSError as error:
            logger.warning("%s: %s: no more pictures are kept for later steps", self.folder, error.strerror)
            self.room = 0
            return
        self.room -= len(content)

    def _path(self, text: str, seed: int) -> Path:
        key = f"{seed}/{text}".encode("utf-8", "surrogatepass")
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.png"
