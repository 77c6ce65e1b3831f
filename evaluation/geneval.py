"""GenEval: does a picture show the objects, numbers, colours and places that its prompt asks for?

An object detector finds things, CLIP names their colours, and plain rules decide; a picture is right or wrong:

    found       of each class the (at most 16) detections with score > 0.3, in "counting" > 0.9, best first
    include     at least `count` found; the best `count` of them are those that are looked at further
    colour      all of those have the colour asked for
    position    each of those stands in the relation to each of the target's; no target, no relation
    exclude     fewer than `count` found; only "counting" has it, with its number + 1, so there the number is exact
    overall     mean over pictures of each tag, then the unweighted mean of the tags

Two detections of one thing are two things: the original has a suppression of overlaps, which at its default of 1.0
never acts, so there is none here. Left out as well: the "% correct images" and "% correct prompts" that the original
prints beside the published number.

Source: GenEval, arXiv 2310.11513, djghosh13/geneval (MIT). With the models of `mask2former.py` and `clip_colours.py`
it is "GenEval-HF", which is not GenEval: the rules and the architecture of the detector are the same, its weights are
not, and nobody has compared the two; the 0.9 of "counting" may lie elsewhere on their scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from data.grammar import TASKS
from data.prompts import read_geneval
from data.text import json_rows
from evaluation.benchmark import Benchmark, Item, Verdict
from evaluation.judged import items_of, required_texts

RULES = {  # as published
    "threshold": 0.3,  # a detection counts if its score is above
    "counting_threshold": 0.9,  # the same where the tag is "counting"
    "max_objects": 16,  # detections of each class that are kept, the best
    "position_threshold": 0.1,  # share of the two sizes by which an offset is shortened
}

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CLASS_NAMES = (  # COCO's 80 in COCO's order; GenEval renamed three: computer mouse, tv remote, computer keyboard
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One thing that a detector saw.

    Attributes:
        name: its class, as in CLASS_NAMES, or the noun that was sought.
        score: in [0, 1].
        box: left, top, right, bottom in pixels, y growing downward; right and bottom are outside.
        mask: (height, width) bool over the whole picture; None if the detector gives boxes only.
    """

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


Question = tuple[Image.Image, Detection]  # which colour has this thing?
Detect = Callable[[Sequence[Image.Image]], list[list[Detection] | None]]
Colours = Callable[[Sequence[Question]], list[str | None]]
Found = Mapping[str, Sequence[Detection]]


# ----- rules


def found_objects(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """class name -> the detections that count for it, best first, ties in their order; absent if there are none."""
    threshold = RULES["counting_threshold" if tag == "counting" else "threshold"]
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold:
            found.setdefault(detection.name, []).append(detection)
    return {name: some[: RULES["max_objects"]] for name, some in found.items()}


def colour_questions(row: Mapping[str, Any], found: Found) -> list[tuple[int, Detection]]:
    """(place in `include`, detection) of all whose colour matters: the best `count`, where there are as many."""
    return [
        (place, detection)
        for place, thing in enumerate(row["include"])
        if "color" in thing and len(found.get(thing["class"], ())) >= thing["count"]
        for detection in found[thing["class"]][: thing["count"]]
    ]


def relations(subject: Box, target: Box) -> tuple[str, ...]:
    """The relations in which `subject` stands to `target`: none, one, or two ("left of" and "above").

    Per axis r = sign(o) max(|o| - 0.1 (size + size), 0) for the offset o of the centres; if both |r| < 0.001 none.
    A direction holds if r in that direction is more than half of the length of the *unshortened* offset.
    """
    offsets, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (subject[low] + subject[high]) / 2 - (target[low] + target[high]) / 2
        sizes = abs(subject[high] - subject[low]) + abs(target[high] - target[low])
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - RULES["position_threshold"] * sizes, 0), offset))
    if all(abs(r) < 1e-3 for r in shortened):
        return ()
    dx, dy = (r / math.hypot(*offsets) for r in shortened)
    return tuple(name for name, share in zip(RELATIONS, (-dx, dx, -dy, dy), strict=True) if share > 0.5)


def shortcomings(row: Mapping[str, Any], found: Found, colours: Mapping[int, Sequence[str]]) -> list[str]:
    """What a picture lacks, in words; empty if it is right.

    Args:
        row: GenEval's metadata of the prompt.
        found: as `found_objects` gives it.
        colours: place in `include` -> the colours of its things, in the order of `colour_questions`.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # per thing of `include`; None if it failed
    for place, thing in enumerate(row["include"]):
        things = found.get(thing["class"], ())[: thing["count"]]
        lack = _lack(thing, things, colours.get(place, ()), matched)
        matched.append(None if lack else things)
        reasons += [lack] if lack else []
    for thing in row.get("exclude", ()):
        number = len(found.get(thing["class"], ()))
        if number >= thing["count"]:
            reasons.append(f"expected {thing['class']}<{thing['count']}, found {number}")
    return reasons


def _lack(
    thing: Mapping[str, Any],
    things: Sequence[Detection],
    colours: Sequence[str],
    matched: Sequence[Sequence[Detection] | None],
) -> str:
    """The first of number, colour and place that the things of one entry of `include` lack; "" if they have all."""
    name, count = thing["class"], thing["count"]
    if len(things) < count:
        return f"expected {name}>={count}, found {len(things)}"
    if "color" in thing and colours.count(thing["color"]) < count:
        counts = ", ".join(f"{colours.count(color)} {color}" for color in COLORS if color in colours)
        return f"expected {thing['color']} {name}>={count}, found {counts}"
    if "position" not in thing:
        return ""
    relation, target = thing["position"]
    if matched[target] is None:
        return f"no target for {name} to be {relation}"
    for subject in things:
        for other in matched[target]:
            hold = relations(subject.box, other.box)
            if relation not in hold:
                return f"expected {name} {relation} target, found {' and '.join(hold) or 'no relation'}"
    return ""


# ----- rows


def _item(row: Mapping[str, Any], number: int, class_names: Sequence[str]) -> Item:
    """The item of a row. Raises ValueError for a row by which a picture would be judged by less than its tag says."""
    (text,) = required_texts(row, "prompt")
    tag, include = row.get("tag"), row.get("include")
    if tag not in TASKS:
        raise ValueError(f"tag is {tag!r}, known are {', '.join(TASKS)}")
    if not include:
        raise ValueError(f"include is {include!r}, not a list of things")
    for part in ("include", "exclude"):
        for place, thing in enumerate(row.get(part) or ()):
            _check_thing(thing, place, class_names)
    if tag == "counting" and not row.get("exclude"):
        raise ValueError("counting without exclude: any larger number would do")
    if tag in ("colors", "color_attr") and not all("color" in thing for thing in include):
        raise ValueError(f"include is {include!r}: a color is missing")
    if tag == "position" and "position" not in include[-1]:
        raise ValueError("position is missing in the last thing of include")
    return Item(f"{number:05d}", read_geneval(text, row), tag, row)


def _check_thing(thing: Mapping[str, Any], place: int, class_names: Sequence[str]) -> None:
    name, count = thing.get("class"), thing.get("count")
    if name not in class_names:
        raise ValueError(f"class is {name!r}, known are {', '.join(class_names)}")
    if type(count) is not int or count < 1:
        raise ValueError(f"count is {count!r}, not a whole number from 1")
    if "color" in thing and thing["color"] not in COLORS:
        raise ValueError(f"color is {thing['color']!r}, known are {', '.join(COLORS)}")
    if "position" in thing:
        relation, target = thing["position"]
        if relation not in RELATIONS or target not in range(place):
            raise ValueError(f"position is {relation!r} of {target!r}, not one of {RELATIONS} of an earlier thing")


# ----- benchmark


class GenEval(Benchmark):
    """GenEval's rules over a detector and a namer of colours.

    Args:
        detect: pictures (RGB) -> their detections, None for a picture that it could not judge.
        colours: questions -> one of `COLORS` each, None where it could not be told.
        title: as printed.
        settings: of `detect` and `colours`, JSON-able.
        class_names: the classes that rows may name.
    """

    name = "geneval"
    categories = TASKS
    images_per_prompt = 4

    def __init__(
        self,
        detect: Detect,
        colours: Colours,
        *,
        title: str,
        settings: Mapping[str, Any],
        class_names: Sequence[str] = CLASS_NAMES,
    ):
        self.detect, self.colours, self.title = detect, colours, title
        self.class_names, self.settings = tuple(class_names), {**settings, "rules": RULES}

    def load(self, path: Path) -> list[Item]:
        """The prompts of a metadata file; an item's `meta` is its row, its id the row's number from 0: "00017"."""
        return items_of(json_rows(path), lambda row, number: _item(row, number, self.class_names))

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """A verdict per (item, image), in order: 1.0 or 0.0, None if the detector or CLIP had no answer."""
        found = [
            None if detections is None else found_objects(detections, item.category)
            for item, detections in zip(items, self.detect(images), strict=True)
        ]
        asked = [
            (number, place, detection)
            for number, objects in enumerate(found)
            if objects is not None
            for place, detection in colour_questions(items[number].meta, objects)
        ]
        answers = self.colours([(images[number], detection) for number, _, detection in asked])
        colours: list[dict[int, list[str | None]]] = [{} for _ in items]
        for (number, place, _), answer in zip(asked, answers, strict=True):
            colours[number].setdefault(place, []).append(answer)
        return [_verdict(*one) for one in zip(items, found, colours, strict=True)]

    def overall(self, means: Mapping[str, float]) -> float:
        """The unweighted mean of the tags' means, however many pictures each has."""
        return fmean(means.values())


def _verdict(item: Item, found: Found | None, colours: Mapping[int, Sequence[str | None]]) -> Verdict:
    if found is None:
        return Verdict({item.category: [None]}, absent=["the detector's output is not finite"])
    detail = {
        "found": {name: [[*one.box, one.score] for one in some] for name, some in found.items()},
        "colours": [{"include": place, "seen": list(seen)} for place, seen in colours.items()],
    }
    if any(None in seen for seen in colours.values()):
        reason = "a colour could not be told: an empty box, or CLIP's output is not finite"
        return Verdict({item.category: [None]}, detail, [reason])
    reasons = shortcomings(item.meta, found, colours)
    return Verdict({item.category: [0.0 if reasons else 1.0]}, {"reasons": reasons, **detail})
