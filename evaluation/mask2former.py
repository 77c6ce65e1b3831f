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

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from errors import UserError
from evaluation.geneval import CLASS_NAMES, RULES, Box, Detection
from models.frozen import batches, load
from models.hub import resolve
from models.weights import locked

PUBLISHED = locked("facebook/mask2former-swin-small-coco-instance")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB levels 0 ... 255
DIVISOR = 32
UNUSED = ("criterion.",)  # weights of the loss
MOST = 100  # (query, class) pairs per picture
MASKS_AT_ONCE = 16  # enlarged together: 16 of 1024 x 1024 are 64 MiB in float32

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


class Mask2Former:
    """Pictures -> detections with a score above `threshold`; an instance goes into `GenEval` as `detect`.

    `path` is a folder with a `Mask2FormerForUniversalSegmentation` of COCO's 80 classes, or `PUBLISHED.repo`. A
    picture's shorter side is brought to `short_side` pixels, but its longer one to no more than `long_side`.
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
        if (number := len(self.model.config.id2label)) != len(CLASS_NAMES):
            raise UserError(f"{folder} knows {number} classes, not COCO's 80: give an instance checkpoint of COCO")

    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection] | None]:
        """The detections of each picture, best first; None where the network's output is not finite.

        Neighbours whose padded inputs have one size share a batch. Others do not: this network (like mmdet's) takes no
        notice of a padding mask, so a picture padded to its neighbour's size would be seen differently.
        """
        sizes = [resized((image.height, image.width), self.short_side, self.long_side) for image in images]
        found: list[list[Detection] | None] = []
        for _, neighbours in groupby(zip(images, sizes, strict=True), key=lambda pair: padded(pair[1])):
            for some in batches(list(neighbours), self.batch_size):
                found += self._forward(some)
        return found

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[tuple[Image.Image, Size]]) -> list[list[Detection] | None]:
        pixels = torch.stack([network_input(image, size) for image, size in pairs])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # matrix products are without it anyway
            output = self.model(pixel_values=pixels.to(self.device))
        return [
            detections_of(classes, masks, size, (image.height, image.width), self.threshold)
            if classes.isfinite().all() and masks.isfinite().all()
            else None
            for (image, size), classes, masks in zip(
                pairs, output.class_queries_logits, output.masks_queries_logits, strict=True
            )
        ]
