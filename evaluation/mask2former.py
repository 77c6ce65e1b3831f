"""Mask2Former as GenEval uses it: pictures -> detections with masks, by the rules of the original's mmdet pipeline.

    read        shorter side to 800, longer at most 1333, bilinear; ImageNet mean and std; zeros right and below up to
                a multiple of 32
    table       softmax over 80 classes and "nothing", which is dropped; the 100 best of all (query, class) pairs: one
                query may be several classes
    mask        logits to the size of the padded input, padding cut off, to the size of the picture (bilinear both
                times); inside where logit > 0
    score       class probability x mean sigmoid inside the mask
    box         left, top, right, bottom of the mask, the last two + 1

Only transformers' network is used: its image processor squeezes pictures into 384 x 384, and its post-processing
enlarges binary masks by nearest neighbour. Arithmetic is float32 with TF32 off, because scores are cut at 0.9.

Pictures are resized by Pillow, as in the training of these weights (detectron2), and Pillow's version is pinned. mmdet
resizes by OpenCV: where a picture grows (512 -> 800) the two are the same but for rounding; where it shrinks (1024 ->
800) Pillow averages over neighbours and OpenCV does not.

Source: arXiv 2112.01527; mmdet 2.x, config mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco. The weights are Facebook's,
not mmdet's, see `geneval.py`; neither their AP on COCO nor their scores against mmdet's are checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from errors import UserError
from evaluation.geneval import CLASS_NAMES, DETECTOR, RULES, Box, Detection
from models.frozen import batches, load
from models.hub import resolve
from models.weights import locked

PUBLISHED = locked(DETECTOR)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB levels 0 ... 255
DIVISOR = 32
UNUSED = ("criterion.",)  # weights of the loss
MOST = 100  # (query, class) pairs per picture
MASKS_AT_ONCE = 16  # enlarged together: 16 of 1024 x 1024 are 64 MiB in float32
SPELLINGS = {  # other names that COCO's classes go by, without blanks -> GenEval's
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "hairdryer": "hairdrier",
    "doughnut": "donut", "mouse": "computermouse", "remote": "tvremote", "keyboard": "computerkeyboard",
}  # fmt: skip

Size = tuple[int, int]  # height, width


def resized(size: Size, short_side: int, long_side: int) -> Size:
    """The largest size of the same shape whose sides are within both, each rounded half up (mmcv's `imrescale`)."""
    scale = min(long_side / max(size), short_side / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def padded(size: Size) -> Size:
    height, width = (-(-side // DIVISOR) * DIVISOR for side in size)
    return height, width


def network_input(image: Image.Image, size: Size) -> torch.Tensor:
    """(3, height, width) float32 of the picture resized to `size` and padded."""
    height, width = size
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = tv.normalize(tv.pil_to_tensor(image).float(), MEAN, STD)
    bottom, right = (full - side for full, side in zip(padded(size), size, strict=True))
    return F.pad(pixels, (0, right, 0, bottom))


def detections_of(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, input_size: Size, picture_size: Size, threshold: float
) -> list[Detection]:
    """The detections of one picture with a score above `threshold`, best first.

    The mean sigmoid is at most 1, so a pair whose class probability is not above the threshold cannot become a
    detection: its mask, usually one of a hundred, is never enlarged.

    Args:
        class_logits: (queries, classes + 1), the last for "nothing".
        mask_logits: (queries, h, w), of the padded input.
        input_size: of the picture as the network read it, without padding.
        picture_size: of the picture itself.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    best, pairs = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    best, pairs = best[best > threshold], pairs[best > threshold]
    queries, classes = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    found = []
    for some in batches(queries.unique(), MASKS_AT_ONCE):
        logits = enlarged(mask_logits[some], input_size, picture_size)
        inside = logits > 0
        quality = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        for row, query in enumerate(some):
            scores = best * quality[row]
            kept = (queries == query) & (scores > threshold)
            if kept.any():
                mask = inside[row].cpu().numpy().copy()  # a view would keep the other masks in memory
                box = box_of(mask)
                found += [
                    Detection(CLASS_NAMES[number], score, box, mask)
                    for number, score in zip(classes[kept].tolist(), scores[kept].tolist(), strict=True)
                ]
    return sorted(found, key=lambda detection: -detection.score)


def enlarged(mask_logits: torch.Tensor, input_size: Size, picture_size: Size) -> torch.Tensor:
    """(n, height, width) logits of the picture from (n, h, w) logits of the padded input."""
    bilinear = {"mode": "bilinear", "align_corners": False}
    logits = F.interpolate(mask_logits[None], size=padded(input_size), **bilinear)
    logits = logits[..., : input_size[0], : input_size[1]]
    return F.interpolate(logits, size=picture_size, **bilinear)[0]


def box_of(mask: np.ndarray) -> Box:
    """The tight box around a (height, width) mask; all zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 inside, neither in matrix products nor in convolutions; afterwards as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Mask2Former:
    """Pictures -> detections; an instance goes into `GenEval` as `detect`.

    Args:
        path: the published repo, or a folder with a `Mask2FormerForUniversalSegmentation` of COCO's 80 classes.
        threshold: only detections with a score above it are given.
        short_side: pixels to which a picture's shorter side is brought;
        long_side: and the most that its longer side may have.
    """

    def __init__(
        self,
        path: str | Path = PUBLISHED.repo,
        *,
        device: str | torch.device,
        batch_size: int = 8,
        threshold: float = RULES["threshold"],
        short_side: int = 800,
        long_side: int = 1333,
    ):
        self.device, self.batch_size, self.threshold = torch.device(device), batch_size, threshold
        self.short_side, self.long_side = short_side, long_side
        self.folder = folder = resolve(path, PUBLISHED.include)
        self.model = load(Mask2FormerForUniversalSegmentation, folder, self.device, unused=UNUSED)
        _check_classes(self.model.config.id2label, folder)
        self.settings = {
            "short_side": short_side,
            "long_side": long_side,
            "resize": "PIL bilinear",
            "dtype": "float32, TF32 off",
        }

    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection] | None]:
        """The detections of each picture, best first; None where the network's output is not finite.

        Pictures whose padded inputs have one size share a batch. Others do not: this network (like mmdet's) takes no
        notice of a padding mask, so a picture padded to its neighbour's size would be seen differently.
        """
        sizes = [resized((image.height, image.width), self.short_side, self.long_side) for image in images]
        found: dict[int, list[Detection] | None] = {}
        order = sorted(range(len(images)), key=lambda row: padded(sizes[row]))
        for _, same_size in groupby(order, key=lambda row: padded(sizes[row])):
            for some in batches(list(same_size), self.batch_size):
                detections = self._forward([images[row] for row in some], [sizes[row] for row in some])
                found.update(zip(some, detections, strict=True))
        return [found[row] for row in range(len(images))]

    @torch.inference_mode()
    def _forward(self, images: Sequence[Image.Image], sizes: Sequence[Size]) -> list[list[Detection] | None]:
        pixels = torch.stack([network_input(image, size) for image, size in zip(images, sizes, strict=True)])
        with exact_float32():
            output = self.model(pixel_values=pixels.to(self.device))
        return [
            detections_of(classes, masks, size, (image.height, image.width), self.threshold)
            if classes.isfinite().all() and masks.isfinite().all()
            else None
            for image, size, classes, masks in zip(
                images, sizes, output.class_queries_logits, output.masks_queries_logits, strict=True
            )
        ]


def _check_classes(id2label: dict[int, str], folder: Path) -> None:
    """Raise UserError unless the network's classes are COCO's in COCO's order: detections take their names from it."""
    spellings = ["".join(id2label[number].lower().split()) for number in sorted(id2label)]
    if [SPELLINGS.get(name, name) for name in spellings] != ["".join(name.split()) for name in CLASS_NAMES]:
        raise UserError(
            f"the classes of {folder} are not COCO's 80 in COCO's order: give an instance checkpoint of COCO such as "
            f"{PUBLISHED.repo}, or correct id2label in config.json if only the spelling differs"
        )
