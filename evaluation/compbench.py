"""T2I-CompBench(++): attributes by BLIP-VQA, places and numbers by a detector, actions by CLIP, and all three at once.

    color, shape, texture    product over noun chunks of p(yes) to "a red car?"
    spatial                  0.25 (score 1 + score 2) + 0.5 position; below 0.5 it is 0
    3d_spatial               the same with relations in depth, without the floor
    numeracy                 mean over things of 0.5 [there] + 0.5 [as many as asked for]
    non_spatial              cosine of picture and prompt
    complex                  mean of color's rule and, by the prompt's list, spatial's, non_spatial's or both

Source: arXiv 2307.06350 (TPAMI version: "++") and github.com/Karine-Huang/T2I-CompBench at 1b70949. Officially UniDet
finds the things; here OWLv2 does (`boxes.py`), so four rows carry its name and are not comparable with published
ones. The prompts are the benchmark's own files, given by path.

Bugs of the released code are mended: two things of one name are two boxes, in the order that suits; a prompt without
noun chunks cannot be judged (there it scores 1); "on top of" is "on the top of" (there it never holds); the depth map
is not transposed; an overlap of exactly 0.5 is full (there it scores 0); 3d_spatial takes the best box of a thing too.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.text import text_lines
from errors import UserError, listed
from evaluation.benchmark import Benchmark, Item, Verdict
from evaluation.boxes import Owlv2
from evaluation.depth import Depth
from evaluation.geneval import Detection
from evaluation.parses import HOW_TO_FREEZE, Parse, Source
from interfaces import Prompt
from models.hub import contents_of
from rewards.gdino import iou

log = logging.getLogger(__name__)

ATTRIBUTES = ("color", "shape", "texture")
UNPARSED = ("numeracy", "non_spatial")  # their rules need no grammar
ROWS = {  # category of the files -> row of the table
    "color": "color",
    "shape": "shape",
    "texture": "texture",
    "spatial": f"CompBench-2D ({Owlv2.name})",
    "3d_spatial": f"CompBench-3D ({Owlv2.name}, {Depth.name})",
    "numeracy": f"CompBench-numeracy ({Owlv2.name})",
    "non_spatial": "non_spatial",
    "complex": f"complex ({Owlv2.name})",
}
_JUDGES = {
    **dict.fromkeys(ATTRIBUTES, ("blip",)),
    "spatial": ("detector",),
    "3d_spatial": ("detector", "depth"),
    "numeracy": ("detector",),
    "non_spatial": ("clip",),
    "complex": ("blip", "detector", "clip"),
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
    "on top of": (1, 1),
    "on the bottom of": (1, -1),
}
_PERSONS = dict.fromkeys(("girl", "boy", "man", "woman"), "person")
_ALIASES = {**_PERSONS, "ship": "boat", "telivision": "tv", "goldfish": "fish", "painting": "picture"}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}


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


def position_2d(relation: str | None, first: Detection, second: Detection) -> float:
    """How far "first [is] relation second" holds, in [0, 1]; 0 for no known relation.

    Two things are near if their centres differ by less than 150 pixels of the frame along x or along y; else they get
    150 over the larger difference. A direction holds if the centres differ more along its axis than across; an IoU
    from 0.1 then gives 0.1 / IoU.
    """
    offset = [(second.box[k] + second.box[k + 2] - first.box[k] - first.box[k + 2]) / 2 for k in (0, 1)]
    if relation in ("next to", "on side of", "near"):
        near = min(map(abs, offset)) < NEAR
        return 1.0 if near else NEAR / max(map(abs, offset))
    if relation not in _DIRECTIONS:
        return 0.0
    axis, sign = _DIRECTIONS[relation]
    if sign * offset[axis] <= abs(offset[1 - axis]):
        return 0.0
    overlap = iou(first.box, second.box)
    return 1.0 if overlap < MOST_OVERLAP else MOST_OVERLAP / overlap


def position_3d(relation: str | None, first: Detection, second: Detection, nearness: np.ndarray) -> float:
    """How far "first [is] relation second" holds, in [0, 1], by the mean nearness (H, W) in their boxes.

    The right thing must be nearer; then the score is IoU / 0.5, at most 1. A box without a pixel has no mean, and no
    relation holds.
    """
    if relation not in RELATIONS_3D:
        return 0.0
    nearer = _mean_inside(nearness, first) - _mean_inside(nearness, second)
    if not (nearer > 0 if relation == "in front of" else nearer < 0):
        return 0.0
    return min(iou(first.box, second.box) / FULL_OVERLAP, 1.0)


def _mean_inside(nearness: np.ndarray, one: Detection) -> float:
    left, top, right, bottom = map(int, one.box)
    inside = nearness[top:bottom, left:right]
    return float(inside.mean(dtype=np.float64)) if inside.size else math.nan


def score_2d(objects: Sequence[str], relation: str | None, found: Sequence[Detection]) -> float:
    """Score of a picture in [0, 1]: a detection must have the thing's own name; below 0.5 the score is 0."""
    own = [[one for one in found if one.name == name] for name in objects]
    score = _pair_score(own, lambda a, b: position_2d(relation, a, b))
    return 0.0 if score < FLOOR else score


def score_3d(objects: Sequence[str], relation: str | None, found: Sequence[Detection], nearness: np.ndarray) -> float:
    """Score of a picture in [0, 1]: a detection's name must contain the thing's ("lamp" in "desk lamp")."""
    own = [[one for one in found if name in one.name] for name in objects]
    return _pair_score(own, lambda a, b: position_3d(relation, a, b, nearness))


def _pair_score(own: Sequence[Sequence[Detection]], position: Callable[[Detection, Detection], float]) -> float:
    """0.25 for the score of each of two things, and 0.5 for their position; `own` has each thing's boxes, best first.

    Two things of one name have the same boxes: they are the two best of them, in the order that suits.
    """
    first, second = own
    if first == second:
        pairs = [first[:2], first[:2][::-1]]
    else:
        pairs = [[some[0] for some in own if some]]
    places = [position(*pair) for pair in pairs if len(pair) == 2]
    return 0.25 * sum(one.score for one in pairs[0]) + 0.5 * max(places, default=0.0)


# ----- rules: numbers


def counts_of(prompt: str, singulars: Mapping[str, str]) -> list[tuple[str, int]]:
    """(thing, number) for each number word from a to eight before a known thing, by UniDet's names of things;
    `singulars` is plural -> singular, of `new_objects.txt`."""
    words = re.findall(r"\w+(?:[-']\w+)*|[^\w\s]", prompt.lower())
    known = {**singulars, **{singular: singular for singular in singulars.values()}}
    counts = []
    for place, word in enumerate(words):
        names = [" ".join(words[place + 1 : place + 1 + length]) for length in (2, 1)]
        name = next((known[name] for name in names if name in known), None)
        if word in _NUMBERS and name:
            counts.append((_ALIASES.get(name, name), _NUMBERS[word]))
    return counts


def count_score(counts: Sequence[tuple[str, int]], found: Sequence[Detection]) -> float:
    """Mean over the things of half for being there and half for the exact number.

    A thing without a box of its name takes, for good, the boxes whose name contains it ("fish" takes a "fish tank").
    """
    labels = [one.name for one in distinct(found)]
    score = 0.0
    for name, number in counts:
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        score += 0.5 * (name in labels) + 0.5 * (labels.count(name) == number)
    return score / len(counts)


def distinct(found: Sequence[Detection]) -> list[Detection]:
    """The boxes, in order, without those that an earlier one of their name covers by more than 0.9 (IoU, or the share
    of either)."""
    kept: list[Detection] = []
    for one in found:
        if not any(one.name == other.name and _copies(one.box, other.box) for other in kept):
            kept.append(one)
    return kept


def _copies(one: Sequence[float], other: Sequence[float]) -> bool:
    """With pixels counted at both ends, as the original does."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]) + 1)
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    common = width * height
    return max(common / (sum(areas) - common), common / areas[0], common / areas[1]) > COPY


# ----- one picture


def verdict(
    meta: Mapping[str, Any],
    answers: Sequence[float] | None = None,
    found: Sequence[Detection] | None = None,
    nearness: np.ndarray | None = None,
    cosine: float | None = None,
) -> Verdict:
    """The mean of the parts that a prompt is judged by, None if one of them could not be judged.

    Args:
        meta: of the item; it has "questions", "objects" and "relation", "counts" or "clip_text" for each part.
        answers: p(yes) of each question.
        found: boxes of all things; None, like `nearness`, where the model's output was not finite.
        nearness: for 3d_spatial.
        cosine: of the picture and "clip_text".
    """
    parts = {}
    if "questions" in meta:
        parts["attribute"] = _attribute(meta["questions"], answers)
    if "objects" in meta:
        parts["spatial"] = _place(meta, found, nearness)
    if "counts" in meta:
        parts["numeracy"] = _number(meta["counts"], found)
    if "clip_text" in meta:
        parts["action"] = {"score": cosine} if math.isfinite(cosine) else _none("CLIP's output is not finite")
    scores = [part["score"] for part in parts.values()]
    score = None if None in scores else sum(scores) / len(scores)
    return Verdict({ROWS[meta["kind"]]: [score]}, parts, [p["reason"] for p in parts.values() if p["score"] is None])


def _attribute(questions: Sequence[str], answers: Sequence[float] | None) -> dict[str, Any]:
    if not questions:
        return _none("the prompt has no noun chunk to ask about")
    if not all(map(math.isfinite, answers)):
        return _none("BLIP's output is not finite")
    return {"score": attribute_score(answers), "answers": [*map(list, zip(questions, answers, strict=True))]}


def _place(meta: Mapping[str, Any], found: Sequence[Detection] | None, nearness: np.ndarray | None) -> dict[str, Any]:
    objects, relation, in_depth = meta["objects"], meta["relation"], meta["kind"] == "3d_spatial"
    if not objects and meta["kind"] == "complex":
        return {"score": 0.0, "reason": "the prompt has no two things around a place word"}
    if not objects:
        return _none("the parse names no thing")
    if found is None or (in_depth and nearness is None):
        return _none("the output of the detector or of the depth model is not finite")
    score = score_3d(objects, relation, found, nearness) if in_depth else score_2d(objects, relation, found)
    return {"score": score, "objects": objects, "relation": relation, "boxes": _plain(found)}


def _number(counts: Sequence[tuple[str, int]], found: Sequence[Detection] | None) -> dict[str, Any]:
    if not counts:
        return _none("the prompt counts nothing that new_objects.txt names")
    if found is None:
        return _none("the detector's output is not finite")
    return {"score": count_score(counts, found), "counts": [*map(list, counts)], "boxes": _plain(found)}


def _none(reason: str) -> dict[str, Any]:
    return {"score": None, "reason": reason}


def _plain(found: Sequence[Detection]) -> list[list]:
    return [[one.name, round(one.score, 4), *(round(side, 1) for side in one.box)] for one in found]


# ----- files


def load_items(path: Path, parses: Source | None, categories: Sequence[str] = tuple(ROWS)) -> list[Item]:
    """The prompts of one file, or of `{category}_val.txt` of a folder; ids are category and line.

    Beside a numeracy file `new_objects.txt` is read; beside `complex_val.txt` and parts of it the lists
    `complex_val_spatial.txt` and `complex_val_action.txt`; beside `complex.txt` those of both its halves.

    Args:
        path: a text file of one prompt a line, its category in its name, or a folder of them.
        parses: where the prompts' parses come from; None if only numeracy and non_spatial, which need none, are there.
        categories: which categories are wanted.
    """
    source, parse = parses or ("--parses, which is not given,", lambda prompt: None)
    items = []
    for category, file in _files(Path(path), categories).items():
        meta, lines, missing = _meta_of(category, file), text_lines(file), []
        for number, prompt in lines:
            parsed = None if category in UNPARSED else parse(prompt)
            if _suffices(parsed, category):
                fields = {"kind": category, "line": number, **meta(prompt, parsed)}
                items.append(Item(f"{category}_{number:05d}", Prompt(prompt), ROWS[category], fields))
            else:
                missing.append(f"line {number} {prompt!r}")
        if missing:
            raise UserError(
                f"{file}: {source} has no parse of {len(missing)} prompts: {listed(missing, ', ')}. For parses "
                f"(complex prompts also need 'pair' and 'clip_text'): {HOW_TO_FREEZE}"
            )
    return items


def _files(path: Path, categories: Sequence[str]) -> dict[str, Path]:
    """category -> file."""
    if path.is_dir():
        files = {category: path / f"{category}_val.txt" for category in categories}
        there = {category: file for category, file in files.items() if file.is_file()}
        if not there:
            raise UserError(f"{path} has none of {', '.join(file.name for file in files.values())}: name a file")
        if len(there) < len(files):
            log.warning("%s has no %s: not in the table", path, ", ".join(sorted(set(files) - set(there))))
        return there
    named = [name for name in ROWS if path.stem == name or path.stem.startswith(f"{name}_")] or list(categories)
    if len(named) > 1 or named[0] not in categories:
        raise UserError(
            f"{path}: its name does not say which of {', '.join(categories)} it is: name it as in the benchmark "
            "(color_val.txt), or give its category with --categories"
        )
    return {named[0]: path}


def _suffices(parse: Parse | None, category: str) -> bool:
    """Whether a prompt's parse says all that judging a category needs."""
    if category == "complex":
        return parse is not None and parse.pair is not None and parse.clip_text is not None
    return parse is not None or category in UNPARSED


def _meta_of(category: str, file: Path) -> Callable[[str, Parse | None], dict[str, Any]]:
    """(prompt, parse) -> what judging it needs."""
    if category in ATTRIBUTES:
        return lambda prompt, parse: {"questions": questions_of(parse.chunks)}
    if category in ("spatial", "3d_spatial"):
        relations = RELATIONS_2D if category == "spatial" else RELATIONS_3D
        return lambda prompt, parse: _relation(prompt, relations, (*parse.nouns[:1], *parse.nouns[-1:]))
    if category == "numeracy":
        singulars = _singulars(*_beside(category, file, "new_objects.txt"))
        return lambda prompt, parse: {"counts": counts_of(prompt, singulars)}
    if category == "non_spatial":
        return lambda prompt, parse: {"clip_text": prompt}
    half = re.match("complex_(val|train)", file.stem)
    name = half[0] if half else f"{file.stem}*"
    spatial, action = (
        {_list_key(text) for one in _beside(category, file, f"{name}_{kind}.txt") for _, text in text_lines(one)}
        for kind in ("spatial", "action")
    )

    def complex_prompt(prompt: str, parse: Parse) -> dict[str, Any]:
        only_spatial = _list_key(prompt) in spatial
        only_action = not only_spatial and _list_key(prompt) in action
        place = {} if only_action else _relation(prompt, RELATIONS_2D, parse.pair)
        text = {} if only_spatial else {"clip_text": parse.clip_text}
        return {"questions": questions_of(parse.chunks), **place, **text}

    return complex_prompt


def _beside(category: str, file: Path, name: str) -> list[Path]:
    """The files in the folder of `file` with a name like `name`; UserError if there is none."""
    if found := sorted(file.parent.glob(name)):
        return found
    others = " ".join(other for other in ROWS if other != category)
    raise UserError(
        f"{file.parent / name} is missing, which {category} alone needs: fetch it, or --categories {others}"
    )


def _relation(prompt: str, relations: Sequence[str], objects: Sequence[str]) -> dict[str, Any]:
    named = [_PERSONS.get(name, name) for name in objects]
    return {"relation": relation_of(prompt, relations), "objects": named}


def _singulars(file: Path) -> dict[str, str]:
    """plural -> singular; the first of equal plurals counts."""
    pairs = [[name.strip().lower() for name in text.split(" - ")] for _, text in text_lines(file)]
    if bad := [pair for pair in pairs if len(pair) < 2]:
        raise UserError(f"{file}: {bad[0][0]!r} is not 'singular - plural': fetch the file again")
    return {pair[1]: pair[0] for pair in reversed(pairs)}


def _list_key(prompt: str) -> str:
    """How a prompt is looked up in `complex_val_spatial.txt` and `complex_val_action.txt`."""
    return prompt.strip().split(".")[0].lower()


# ----- benchmark


def judges_of(categories: Sequence[str]) -> set[str]:
    """Which of "blip", "clip", "detector" and "depth" these categories are judged by."""
    if unknown := sorted(set(categories) - set(ROWS)):
        raise UserError(f"--categories {', '.join(unknown)}: give some of {', '.join(ROWS)}")
    return {judge for category in categories for judge in _JUDGES[category]}


class CompBench(Benchmark):
    """T2I-CompBench with the models that `categories` need, all in float32.

    Args:
        parses: see `load_items`.
        categories: which of `ROWS` are judged.
        judges: each of `judges_of(categories)` by its name.
    """

    name = "compbench"
    title = "T2I-CompBench"
    images_per_prompt = 10

    def __init__(self, parses: Source | None, categories: Sequence[str], judges: Mapping[str, Any]):
        self.parses, self.wanted, self.judges = parses, tuple(categories), judges
        self.categories = tuple(ROWS[category] for category in ROWS if category in categories)
        self.settings = {
            "contents": contents_of({f"{name}_path": str(judge.folder) for name, judge in judges.items()}),
            "parses": parses.name if parses else "none",
        }

    def load(self, path: Path) -> list[Item]:
        """See `load_items`."""
        return load_items(path, self.parses, self.wanted)

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """A verdict per (item, image), in order; each model looks once at each picture that it is needed for."""
        rows = [(item.meta, image) for item, image in zip(items, images, strict=True)]
        asked = [(image, meta["questions"]) if meta.get("questions") else None for meta, image in rows]
        sought = [(image, names) if (names := _names(meta)) else None for meta, image in rows]
        deep = [image if meta["kind"] == "3d_spatial" else None for meta, image in rows]
        described = [(image, meta["clip_text"]) if "clip_text" in meta else None for meta, image in rows]
        seen = zip(
            _in_place(asked, lambda some: self.judges["blip"].ask(some)),
            _in_place(sought, lambda some: self.judges["detector"].detect(some)),
            _in_place(deep, lambda some: self.judges["depth"].maps(some)),
            _in_place(described, lambda some: self.judges["clip"].cosines(some)),
            strict=True,
        )
        return [verdict(item.meta, *one) for item, one in zip(items, seen, strict=True)]

    def overall(self, means: Mapping[str, float]) -> float:
        """The unweighted mean of the categories that are there; the benchmark itself has no such number."""
        return sum(means.values()) / len(means)


def _names(meta: Mapping[str, Any]) -> list[str]:
    """What the detector looks for, each once."""
    return list(dict.fromkeys([*meta.get("objects", ()), *(name for name, _ in meta.get("counts", ()))]))


def _in_place(rows: Sequence[Any], look: Callable[[list], list]) -> list:
    """`look` at the rows that are not None, each answer in its row's place; None elsewhere."""
    some = [row for row in rows if row is not None]
    answers = iter(look(some) if some else ())
    return [None if row is None else next(answers) for row in rows]
