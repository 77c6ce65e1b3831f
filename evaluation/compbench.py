"""T2I-CompBench(++): attributes by BLIP-VQA, places and numbers by a detector, actions by CLIP, and all three at once.

    color, shape, texture    product over noun chunks of p(yes) to "a red car?"
    spatial                  0.25 (score 1 + score 2) + 0.5 position; below 0.5 it is 0
    3d_spatial               the same with relations in depth, without the floor
    numeracy                 mean over things of 0.5 [there] + 0.5 [as many as asked for]
    non_spatial              cosine of picture and prompt
    complex                  mean of color's rule and, by the prompt's list, spatial's, non_spatial's or both

Source: arXiv 2307.06350 (TPAMI version: "++") and github.com/Karine-Huang/T2I-CompBench at 1b70949. Officially UniDet
finds the things; here OWLv2 does (`boxes.py`), so three rows carry its name and are not comparable with published
ones. The prompts are the benchmark's own files, given by path. The original reads a prompt off a picture's file name
and aligns scores by file number; here both come from the item.

`official_bugs=True` keeps what enters published numbers and is not the rule as described:

    any             two things of one name are one and the same box (here: the two best, in the order that suits)
    attributes      a prompt without noun chunks scores 1 (here: it cannot be judged)
    spatial         "on top of" is recognised and never holds (here: it is "on the top of")
    3d_spatial      the (H, W) depth map is cut [left:right, top:bottom], transposed; an overlap of exactly 0.5 scores
                    0; of several boxes of the thing found first, the last before the other thing's first is taken

The detail of a spatial verdict has both numbers, whichever counts.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from errors import UserError
from evaluation import blip_vqa, boxes, clip_score, depth
from evaluation.benchmark import Item, Verdict
from evaluation.boxes import LabelledBox
from evaluation.parses import HOW_TO_FREEZE, Parse, Source, parser
from interfaces import Prompt
from rewards.gdino import iou

log = logging.getLogger(__name__)

ATTRIBUTES = ("color", "shape", "texture")
UNPARSED = ("numeracy", "non_spatial")  # their rules need no grammar
ROWS = {  # category of the files -> row of the table
    "color": "color",
    "shape": "shape",
    "texture": "texture",
    "spatial": f"CompBench-2D ({boxes.Owlv2.name})",
    "3d_spatial": f"CompBench-3D ({boxes.Owlv2.name}, {depth.Depth.name})",
    "numeracy": f"CompBench-numeracy ({boxes.Owlv2.name})",
    "non_spatial": "non_spatial",
    "complex": f"complex ({boxes.Owlv2.name})",
}
DROPPED_CHUNKS = ("top", "the side", "the left", "the right")
MOST_CHUNKS = 8
NEAR, MOST_OVERLAP, FULL_OVERLAP, FLOOR, COPY = 150, 0.1, 0.5, 0.5, 0.9  # NEAR in pixels of the frame
RELATIONS_2D = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
RELATIONS_3D = ("in front of", "behind", "hidden")
_DIRECTIONS = {  # axis and sign of centre 2 - centre 1, y growing downward
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the top of": (1, 1),
    "on the bottom of": (1, -1),
}
_PERSONS = dict.fromkeys(("girl", "boy", "man", "woman"), "person")
_ALIASES = {**_PERSONS, "ship": "boat", "telivision": "tv", "goldfish": "fish", "painting": "picture"}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_NEEDS = {
    **dict.fromkeys(ATTRIBUTES, ("blip",)),
    "spatial": ("detector",),
    "3d_spatial": ("detector", "depth"),
    "numeracy": ("detector",),
    "non_spatial": ("clip",),
    "complex": ("blip", "detector", "clip"),
}
_MOST_PROBLEMS = 20  # of a file, that one message names


class Judged(NamedTuple):
    """A score, None if there is none to be had, and what led to it."""

    score: float | None
    detail: dict[str, Any]


# ----- rules: attributes


def questions_of(chunks: Sequence[str]) -> list[str]:
    """What BLIP is asked about a prompt with these noun chunks."""
    return [f"{chunk}?" for chunk in chunks if chunk not in DROPPED_CHUNKS][:MOST_CHUNKS]


def attribute_score(answers: Sequence[float]) -> float:
    """The product of p(yes), each rounded to 4 decimals, multiplied in float32 and rounded again, as the original."""
    product = np.float32(1)
    for answer in answers:
        product *= np.float32(f"{answer:.4f}")
    return float(f"{product:.4f}")


# ----- rules: places


def relation_of(prompt: str, relations: Sequence[str]) -> str | None:
    """The first of `relations` that stands anywhere in the prompt."""
    return next((relation for relation in relations if relation in prompt), None)


def position_2d(relation: str | None, first: LabelledBox, second: LabelledBox, official_bugs: bool = False) -> float:
    """How far "first [is] relation second" holds, in [0, 1]; 0 for no known relation.

    Near are centres that differ by less than 150 pixels of the frame along x or along y, others get 150 over the
    larger difference. A direction holds if the centres differ more along its axis than across; an IoU from 0.1 then
    divides 0.1.
    """
    offset = [(second.box[k] + second.box[k + 2] - first.box[k] - first.box[k + 2]) / 2 for k in (0, 1)]
    if relation in ("next to", "on side of", "near"):
        near = min(map(abs, offset)) < NEAR
        return 1.0 if near else NEAR / max(map(abs, offset))
    if relation == "on top of" and not official_bugs:
        relation = "on the top of"
    if relation not in _DIRECTIONS:
        return 0.0
    axis, sign = _DIRECTIONS[relation]
    if sign * offset[axis] <= abs(offset[1 - axis]):
        return 0.0
    overlap = iou(first.box, second.box)
    return 1.0 if overlap < MOST_OVERLAP else MOST_OVERLAP / overlap


def position_3d(
    relation: str | None, first: LabelledBox, second: LabelledBox, nearness: np.ndarray, official_bugs: bool = False
) -> float:
    """How far "first [is] relation second" holds, in [0, 1], by the mean nearness (H, W) in their boxes.

    The nearer thing must be the right one, strictly; then an IoU above 0.5 gives 1, a smaller one IoU / 0.5, none 0. A
    box without a whole pixel has no mean, and nothing holds.
    """
    if relation not in RELATIONS_3D:
        return 0.0
    nearer = _mean_inside(nearness, first, official_bugs) - _mean_inside(nearness, second, official_bugs)
    overlap = iou(first.box, second.box)
    if not (nearer > 0 if relation == "in front of" else nearer < 0) or (official_bugs and overlap == FULL_OVERLAP):
        return 0.0
    return min(overlap / FULL_OVERLAP, 1.0)


def _mean_inside(nearness: np.ndarray, one: LabelledBox, transposed: bool) -> float:
    left, top, right, bottom = map(int, one.box)
    inside = nearness[left:right, top:bottom] if transposed else nearness[top:bottom, left:right]
    return float(inside.mean(dtype=np.float64)) if inside.size else math.nan


def score_2d(
    objects: Sequence[str], relation: str | None, found: Sequence[LabelledBox], official_bugs: bool = False
) -> float:
    """Score of a picture in [0, 1]: labels must be equal to the objects' names, below 0.5 all is 0."""
    rows = [[row for row, one in enumerate(found) if one.label == name] for name in objects]
    score = _pair_score(rows, found, lambda a, b: position_2d(relation, a, b, official_bugs), official_bugs)
    return 0.0 if score < FLOOR else score


def score_3d(
    objects: Sequence[str],
    relation: str | None,
    found: Sequence[LabelledBox],
    nearness: np.ndarray,
    official_bugs: bool = False,
) -> float:
    """Score of a picture in [0, 1]: labels must hold the objects' names ("lamp" in "desk lamp")."""
    rows = [[row for row, one in enumerate(found) if name in one.label] for name in objects]
    if official_bugs and all(rows):
        both_seen = max(own[0] for own in rows)
        rows = [[max(row for row in own if row <= both_seen)] for own in rows]
    return _pair_score(
        rows, found, lambda a, b: position_3d(relation, a, b, nearness, official_bugs), official_bugs
    )  # fmt: skip


def _pair_score(
    rows: Sequence[Sequence[int]],
    found: Sequence[LabelledBox],
    position: Callable[[LabelledBox, LabelledBox], float],
    official_bugs: bool,
) -> float:
    """0.25 for the score of each of two things found, and 0.5 for their position; `rows` in `found` are best first."""
    first, second = rows
    if first == second and not official_bugs:
        two = [found[row] for row in first[:2]]
        pairs = [two, two[::-1]]
    else:
        pairs = [[found[own[0]] for own in rows if own]]
    places = [position(*pair) for pair in pairs if len(pair) == 2]
    return 0.25 * sum(one.score for one in pairs[0]) + 0.5 * max(places, default=0.0)


# ----- rules: numbers


def counts_of(prompt: str, singulars: Mapping[str, str]) -> list[tuple[str, int]]:
    """(thing, number) for each number word from a to eight that stands before a known thing, by the rule's names.

    Args:
        prompt: any text.
        singulars: plural -> singular, of `new_objects.txt`.
    """
    words = re.findall(r"\w+(?:[-']\w+)*|[^\w\s]", prompt.lower())
    known = {**singulars, **{singular: singular for singular in singulars.values()}}
    counts = []
    for place, word in enumerate(words):
        names = [" ".join(words[place + 1 : place + 1 + length]) for length in (2, 1)]
        name = next((known[name] for name in names if name in known), None)
        if word in _NUMBERS and name:
            counts.append((_ALIASES.get(name, name), _NUMBERS[word]))
    return counts


def count_score(counts: Sequence[tuple[str, int]], found: Sequence[LabelledBox]) -> float:
    """Mean over the things of half for being there and half for the exact number.

    A thing that has no box of its name takes those whose label holds it, for good ("fish" takes a "fish tank").
    """
    labels = [one.label for one in distinct(found)]
    score = 0.0
    for name, number in counts:
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        score += 0.5 * (name in labels) + 0.5 * (labels.count(name) == number)
    return score / len(counts)


def distinct(found: Sequence[LabelledBox]) -> list[LabelledBox]:
    """The boxes, in order, that no earlier one of their label covers by more than 0.9 (IoU, or either's share)."""
    kept: list[LabelledBox] = []
    for one in found:
        if not any(one.label == other.label and _copies(one.box, other.box) for other in kept):
            kept.append(one)
    return kept


def _copies(one: Sequence[float], other: Sequence[float]) -> bool:
    """With pixels counted at both ends, as the original does."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]) + 1)
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    common = width * height
    return max(common / (sum(areas) - common), common / areas[0], common / areas[1]) > COPY


# ----- rules: all at once


def three_in_one(parts: Sequence[float]) -> float:
    """The mean of attribute score and spatial score, action score or both: what a complex prompt is judged by."""
    return sum(parts) / len(parts)


def list_key(line: str) -> str:
    """By what a prompt is found in `complex_val_spatial.txt` and `complex_val_action.txt`."""
    return line.strip().split(".")[0].lower()


# ----- files


def load_items(
    path: Path,
    parses: Source | None,
    categories: Sequence[str] = tuple(ROWS),
    split: str = "val",
) -> list[Item]:
    """The prompts of one file, or of `{category}_{split}.txt` of a folder; ids are category and line.

    Beside a numeracy file its `new_objects.txt` is read, beside `complex_val.txt` the lists `complex_val_spatial.txt`
    and `complex_val_action.txt`. A line that comes twice is kept twice and logged.

    Args:
        path: a text file of one prompt a line (UTF-8, any line ends), its category in its name, or a folder of them.
        parses: where the prompts' parses come from; None if only numeracy and non_spatial, which need none, are there.
        categories: which of the files' categories are wanted.
        split: "val" for the benchmark.

    Raises:
        UserError: no such file, a line that is no text, or one that the source has no parse of, with line numbers.
    """
    files = _files(Path(path), categories, split)
    source, parse = parses or ("no parses given", lambda prompt: None)
    items, problems, hint = [], [], ""
    for category, file in files.items():
        meta, lines = _meta_of(category, file), _lines(file, problems)
        doubled = len(lines) - len({prompt for _, prompt in lines})
        if doubled:
            log.warning("%s: %d lines repeat an earlier one and are kept", file, doubled)
        for number, prompt in lines:
            parsed = None if category in UNPARSED else parse(prompt)
            wrong = _lacking(category, parsed)
            if wrong:
                hint = f". For parses: {HOW_TO_FREEZE}"
                problems.append(f"{file.name}, line {number}: {prompt!r} {wrong} in {source}")
            else:
                fields = {"kind": category, "line": number, **meta(prompt, parsed)}
                items.append(Item(f"{category}_{number:05d}", Prompt(prompt), ROWS[category], fields))
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise UserError(f"{path}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}{hint}")
    return items


def _files(path: Path, categories: Sequence[str], split: str) -> dict[str, Path]:
    """category -> file."""
    if path.is_dir():
        files = {category: path / f"{category}_{split}.txt" for category in categories}
        there = {category: file for category, file in files.items() if file.is_file()}
        if not there:
            raise UserError(f"{path}: has none of {', '.join(file.name for file in files.values())}; name a file")
        if len(there) < len(files):
            log.warning("%s has no %s: not in the table", path, ", ".join(sorted(set(files) - set(there))))
        return there
    told = [category for category in ROWS if path.stem == category or path.stem.startswith(f"{category}_")]
    if not told and len(categories) == 1:
        told = list(categories)
    if not told or told[0] not in categories:
        raise UserError(
            f"{path}: its name tells {told[0] if told else 'no category'}, wanted is one of {', '.join(categories)}; "
            "name it as in the benchmark (color_val.txt), or ask for its category"
        )
    return {told[0]: path}


def _lines(file: Path, problems: list[str]) -> list[tuple[int, str]]:
    """(line number from 1, text) of the lines that are not blank; what is wrong with others goes to `problems`."""
    try:
        raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    lines: list[tuple[int, str]] = []
    before = len(problems)
    for number, line in enumerate(raw, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            problems.append(f"{file.name}, line {number}: not UTF-8 (byte {error.start} of {line[:40]!r})")
            continue
        if any(ord(character) < 32 and character != "\t" for character in text):
            problems.append(f"{file.name}, line {number}: has a control character ({text[:40]!r})")
        elif text:
            lines.append((number, text))
    if not lines and len(problems) == before:
        problems.append(f"{file.name}: no prompts in it")
    return lines


def _lacking(category: str, parse: Parse | None) -> str:
    """What a category needs of a prompt's parse and is not there; "" if nothing."""
    if category in UNPARSED:
        return ""
    if parse is None:
        return "is not"
    if category == "complex" and (parse.pair is None or parse.clip_text is None):
        return "has no 'pair' and 'clip_text', which complex prompts need,"
    return ""


def _meta_of(category: str, file: Path) -> Callable[[str, Parse | None], dict[str, Any]]:
    """(prompt, parse) -> what judging it needs."""
    if category in ATTRIBUTES:
        return lambda prompt, parse: {"questions": questions_of(parse.chunks)}
    if category in ("spatial", "3d_spatial"):
        relations = RELATIONS_2D if category == "spatial" else RELATIONS_3D
        return lambda prompt, parse: _place(prompt, relations, (*parse.nouns[:1], *parse.nouns[-1:]))
    if category == "numeracy":
        singulars = _singulars(file.parent / "new_objects.txt")
        return lambda prompt, parse: {"counts": counts_of(prompt, singulars)}
    if category == "non_spatial":
        return lambda prompt, parse: {"clip_text": prompt}
    spatial, action = (_list(file.with_name(f"{file.stem}_{kind}.txt")) for kind in ("spatial", "action"))

    def complex_prompt(prompt: str, parse: Parse) -> dict[str, Any]:
        only_spatial = list_key(prompt) in spatial
        only_action = not only_spatial and list_key(prompt) in action
        place = {} if only_action else _place(prompt, RELATIONS_2D, parse.pair)
        text = {} if only_spatial else {"clip_text": parse.clip_text}
        return {"questions": questions_of(parse.chunks), **place, **text}

    return complex_prompt


def _place(prompt: str, relations: Sequence[str], objects: Sequence[str]) -> dict[str, Any]:
    named = [_PERSONS.get(name, name) for name in objects]
    return {"relation": relation_of(prompt, relations), "objects": named}


def _singulars(file: Path) -> dict[str, str]:
    problems: list[str] = []
    lines = _lines(file, problems)
    problems += [f"line {number}: {text!r} is not 'singular - plural'" for number, text in lines if " - " not in text]
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    pairs = [[name.strip().lower() for name in text.split(" - ")[:2]] for _, text in lines]
    return {plural: singular for singular, plural in reversed(pairs)}  # the first of equal plurals wins


def _list(file: Path) -> set[str]:
    if not file.is_file():
        raise UserError(
            f"{file}: missing; complex prompts are judged by the benchmark's lists: put its file beside the prompts"
        )
    problems: list[str] = []
    lines = _lines(file, problems)
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    return {list_key(text) for _, text in lines}


# ----- benchmark


class CompBench:
    """T2I-CompBench with the models that `categories` need; all in float32.

    Args:
        parses: "spacy", "grammar" or the path of a frozen file, see `evaluation.parses`; None if no category needs it.
        categories: which of `ROWS` are judged; only their models are loaded.
        blip_path, clip_path, detector_path, depth_path: folders, or the published repos from the hub's local cache.
        device: where the models run.
        batch_size: pictures per forward pass.
        detection_threshold: of OWLv2's scores, not calibrated to UniDet's 0.5.
        official_bugs: keep the original's, see the module.
        split: which files of a folder are read.

    Raises:
        UserError: a checkpoint that is missing or cannot be used.
        UserError: "spacy" where it is not installed.
        UserError: a file of parses that cannot be used.
        ValueError: an unknown category.
    """

    name = "compbench"
    images_per_prompt = 10

    def __init__(
        self,
        parses: str | Path | None,
        *,
        categories: Sequence[str] = tuple(ROWS),
        blip_path: str | Path = blip_vqa.PUBLISHED.repo,
        clip_path: str | Path = clip_score.PUBLISHED.repo,
        detector_path: str | Path = boxes.PUBLISHED.repo,
        depth_path: str | Path = depth.PUBLISHED.repo,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        detection_threshold: float = boxes.THRESHOLD,
        official_bugs: bool = False,
        split: str = "val",
    ):
        unknown = sorted(set(categories) - set(ROWS))
        if unknown or not categories:
            raise ValueError(f"categories {list(categories)!r}: give some of {', '.join(ROWS)}")
        needed = {judge for category in categories for judge in _NEEDS[category]}
        where = {"device": device, "batch_size": batch_size}
        self.blip = blip_vqa.BlipVQA(blip_path, **where) if "blip" in needed else None
        self.clip = clip_score.ClipScore(clip_path, **where) if "clip" in needed else None
        self.detector = None
        if "detector" in needed:
            self.detector = boxes.Owlv2(detector_path, threshold=detection_threshold, **where)
        self.depth = depth.Depth(depth_path, **where) if "depth" in needed else None
        self._wanted, self._split, self.official_bugs = tuple(categories), split, official_bugs
        self._parses = None if parses is None else parser(parses)
        self.categories = tuple(ROWS[category] for category in ROWS if category in categories)
        self.title = "T2I-CompBench, official bugs " + ("kept" if official_bugs else "mended")
        self.settings = self._settings()

    def load(self, path: Path) -> list[Item]:
        """See `load_items`."""
        return load_items(path, self._parses, self._wanted, self._split)

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """A verdict per (item, image), in order; each model looks once at each picture that it is needed for."""
        rows = [(item.meta, image) for item, image in zip(items, images, strict=True)]
        asked = [(image, meta["questions"]) if meta.get("questions") else None for meta, image in rows]
        sought = [(image, names) if (names := _names(meta)) else None for meta, image in rows]
        deep = [image if meta["kind"] == "3d_spatial" else None for meta, image in rows]
        told = [(image, meta["clip_text"]) if "clip_text" in meta else None for meta, image in rows]
        seen = zip(
            _in_place(asked, lambda some: self.blip.ask(some)),
            _in_place(sought, lambda some: self.detector.detect(some)),
            _in_place(deep, lambda some: self.depth.maps(some)),
            _in_place(told, lambda some: self.clip.cosines(some)),
            strict=True,
        )
        judged = [self._judged(item.meta, *one) for item, one in zip(items, seen, strict=True)]
        return [Verdict({item.category: [one.score]}, one.detail) for item, one in zip(items, judged, strict=True)]

    def overall(self, means: Mapping[str, float], points: Mapping[str, int]) -> float:
        """The unweighted mean of the categories that are there; the benchmark itself has no such number."""
        return sum(means.values()) / len(means)

    def _judged(
        self,
        meta: Mapping[str, Any],
        answers: list[float] | None,
        found: list[LabelledBox] | None,
        nearness: np.ndarray | None,
        cosine: float | None,
    ) -> Judged:
        kind = meta["kind"]
        if kind in ATTRIBUTES:
            return self._attribute(meta["questions"], answers)
        if kind == "spatial":
            return self._place(meta, found, score_2d)
        if kind == "3d_spatial":
            return self._place_in_depth(meta, found, nearness)
        if kind == "numeracy":
            return _number(meta["counts"], found)
        if kind == "non_spatial":
            return _action(cosine)
        return self._complex(meta, answers, found, cosine)

    def _attribute(self, questions: Sequence[str], answers: Sequence[float] | None) -> Judged:
        if not questions:
            return Judged(1.0 if self.official_bugs else None, {"reason": "the prompt has no noun chunk to ask about"})
        if not all(map(math.isfinite, answers)):
            return Judged(None, {"reason": "BLIP's answer is not finite"})
        return Judged(
            attribute_score(answers), {"answers": [list(pair) for pair in zip(questions, answers, strict=True)]}
        )

    def _place(
        self,
        meta: Mapping[str, Any],
        found: list[LabelledBox] | None,
        score: Callable[..., float],
        *more: np.ndarray,
    ) -> Judged:
        objects, relation = meta["objects"], meta["relation"]
        if not objects:
            return Judged(None, {"reason": "the parse names no thing"})
        if found is None:
            return Judged(None, {"reason": "the detector's output is not finite"})
        kept, mended = (score(objects, relation, found, *more, official_bugs=bugs) for bugs in (True, False))
        detail = {"objects": objects, "relation": relation, "boxes": _plain(found)}
        detail |= {"score_bugs_kept": kept, "score_bugs_mended": mended}
        return Judged(kept if self.official_bugs else mended, detail)

    def _place_in_depth(
        self, meta: Mapping[str, Any], found: list[LabelledBox] | None, nearness: np.ndarray | None
    ) -> Judged:
        if nearness is None:
            return Judged(None, {"reason": "the depth model's output is not finite"})
        return self._place(meta, found, score_3d, nearness)

    def _complex(
        self,
        meta: Mapping[str, Any],
        answers: list[float] | None,
        found: list[LabelledBox] | None,
        cosine: float | None,
    ) -> Judged:
        parts = {"attribute": self._attribute(meta["questions"], answers)}
        if "objects" in meta:
            nowhere = Judged(0.0, {"reason": "the prompt has no two things around a place word"})
            parts["spatial"] = self._place(meta, found, score_2d) if meta["objects"] else nowhere
        if "clip_text" in meta:
            parts["action"] = _action(cosine)
        detail = {name: {"score": part.score, **part.detail} for name, part in parts.items()}
        scores = [part.score for part in parts.values()]
        return Judged(None if None in scores else three_in_one(scores), detail)

    def _settings(self) -> dict[str, Any]:
        judges = {"blip": self.blip, "clip": self.clip, "detector": self.detector, "depth": self.depth}
        settings = {
            "weights": {name: str(judge.folder) for name, judge in judges.items() if judge},
            "precision": "float32",
            "parses": self._parses.name if self._parses else "none",
            "official_bugs": self.official_bugs,
            "split": self._split,
            "overall": "unweighted mean of the categories present; T2I-CompBench itself has no overall",
        }
        if self.blip:
            settings["blip_positions"] = self.blip.positions
        if self.detector:
            threshold = f"score > {self.detector.threshold}, not calibrated to UniDet"
            settings["detector"] = f"{boxes.Owlv2.name}, {boxes.QUERY!r}, {threshold}, suppression at {boxes.NMS_IOU}"
        return settings


def _names(meta: Mapping[str, Any]) -> list[str]:
    """What the detector looks for, each once."""
    return list(dict.fromkeys([*meta.get("objects", ()), *(name for name, _ in meta.get("counts", ()))]))


def _in_place(rows: Sequence[Any], look: Callable[[list], list]) -> list:
    """`look` at the rows that are not None, each answer in its row's place; None elsewhere."""
    some = [row for row in rows if row is not None]
    answers = iter(look(some) if some else ())
    return [None if row is None else next(answers) for row in rows]


def _number(counts: Sequence[tuple[str, int]], found: list[LabelledBox] | None) -> Judged:
    if not counts:
        return Judged(None, {"reason": "the prompt counts nothing that new_objects.txt names"})
    if found is None:
        return Judged(None, {"reason": "the detector's output is not finite"})
    return Judged(count_score(counts, found), {"counts": [list(count) for count in counts], "boxes": _plain(found)})


def _action(cosine: float) -> Judged:
    if not math.isfinite(cosine):
        return Judged(None, {"reason": "CLIP's cosine is not finite"})
    return Judged(cosine, {})


def _plain(found: Sequence[LabelledBox]) -> list[list]:
    return [[one.label, round(one.score, 4), *(round(side, 1) for side in one.box)] for one in found]
