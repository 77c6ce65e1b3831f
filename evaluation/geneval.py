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

Source: GenEval, arXiv 2310.11513, djghosh13/geneval (MIT). `GenEval.from_models` is "GenEval-HF", which is not
GenEval: the same rules and the same architecture of detector, but other weights (`mask2former.py`), and nobody has
compared the two; the 0.9 of "counting" may lie elsewhere on their scale. Any other detector goes in through the
constructor.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data.grammar import TASKS
from data.prompts import load_prompts
from errors import UserError, one_line
from evaluation.benchmark import Benchmark, Item, Verdict

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"

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
        class_number: its place in the class names, from 0.
        score: in [0, 1].
        box: left, top, right, bottom in pixels, y growing downward; right and bottom are outside.
        mask: (height, width) bool over the whole picture; None if the detector gives boxes only.
    """

    class_number: int
    score: float
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


Question = tuple[Image.Image, Detection, str]  # of which colour is this detection of that class?
Detect = Callable[[Sequence[Image.Image]], list[list[Detection] | None]]
Colours = Callable[[Sequence[Question]], list[str | None]]
Found = Mapping[str, Sequence[Detection]]


@dataclass(frozen=True)
class Rules:
    """The numbers in the rules; the defaults are the published ones.

    Attributes:
        threshold: a detection counts if its score is above.
        counting_threshold: the same where the tag is "counting".
        max_objects: detections kept of each class, the best.
        position_threshold: share of the two sizes by which an offset is shortened.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1


# ----- rules


def found_objects(
    detections: Sequence[Detection], tag: str, class_names: Sequence[str] = CLASS_NAMES, rules: Rules = Rules()
) -> dict[str, list[Detection]]:
    """class name -> the detections that count for it, best first, ties in their order; absent if there are none."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold:
            found.setdefault(class_names[detection.class_number], []).append(detection)
    return {name: some[: rules.max_objects] for name, some in found.items()}


def colour_questions(row: Mapping[str, Any], found: Found) -> list[tuple[int, Detection]]:
    """(place in `include`, detection) of all whose colour matters: the best `count`, where there are as many."""
    return [
        (place, detection)
        for place, thing in enumerate(row["include"])
        if "color" in thing and len(found.get(thing["class"], ())) >= thing["count"]
        for detection in found[thing["class"]][: thing["count"]]
    ]


def relations(subject: Box, target: Box, position_threshold: float = Rules.position_threshold) -> tuple[str, ...]:
    """The relations in which `subject` stands to `target`: none, one, or two ("left of" and "above").

    Per axis r = sign(o) max(|o| - 0.1 (size + size), 0) for the offset o of the centres; if both |r| < 0.001 none.
    A direction holds if r in that direction is more than half of the length of the *unshortened* offset.
    """
    offsets, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (subject[low] + subject[high]) / 2 - (target[low] + target[high]) / 2
        sizes = abs(subject[high] - subject[low]) + abs(target[high] - target[low])
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - position_threshold * sizes, 0), offset))
    if all(abs(r) < 1e-3 for r in shortened):
        return ()
    dx, dy = (r / math.hypot(*offsets) for r in shortened)
    return tuple(name for name, share in zip(RELATIONS, (-dx, dx, -dy, dy), strict=True) if share > 0.5)


def shortcomings(
    row: Mapping[str, Any], found: Found, colours: Mapping[int, Sequence[str]], rules: Rules = Rules()
) -> list[str]:
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
        lacks = _lacks_number(thing, things) or _lacks_colour(thing, colours.get(place, ()))
        lacks = lacks or _lacks_position(thing, things, matched, rules)
        matched.append(None if lacks else things)
        reasons += [lacks] if lacks else []
    for thing in row.get("exclude", ()):
        number = len(found.get(thing["class"], ()))
        if number >= thing["count"]:
            reasons.append(f"expected {thing['class']}<{thing['count']}, found {number}")
    return reasons


def _lacks_number(thing: Mapping[str, Any], things: Sequence[Detection]) -> str | None:
    if len(things) < thing["count"]:
        return f"expected {thing['class']}>={thing['count']}, found {len(things)}"
    return None


def _lacks_colour(thing: Mapping[str, Any], seen: Sequence[str]) -> str | None:
    if "color" in thing and seen.count(thing["color"]) < thing["count"]:
        counts = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
        return f"expected {thing['color']} {thing['class']}>={thing['count']}, found {counts}"
    return None


def _lacks_position(
    thing: Mapping[str, Any],
    things: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> str | None:
    if "position" not in thing:
        return None
    relation, target = thing["position"]
    if matched[target] is None:
        return f"no target for {thing['class']} to be {relation}"
    for subject in things:
        for other in matched[target]:
            seen = relations(subject.box, other.box, rules.position_threshold)
            if relation not in seen:
                return f"expected {thing['class']} {relation} target, found {' and '.join(seen) or 'no relation'}"
    return None


# ----- rows


def row_problems(row: object, class_names: Sequence[str] = CLASS_NAMES) -> list[str]:
    """What is wrong with a row of GenEval's metadata; empty if pictures can be judged by it."""
    if not isinstance(row, dict):
        return [f"a {type(row).__name__}, not an object"]
    problems = _unknown_fields(row, ("tag", "include", "exclude", "prompt"))
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        problems.append(f"prompt is {row.get('prompt')!r}, not a text")
    if row.get("tag") not in TASKS:
        problems.append(f"tag is {row.get('tag')!r}, known are {', '.join(TASKS)}")
    if not row.get("include"):
        problems.append(f"include is {row.get('include')!r}, not a list of things")
    for part in ("include", "exclude"):
        things = row.get(part) or []
        if not isinstance(things, list) or not all(isinstance(thing, dict) for thing in things):
            problems.append(f"{part} is {things!r}, not a list of things")
            continue
        for place, thing in enumerate(things):
            problems += [f"{part}[{place}]: {problem}" for problem in _thing_problems(thing, part, place, class_names)]
    return problems or _missing_for_tag(row)


def _thing_problems(thing: dict, part: str, place: int, class_names: Sequence[str]) -> list[str]:
    fields = ("class", "count", "color", "position") if part == "include" else ("class", "count")
    problems = _unknown_fields(thing, fields)
    name, count = thing.get("class"), thing.get("count")
    if name not in class_names:
        nearest = difflib.get_close_matches(str(name), class_names, n=1, cutoff=0.0)[0]
        problems.append(f"class is {name!r}, did you mean {nearest!r}?")
    if type(count) is not int or count < 1:
        problems.append(f"count is {count!r}, not a whole number from 1")
    if "color" in thing and thing["color"] not in COLORS:
        problems.append(f"color is {thing['color']!r}, known are {', '.join(COLORS)}")
    if "position" in thing and not _is_position(thing["position"], place):
        problems.append(
            f"position is {thing['position']!r}, not [one of {', '.join(RELATIONS)}; the place of an earlier thing]"
        )
    return problems


def _is_position(position: object, place: int) -> bool:
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and type(target) is int and 0 <= target < place


def _unknown_fields(row: dict, known: Sequence[str]) -> list[str]:
    return [f"unknown field {name!r}, known are {', '.join(known)}" for name in row if name not in known]


def _missing_for_tag(row: dict) -> list[str]:
    """Without these a picture would be judged by less than its tag says."""
    if row["tag"] == "counting" and not row.get("exclude"):
        return ["counting without exclude, so any larger number would do"]
    if row["tag"] in ("colors", "color_attr"):
        return [f"include[{i}]: color is missing" for i, thing in enumerate(row["include"]) if "color" not in thing]
    if row["tag"] == "position" and "position" not in row["include"][-1]:
        return ["position is missing in the last thing of include"]
    return []


def load_rows(path: Path, class_names: Sequence[str] = CLASS_NAMES) -> list[dict]:
    """The rows of a metadata file in JSON Lines, in order; blank lines are skipped.

    Raises:
        UserError: an unreadable or empty file; or bad rows, all of them in one message, each with its line number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); give GenEval's metadata, JSON Lines") from error
    rows, problems, first = [], [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not JSON ({one_line(error)})")
            continue
        found = row_problems(row, class_names)
        if not found and first.setdefault(row["prompt"].strip(), number) != number:
            found = [f"the prompt {row['prompt']!r} of line {first[row['prompt'].strip()]} again"]
        problems += [f"line {number}: {problem}" for problem in found]
        rows.append(row)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; correct these lines, none was used")
    if not rows:
        raise UserError(f"{path}: no rows in it; give GenEval's metadata, JSON Lines")
    return rows


# ----- benchmark


class GenEval(Benchmark):
    """GenEval's rules over a detector and a namer of colours; see `from_models` for the real ones.

    Args:
        detect: pictures (RGB) -> their detections, None for a picture that it could not judge. Detections with scores
            up to the lower of the two thresholds may be left out.
        colours: questions -> one of `COLORS` each, None where it could not be told.
        title: as printed; "GenEval-HF" is that of `from_models` alone.
        settings: of `detect` and `colours`, JSON-able.
        class_names: what `Detection.class_number` counts, and the classes that rows may name.
        rules: thresholds.
        batch_size: pictures given to `detect` at a time, whose masks are in memory together.

    Raises:
        ValueError: a `batch_size` below 1.
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
        rules: Rules = Rules(),
        batch_size: int = 32,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self.detect, self.colours, self.title = detect, colours, title
        self.class_names, self.rules, self.batch_size = tuple(class_names), rules, batch_size
        self.settings = {**settings, "rules": asdict(rules)}

    @classmethod
    def from_models(
        cls,
        *,
        detector: str | Path = DETECTOR,
        clip: str | Path = CLIP,
        device: str,
        batch_size: int = 8,
        clip_batch_size: int = 64,
        short_side: int = 800,
        long_side: int = 1333,
        rules: Rules = Rules(),
    ) -> GenEval:
        """GenEval-HF: Mask2Former and CLIP from folders or the hub's local cache.

        Args:
            detector: repo or folder for `mask2former.Mask2Former`.
            clip: repo or folder for `clip_colours.ClipColours`.
            device: where both compute.
            batch_size: pictures per forward pass of the detector.
            clip_batch_size: crops per forward pass of CLIP.
            short_side: pixels to which a picture's shorter side is brought for the detector;
            long_side: and the most that its longer side may have.
            rules: thresholds.

        Raises:
            UserError: a checkpoint is not there or cannot be used; says which command fetches it.
            ValueError: a batch size below 1.
        """
        from evaluation.clip_colours import ClipColours
        from evaluation.mask2former import Mask2Former

        detect = Mask2Former(
            detector,
            device=device,
            batch_size=batch_size,
            threshold=min(rules.threshold, rules.counting_threshold),
            short_side=short_side,
            long_side=long_side,
        )
        colours = ClipColours(clip, device=device, batch_size=clip_batch_size)
        settings = {"detector": detect.settings, "colours": colours.settings}
        return cls(detect, colours, title="GenEval-HF", settings=settings, rules=rules, batch_size=4 * batch_size)

    def load(self, path: Path) -> list[Item]:
        """The prompts of a metadata file; an item's `meta` is its row, its id the row's number from 0: "00017".

        Raises:
            UserError: malformed rows, named with their line number, all of them in one message.
        """
        rows = load_rows(Path(path), self.class_names)
        prompts = load_prompts(path)
        return [
            Item(f"{number:05d}", prompt, row["tag"], row)
            for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """A verdict per (item, image), in order: 1.0 or 0.0, None if the detector or CLIP had no answer."""
        pairs = list(zip(items, images, strict=True))
        return [
            verdict
            for start in range(0, len(pairs), self.batch_size)
            for verdict in self._judge(pairs[start : start + self.batch_size])
        ]

    def overall(self, means: Mapping[str, float], points: Mapping[str, int]) -> float:
        """The unweighted mean of the tags' means, however many pictures each has."""
        return fmean(means.values())

    def _judge(self, pairs: Sequence[tuple[Item, Image.Image]]) -> list[Verdict]:
        pictures = [ImageOps.exif_transpose(image).convert("RGB") for _, image in pairs]
        found = [
            None if seen is None else found_objects(seen, item.category, self.class_names, self.rules)
            for (item, _), seen in zip(pairs, self.detect(pictures), strict=True)
        ]
        asked = [
            (number, place, detection)
            for number, (item, _) in enumerate(pairs)
            if found[number] is not None
            for place, detection in colour_questions(item.meta, found[number])
        ]
        answers = self.colours(
            [(pictures[number], detection, self.class_names[detection.class_number]) for number, _, detection in asked]
        )
        colours: list[dict[int, list[str | None]]] = [{} for _ in pairs]
        for (number, place, _), answer in zip(asked, answers, strict=True):
            colours[number].setdefault(place, []).append(answer)
        return [self._verdict(item, found[number], colours[number]) for number, (item, _) in enumerate(pairs)]

    def _verdict(self, item: Item, found: Found | None, colours: Mapping[int, Sequence[str | None]]) -> Verdict:
        if found is None:
            return Verdict({item.category: [None]}, {"reasons": ["the detector's output is not finite"]})
        detail = {
            "found": {name: [[*one.box, one.score] for one in some] for name, some in found.items()},
            "colours": [{"include": place, "seen": list(seen)} for place, seen in colours.items()],
        }
        if any(None in seen for seen in colours.values()):
            reason = "a colour could not be told: an empty box, or CLIP's output is not finite"
            return Verdict({item.category: [None]}, {"reasons": [reason], **detail})
        reasons = shortcomings(item.meta, found, colours, self.rules)
        return Verdict({item.category: [0.0 if reasons else 1.0]}, {"reasons": reasons, **detail})
