"""Boxes of named things by OWLv2, the stand-in for UniDet in T2I-CompBench's spatial and numeracy rules.

Why OWLv2: it is in transformers, takes any noun, and is no reward of this project. GroundingDINO is one
(`rewards/gdino.py`), and a detector that was trained against must not be the judge. Its scores are not UniDet's: the
threshold is our choice, and numbers are comparable only among runs of this judge. Source: arXiv 2306.09683.

A box is called by the one noun that it fits best, as in the library's post-processing; boxes of one noun that overlap
by more than `NMS_IOU` are one (OWLv2 has no suppression of its own, UniDet has). Coordinates are pixels of the frame
that UniDet is given: the picture with its shorter side at 479 and its longer at 480 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.ops import batched_nms, box_convert
from transformers import AutoTokenizer, Owlv2ForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from evaluation.geneval import Detection
from models.frozen import load
from models.hub import read, resolve
from models.weights import locked
from prompting import well_formed

PUBLISHED = locked("google/owlv2-base-patch16-ensemble")
NEEDS = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
QUERY = "a photo of a {}"
THRESHOLD = 0.2  # our choice; UniDet's 0.5 is of another scale
NMS_IOU = 0.5
FRAME_SHORT, FRAME_LONG = 479, 480  # pixels


def frame_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the frame for a picture of `size`: torchvision's `Resize(479, max_size=480)`."""
    short, long = min(size), max(size)
    new_short, new_long = FRAME_SHORT, int(FRAME_SHORT * long / short)
    if new_long > FRAME_LONG:
        new_short, new_long = int(FRAME_LONG * new_short / new_long), FRAME_LONG
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


class Owlv2:
    """Detections without masks, picture by picture, in float32 without TF32; boxes are in pixels of the frame.

    Args:
        path: a folder with an `Owlv2ForObjectDetection`, its tokenizer and image processor, or `PUBLISHED.repo`.
        threshold: a box counts if its score is above this.
    """

    name = "OWLv2"

    def __init__(self, path: str | Path = PUBLISHED.repo, *, device: str | torch.device, threshold: float = THRESHOLD):
        self.device, self.threshold = torch.device(device), threshold
        self.folder = resolve(path, NEEDS, pickles=True)
        self.model = load(Owlv2ForObjectDetection, self.folder, self.device)
        self.tokenizer = read(AutoTokenizer, self.folder)
        self.processor = read(Owlv2ImageProcessorPil, self.folder)
        self.longest = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def detect(self, rows: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[Detection] | None]:
        """The boxes of each (picture, its distinct nouns), best first; None if the model's output is not finite."""
        return [self._detect(image, nouns) if nouns else [] for image, nouns in rows]

    def _detect(self, image: Image.Image, nouns: Sequence[str]) -> list[Detection] | None:
        read = self.tokenizer(
            [QUERY.format(well_formed(noun)) for noun in nouns],
            padding="max_length",
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        )
        pixels = self.processor([image.convert("RGB")], return_tensors="pt")["pixel_values"]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 moves boxes across thresholds
            out = self.model(
                input_ids=read.input_ids.to(self.device),
                attention_mask=read.attention_mask.to(self.device),
                pixel_values=pixels.to(self.device, torch.float32),
            )
        scores_NQ, boxes_N4 = out.logits[0].sigmoid().cpu(), out.pred_boxes[0].cpu()
        if not (scores_NQ.isfinite().all() and boxes_N4.isfinite().all()):
            return None
        score_N, label_N = scores_NQ.max(dim=1)
        boxes_N4 = box_convert(boxes_N4, "cxcywh", "xyxy") * max(image.size)  # shares of the padded square
        width, height = frame_size(image.size)
        boxes_N4 *= torch.tensor([width / image.width, height / image.height] * 2)
        boxes_N4 = torch.minimum(boxes_N4.clamp(min=0), torch.tensor([width, height] * 2))
        inside = ((boxes_N4[:, 2:] - boxes_N4[:, :2]) > 0).all(dim=1)  # the others lie in the padding
        rows = ((score_N > self.threshold) & inside).nonzero()[:, 0]
        kept = rows[batched_nms(boxes_N4[rows], score_N[rows], label_N[rows], NMS_IOU)].tolist()
        return [Detection(nouns[label_N[row]], score_N[row].item(), tuple(boxes_N4[row].tolist())) for row in kept]
