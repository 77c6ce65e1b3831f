"""GroundingDINO: are the objects of the ORIGINAL prompt in the picture, as many as asked for and where asked for?

The nouns, without marks of their own, become one caption, "car . zebra."; a query's score for a noun is the mean
sigmoid over the noun's tokens, and its box counts for that noun above 0.3. One query may serve several nouns. Then:

    position    0.6 position + 0.4 (objects found) / 2: best box of each object, direction of their centres, overlap
    counting    mean over the objects of [boxes left after non-maximum suppression == number asked for]
    any other   share of the nouns that have a box

Scores lie in [0, 1]. Attributes are not looked at, nor is the relation of a "complex" prompt. Source: T2I-R1, arXiv
2505.00703; detector GroundingDINO, arXiv 2303.05499, as `IDEA-Research/grounding-dino-tiny`; the position term is the
2-D rule of T2I-CompBench, arXiv 2307.06350. Left out: relations in depth and the single-image loop. Not checked: that
this checkpoint scores like the authors' own file (swint_ogc).

With `released` scores are those of T2I-R1's released code, whose formula differs from the published one:

    - position weighs 0.5, not 0.6; "above" and "on top of" never hold; two objects of one name score 0
    - distances stay shares of the picture and "near" is 150 of them, so always reached
    - only the first and the last word of a noun are looked at, so that one of three or more words is never found
    - suppression takes centre, width and height for corners, so it suppresses few boxes
    - a wrong number of boxes scores 0.2 if there is any
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

from data.grammar import RELATIONS
from errors import UserError
from interfaces import Prompt, Reward, Sample
from models.frozen import arithmetic, autocast, batches, check_pictures, load
from models.hub import read, resolve
from models.weights import locked
from prompting import well_formed

PUBLISHED = locked("IDEA-Research/grounding-dino-tiny")
NO_NOUNS = 1.0  # score of a prompt without objects: the same for its whole group, so it moves nothing
NMS_IOU = 0.5
MOST_OVERLAP = 0.1  # IoU of two objects from which their position term falls
NEAR_PIXELS, FRAME = 150, 480  # "near", in T2I-CompBench's pictures of 480 pixels

# locality -> axis and sign of centre 2 - centre 1, y growing downward; None is nearness
_DIRECTIONS = {
    **dict.fromkeys(("left of", "on the left of"), ("x", 1)),
    **dict.fromkeys(("right of", "on the right of"), ("x", -1)),
    **dict.fromkeys(("above", "on top of", "on the top of"), ("y", 1)),
    **dict.fromkeys(("below", "on the bottom of"), ("y", -1)),
    **dict.fromkeys(("next to", "near", "on side of")),
}
_UNHANDLED = ("above", "on top of")  # by the released code
_MARKS = re.compile("[.,;:!?…‥。．｡，、､；：！？؟،؛।]+")

Box = tuple[float, float, float, float]
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Detection:
    """A box that scored above the threshold for one noun."""

    noun_index: int  # in `Prompt.nouns`
    score: float  # mean sigmoid over the noun's tokens
    box: Box  # centre x, centre y, width, height, as shares of the picture's width and height


def corners(box: Box) -> Box:
    """(left, top, right, bottom) of a (centre x, centre y, width, height)."""
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes given by corners; 0 where nothing intersects, as with empty boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def nms(detections: Sequence[Detection], released: bool = False) -> list[Detection]:
    """The detections, best first, that overlap no better one by more than NMS_IOU; ties keep their order."""
    kept: list[Detection] = []
    for one in sorted(detections, key=lambda detection: -detection.score):
        box, better = one.box, [other.box for other in kept]
        if not released:
            box, better = corners(box), [corners(other) for other in better]
        if all(iou(box, other) <= NMS_IOU for other in better):
            kept.append(one)
    return kept


def picture_score(prompt: Prompt, detections: Sequence[Detection], size: Size, released: bool = False) -> float:
    """Score in [0, 1] of one picture of `size`, by the prompt's task.

    A prompt without nouns scores `NO_NOUNS`; one of task "position" or "counting" without the fields for it is judged
    by its nouns.

    Raises:
        ValueError: an object that is not among the nouns, or a locality that is not in `data.grammar.RELATIONS`.
    """
    if not any(map(phrase, prompt.nouns)):
        return NO_NOUNS
    if prompt.task == "position" and prompt.spatial:
        return spatial_score(prompt, detections, size, released)
    if prompt.task == "counting" and prompt.counts:
        return count_score(prompt, detections, released)
    return object_score(prompt, detections, released)


def object_score(prompt: Prompt, detections: Sequence[Detection], released: bool = False) -> float:
    """Share of the nouns with at least one box."""
    named = [noun for noun in prompt.nouns if phrase(noun)]
    return sum(bool(_boxes_of(noun, prompt, detections, released)) for noun in named) / len(named)


def spatial_score(prompt: Prompt, detections: Sequence[Detection], size: Size, released: bool = False) -> float:
    """Weighted existence and position of the best box of each object.

    "A dog left of a dog" asks for two boxes of one name: the two best after suppression, in the order that suits.
    """
    first, relation, second = prompt.spatial
    if first != second:
        found = [one for name in (first, second) for one in _boxes_of(name, prompt, detections, released)[:1]]
        pairs = [found] if len(found) == 2 else []
    elif released:
        return 0.0
    else:
        found = nms(_boxes_of(first, prompt, detections))[:2]
        pairs = list(permutations(found, 2))
    position = max((position_term(relation, one.box, two.box, size, released) for one, two in pairs), default=0.0)
    return 0.4 * len(found) / 2 + (0.5 if released else 0.6) * position


def position_term(relation: str, first: Box, second: Box, size: Size, released: bool = False) -> float:
    """How far "first [is] relation second" holds, in [0, 1], for boxes (centre x, centre y, width, height).

    A direction holds if the centres differ more along its axis than across; overlapping objects (IoU from 0.1) then
    get 0.1 / IoU. Near are centres that differ by less than 150/480 of the picture's shorter side along x or along y
    (as published: two objects in one row are near however far apart); others get that distance over the larger one.
    """
    if relation not in RELATIONS:
        raise ValueError(f"locality is {relation!r}, known are {', '.join(RELATIONS)}")
    relation = RELATIONS[relation]
    if released and relation in _UNHANDLED:
        return 0.0
    width, height = (1, 1) if released else size
    near = NEAR_PIXELS if released else NEAR_PIXELS / FRAME * min(size)
    x, y = (second[0] - first[0]) * width, (second[1] - first[1]) * height
    if _DIRECTIONS[relation] is None:
        return 1.0 if min(abs(x), abs(y)) < near else near / max(abs(x), abs(y))
    axis, sign = _DIRECTIONS[relation]
    along, across = (x, y) if axis == "x" else (y, x)
    if sign * along <= abs(across):
        return 0.0
    overlap = iou(corners(first), corners(second))
    return 1.0 if overlap < MOST_OVERLAP else MOST_OVERLAP / overlap


def count_score(prompt: Prompt, detections: Sequence[Detection], released: bool = False) -> float:
    """Mean over the counted objects of 1 for the number asked for, else 0."""
    scores = []
    for name, number in prompt.counts:
        found = len(nms(_boxes_of(name, prompt, detections, released), released))
        scores.append(1.0 if found == number else 0.2 * (released and found > 0))
    return sum(scores) / len(scores)


def _boxes_of(name: str, prompt: Prompt, detections: Sequence[Detection], released: bool = False) -> list[Detection]:
    """The detections of the object `name`, best first; ties keep their order."""
    if name not in prompt.nouns:
        raise ValueError(f"{name!r} of prompt {prompt.text!r} is not among its nouns {prompt.nouns}: add it there")
    labels = [_first_and_last(noun) if released else noun for noun in prompt.nouns]
    found = [detection for detection in detections if labels[detection.noun_index] == name]
    return sorted(found, key=lambda detection: -detection.score)


def _first_and_last(noun: str) -> str:
    words = noun.split()
    return f"{words[0]} {words[-1]}" if len(words) > 1 else noun


def phrase(noun: str) -> str:
    """A noun without marks: the model ends a phrase at "." and "?", and each mark would count in the noun's mean."""
    return " ".join(_MARKS.sub(" ", well_formed(noun)).split())


def caption_of(nouns: Sequence[str]) -> str:
    return " . ".join(filter(None, map(phrase, nouns))) + "."


def spans(nouns: Sequence[str], released: bool = False) -> list[list[tuple[int, int]]]:
    """The (start, end) characters of each noun in `caption_of(nouns)`: all of it, or its first and last word."""
    found, start = [], 0
    for noun in map(phrase, nouns):
        end, words = start + len(noun), noun.split()
        two = released and len(words) > 1
        found.append([(start, start + len(words[0])), (end - len(words[-1]), end)] if two else [(start, end)])
        start = end + len(" . ") * bool(noun)
    return found


class Caption(NamedTuple):
    """A caption as the model reads it: token ids, and where the tokens of each noun stand (nowhere if it was cut)."""

    ids: list[int]
    tokens: list[list[int]]


class GroundingDino(Reward):
    """Objects, numbers and positions of a sample's pictures against its original prompt; the mean over its pictures.

    Args:
        path: the published repo (read from the hub's local cache, never fetched unasked), or a folder with any
            `GroundingDinoForObjectDetection` in safetensors, its image processor and its (fast) tokenizer.
        dtype: "float32", or "float16"/"bfloat16": autocast over float32 weights.
        batch_size: pictures per forward pass; 900 queries on 800 pixels need about 1 GB each in float32.
        released: score as the released code does, see the module.
        prompts: the data, of which the localities are checked.
        box_threshold: a query serves a noun if its score is above this.

    Raises:
        UserError: no checkpoint at `path`, one that is not whole, or a prompt with an unknown locality.
    """

    name = "gdino"
    range = (0.0, 1.0)

    def __init__(
        self,
        path: str | Path = PUBLISHED.repo,
        *,
        device: str | torch.device,
        dtype: str = "float32",
        batch_size: int = 32,
        released: bool = False,
        prompts: Sequence[Prompt] = (),
        box_threshold: float = 0.3,
    ):
        self.device, self.dtype, self.batch_size = torch.device(device), arithmetic(dtype), batch_size
        self.released, self.box_threshold = released, box_threshold
        for prompt in prompts:
            if prompt.task == "position" and prompt.spatial and prompt.spatial[1] not in RELATIONS:
                raise UserError(
                    f"gdino knows no locality {prompt.spatial[1]!r} (prompt {prompt.text!r}), only "
                    f"{', '.join(RELATIONS)}"
                )
        folder = resolve(path, ("config.json", "model.safetensors", "tokenizer_config.json"))
        self.model = load(GroundingDinoForObjectDetection, folder, self.device)
        self.tokenizer = read(AutoTokenizer, folder)
        self.image_processor = read(GroundingDinoImageProcessorPil, folder)
        config = self.model.config
        self.max_tokens = min(config.max_text_len, config.text_config.max_position_embeddings)

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score in [0, 1] per sample, None where the model's outputs are not finite.

        Each distinct picture (the same PIL object) is looked at once per distinct nouns, in batches.
        """
        check_pictures(samples, self.name)
        rows = {
            (id(image), sample.prompt.nouns): (image, sample.prompt.nouns)
            for sample in samples
            for image in sample.images
            if sample.prompt.nouns
        }
        found = dict(zip(rows, self.detect(list(rows.values())), strict=True))
        return [self._score(sample, found) for sample in samples]

    def count_tokens(self, prompt: Prompt) -> int:
        """One more than it reads where a noun does not fit, and so counts as not found; else as many as it reads."""
        return self.max_tokens + ([] in self.tokenize([*filter(phrase, prompt.nouns)]).tokens)

    def limits(self, prompts: Sequence[Prompt]) -> list[str]:
        """How many prompts name no object, and how many are cut."""
        mute = sum(not any(map(phrase, prompt.nouns)) for prompt in prompts)
        said = f"cannot judge {mute} of {len(prompts)} prompts: they name no object and score {NO_NOUNS:g}"
        return [*[said] * (mute > 0), *super().limits(prompts)]

    def _score(self, sample: Sample, found: dict) -> float | None:
        prompt, images = sample.prompt, sample.images
        seen = [found[id(image), prompt.nouns] if prompt.nouns else [] for image in images]
        if None in seen:
            return None
        scores = [
            picture_score(prompt, one, image.size, self.released) for one, image in zip(seen, images, strict=True)
        ]
        return sum(scores) / len(scores)

    @torch.inference_mode()
    def detect(self, rows: Sequence[tuple[Image.Image, tuple[str, ...]]]) -> list[list[Detection] | None]:
        """The detections of each row (picture, its nouns), by noun and then by query; None if not all are finite.

        Only pictures of one size share a batch: padded ones would depend on their neighbours through the backbone.
        """
        captions = {nouns: self.tokenize(nouns) for nouns in dict.fromkeys(nouns for _, nouns in rows)}
        found: dict[int, list[Detection] | None] = {}
        order = sorted(range(len(rows)), key=lambda row: rows[row][0].size)
        for _, same_size in groupby(order, key=lambda row: rows[row][0].size):
            for some in batches(list(same_size), self.batch_size):
                detections = self._forward([rows[row][0] for row in some], [captions[rows[row][1]] for row in some])
                found.update(zip(some, detections, strict=True))
        return [found[row] for row in range(len(rows))]

    def tokenize(self, nouns: Sequence[str]) -> Caption:
        """The caption of `nouns` in tokens; a noun that does not fit into the model's text length has none."""
        encoded = self.tokenizer(
            caption_of(nouns), return_offsets_mapping=True, split_special_tokens=True, truncation=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        tokens = [  # a token that the tokenizer adds has no characters
            [token for token, (start, end) in enumerate(offsets) if any(max(start, a) < min(end, b) for a, b in parts)]
            for parts in spans(nouns, self.released)
        ]
        if len(ids) <= self.max_tokens:
            return Caption(ids, tokens)
        last = self.max_tokens - 1  # where the closing token now stands
        fitting = [of_noun if max(of_noun, default=0) < last else [] for of_noun in tokens]
        return Caption([*ids[:last], self.tokenizer.sep_token_id], fitting)

    def _forward(self, images: Sequence[Image.Image], captions: Sequence[Caption]) -> list[list[Detection] | None]:
        pixels = self.image_processor([image.convert("RGB") for image in images], do_pad=False, return_tensors="pt")
        ids = pad_sequence([torch.tensor(caption.ids) for caption in captions], batch_first=True)
        mask = pad_sequence([torch.ones(len(caption.ids), dtype=torch.long) for caption in captions], batch_first=True)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 moves boxes across thresholds
        with exact, autocast(self.device, self.dtype):
            outputs = self.model(
                pixel_values=pixels["pixel_values"].to(self.device),
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
            )
        probabilities, boxes = outputs.logits.float().sigmoid().cpu(), outputs.pred_boxes.float().cpu()
        rows = zip(probabilities, boxes, captions, strict=True)
        return [self._detections(scores, of_queries, caption.tokens) for scores, of_queries, caption in rows]

    def _detections(
        self, probabilities: torch.Tensor, boxes: torch.Tensor, tokens: Sequence[Sequence[int]]
    ) -> list[Detection] | None:
        """The detections of one picture from (queries, text) probabilities and (queries, 4) boxes."""
        found = []
        for index, of_noun in enumerate(tokens):
            if of_noun:
                scores = probabilities[:, of_noun].mean(dim=1)
                if not (scores.isfinite().all() and boxes.isfinite().all()):
                    return None
                kept = scores > self.box_threshold
                rows = zip(scores[kept].tolist(), boxes[kept].tolist(), strict=True)
                found += [Detection(index, score, tuple(box)) for score, box in rows]
        return found
