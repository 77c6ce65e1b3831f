"""The miniature world: coloured shapes on a plain ground, what is said of them, and the oracle that reads a picture.

Arrows of the design made here: Prompt (GenEval-style wishes), rewrite (layout captions) and the held-out metric.
The oracle is classical image analysis, so that nothing that was trained can please it. No reward may import it.

    python -m miniature.world --scenes 3000     # how many true scenes the oracle reads exactly
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from data.grammar import MEDIA, TASKS, plural, read
from interfaces import Prompt

SIZE = 48  # pixels a side; nine cells of 16 x 16
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 158, 72),
    "blue": (45, 85, 215),
    "yellow": (242, 200, 30),
    "purple": (150, 62, 178),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
GROUND = (236, 232, 222)
MAX_THINGS = 4
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
OPENERS = tuple(f"{'an' if medium[0] in 'aeiou' else 'a'} {medium} of" for medium in MEDIA)
RELATIONS = ("left of", "right of", "above", "below")
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: a colour of `COLORS`, a shape of `SHAPES`, a place 0..8 of `PLACES` (row by row)."""

    color: str
    shape: str
    place: int


@dataclass(frozen=True)
class Seen:
    """One object as the oracle reads it: colour, shape, place, box (x0, y0, x1, y1) in pixels."""

    color: str
    shape: str
    place: int
    box: tuple[float, float, float, float]


Scene = tuple[Thing, ...]


def random_scene(rng: random.Random, things: int | None = None) -> Scene:
    """1..4 things in different places."""
    places = rng.sample(range(9), things or rng.choice((1, 2, 2, 3, 3, 4)))
    return tuple(Thing(rng.choice(tuple(COLORS)), rng.choice(SHAPES), place) for place in places)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an anti-aliased 48 x 48 RGB picture; `rng` moves and sizes things a little and tints the ground."""
    side = SIZE * SUPERSAMPLING
    ground = tuple(channel + rng.randint(-6, 6) for channel in GROUND)
    canvas = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        x = 8 + 16 * (thing.place % 3) + rng.uniform(-0.7, 0.7)
        y = 8 + 16 * (thing.place // 3) + rng.uniform(-0.7, 0.7)
        _stamp(pen, thing.shape, COLORS[thing.color], x, y, rng.uniform(5.4, 6.2))
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def _stamp(pen: ImageDraw.ImageDraw, shape: str, fill, x: float, y: float, r: float) -> None:
    """Fill one shape whose box has its centre at (x, y) and half side r, in pixels of the finished picture."""

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((x + dx * r) * SUPERSAMPLING, (y + dy * r) * SUPERSAMPLING) for dx, dy in points]

    if shape == "circle":
        pen.ellipse(at((-1, -1), (1, 1)), fill=fill)
    elif shape == "square":
        pen.rectangle(at((-0.92, -0.92), (0.92, 0.92)), fill=fill)
    elif shape == "triangle":
        pen.polygon(at((0, -1), (1, 1), (-1, 1)), fill=fill)
    elif shape == "cross":
        pen.rectangle(at((-0.34, -1), (0.34, 1)), fill=fill)
        pen.rectangle(at((-1, -0.34), (1, 0.34)), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def describe(scene: Sequence[Thing]) -> str:
    """The layout caption, which the miniature FLUX understands: "a red circle at the top left, a ... at ..."."""
    return ", ".join(f"a {thing.color} {thing.shape} at the {PLACES[thing.place]}" for thing in scene)


def hearsay(scene: Scene, rng: random.Random) -> str:
    """Careless alt text, as on the web: true of some things, silent on the rest, wrong on numbers and relations."""
    one, other = rng.choice(scene), rng.choice(scene)
    hue, tint = rng.sample((one.color, other.color), 2)
    body = rng.choice(
        (
            f"a {one.shape}",
            f"a {one.shape} and a {other.shape}",
            f"{NUMBERS[rng.randint(2, 4)]} {plural(one.shape)}",
            f"a {one.color} {one.shape}",
            f"a {one.shape} {rng.choice(RELATIONS)} a {other.shape}",
            f"a {hue} {one.shape} and a {tint} {other.shape}",
        )
    )
    return f"{rng.choice(OPENERS)} {body}"


def request(task: str, rng: random.Random) -> Prompt:
    """One GenEval-style wish of a task in `TASKS`; the grammar that reads a user's .txt fills its fields."""
    one, other = rng.sample(SHAPES, 2)
    hue, tint = rng.sample(tuple(COLORS), 2)
    body = {
        "single_object": f"a {one}",
        "two_object": f"a {one} and a {other}",
        "counting": f"{NUMBERS[rng.randint(2, 4)]} {plural(one)}",
        "colors": f"a {hue} {one}",
        "position": f"a {one} {rng.choice(RELATIONS)} a {other}",
        "color_attr": f"a {hue} {one} and a {tint} {other}",
    }[task]
    return read(f"{rng.choice(OPENERS)} {body}")


def asked_for(prompt: Prompt) -> int:
    """Number of things that the prompt wants to see."""
    return sum(number for _, number in prompt.counts) or len(prompt.nouns)


def layout(prompt: Prompt, rng: random.Random) -> Scene:
    """A scene in which the prompt holds and nothing else stands; what the prompt leaves open is drawn at random."""
    wanted = [shape for shape, number in prompt.counts for _ in range(number)] or list(prompt.nouns)
    colors = dict(zip(range(len(wanted)), (phrase.split()[0] for phrase in prompt.attr_nouns), strict=False))
    places = _related_places(prompt.spatial[1], rng) if prompt.spatial else rng.sample(range(9), len(wanted))
    return tuple(Thing(colors.get(i) or rng.choice(tuple(COLORS)), shape, places[i]) for i, shape in enumerate(wanted))


def lesson(prompt: Prompt, rng: random.Random, skill: float) -> tuple[str, str]:
    """(reasoning, rewrite) for a cold start: in the right form always, right in content only `skill` of the time.

    The rest is what a careless writer does: a scene spoilt once or twice, or the wish repeated without a layout.
    """
    scene = layout(prompt, rng)
    careless = rng.random()
    if careless < 0.7 * (1 - skill):
        for _ in range(rng.choice((1, 2))):
            scene = spoil(scene, rng)
    vague = careless >= 0.7 * (1 - skill) and careless < 1 - skill
    looks = [f"{thing.color} {thing.shape}" for thing in scene]
    places = "anywhere" if vague else ", ".join(PLACES[thing.place] for thing in scene)
    reasoning = f"Count: {NUMBERS[len(scene)]}.\nSubjects: {', '.join(looks)}.\nLayout: {places}."
    return reasoning, ", ".join(f"a {look}" for look in looks) if vague else describe(scene)


def splits(held_out: int = 40, train: int = 160) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): distinct texts, up to so many of each task; the same lists in every process.

    Held out by text. Shapes, colours and openers are shared: there are but four shapes, and so "a photo of a circle"
    is held out while "a poster of a circle" is not.
    """
    rng = random.Random("splits")
    kept: dict[str, list[Prompt]] = {"train": [], "held out": []}
    for task in TASKS:
        texts = {request(task, rng).text: None for _ in range(20 * (held_out + train))}
        prompts = [read(text) for text in texts][: held_out + train]
        kept["held out"] += prompts[:held_out]
        kept["train"] += prompts[held_out:]
    return kept["train"], kept["held out"]


def cold_start(most: int = 240) -> list[Prompt]:
    """Prompts for the cold start: up to `most` distinct texts a task, none of them held out."""
    rng, (_, held_out) = random.Random("cold start"), splits()
    forbidden = {prompt.text for prompt in held_out}
    prompts: list[Prompt] = []
    for task in TASKS:
        texts = {request(task, rng).text: None for _ in range(20 * most)}
        prompts += [read(text) for text in texts if text not in forbidden][:most]
    return prompts


def _related_places(relation: str, rng: random.Random) -> list[int]:
    """Two places in one row or column such that the first stands in `relation` to the second."""
    line, (near, far) = rng.randrange(3), sorted(rng.sample(range(3), 2))
    pair = (
        [3 * line + near, 3 * line + far] if relation in ("left of", "right of") else [3 * near + line, 3 * far + line]
    )
    return pair if relation in ("left of", "above") else pair[::-1]


def spoil(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one thing gone, added, recoloured, reshaped or moved, or with two things' looks exchanged."""
    things, i = list(scene), rng.randrange(len(scene))
    free = [place for place in range(9) if place not in {thing.place for thing in scene}]
    how = rng.choice(("drop", "add", "recolor", "reshape", "move", "exchange"))
    if how == "drop" and len(things) > 1:
        del things[i]
    elif how == "add" and len(things) < MAX_THINGS:
        things.append(Thing(rng.choice(tuple(COLORS)), rng.choice(SHAPES), rng.choice(free)))
    elif how == "recolor":
        things[i] = replace(things[i], color=rng.choice([c for c in COLORS if c != things[i].color]))
    elif how == "move":
        things[i] = replace(things[i], place=rng.choice(free))
    elif how == "exchange" and len(things) > 1:
        j = rng.choice([j for j in range(len(things)) if j != i])
        things[i], things[j] = replace(things[i], place=things[j].place), replace(things[j], place=things[i].place)
    else:
        things[i] = replace(things[i], shape=rng.choice([s for s in SHAPES if s != things[i].shape]))
    return tuple(things)


def taste(prompt: Prompt, scene: Scene) -> float:
    """How much a person who asked for `prompt` would like a picture of `scene`, in [0, 1].

    1 if the prompt holds and nothing else is there; part of it if some of what was asked for is there; 0.1 less for
    each thing that nobody asked for. The miniature HPS learns from this, where the real one learned from people.
    """
    names = {thing.shape for thing in scene} | {f"{thing.color} {thing.shape}" for thing in scene}
    if prompt.counts:
        shape, wanted = prompt.counts[0]
        there = sum(thing.shape == shape for thing in scene)
        liking, wanted = max(0.0, 1 - 0.35 * abs(there - wanted)), wanted if there else len(scene)
    else:
        asked = (*prompt.nouns, *prompt.attr_nouns)
        liking = 1.0 if keeps(prompt, scene) else 0.5 * sum(name in names for name in asked) / len(asked)
        wanted = len(prompt.nouns)
    return max(0.0, liking - 0.1 * max(0, len(scene) - wanted))


def keeps(prompt: Prompt, scene: Scene) -> bool:
    """Does the prompt hold in the scene itself, no picture drawn?"""
    return holds(prompt, [Seen(t.color, t.shape, t.place, _nominal_box(t.place)) for t in scene])


def _nominal_box(place: int) -> tuple[float, float, float, float]:
    x, y = 16 * (place % 3), 16 * (place // 3)
    return (x + 2.2, y + 2.2, x + 13.8, y + 13.8)


@lru_cache(maxsize=512)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """Coverage (height, width) in [0, 1] of a shape stretched to fill its box."""
    scale = 16
    canvas = Image.new("L", (2 * scale * 8, 2 * scale * 8), 0)
    half = scale * 8 / SUPERSAMPLING
    _stamp(ImageDraw.Draw(canvas), shape, 255, half, half, half / (0.92 if shape == "square" else 1.0))
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def see(image: Image.Image) -> list[Seen]:
    """What stands in the picture: connected things off the ground colour, each given the nearest colour and shape.

    Things smaller than 20 pixels are specks and are not counted. A thing whose shape fits no template (coverage
    overlap below 0.7) is reported with shape "blob": it is there, but it is not what anybody asked for.
    """
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)  # (H, W), 0..441
    labels, count = ndimage.label(distance > 70)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    return [_identify(pixels, distance, labels == i) for i, size in enumerate(sizes, start=1) if size >= 20]


def _identify(pixels: np.ndarray, distance: np.ndarray, mask: np.ndarray) -> Seen:
    """One connected thing, `mask` (H, W) of bool, as the nearest colour, shape and place."""
    solid = mask & (distance >= 0.8 * np.quantile(distance[mask], 0.75))
    color = min(COLORS, key=lambda name: np.linalg.norm(np.median(pixels[solid], axis=0) - np.array(COLORS[name])))
    coverage = np.clip(distance / np.median(distance[solid]), 0, 1) * ndimage.binary_dilation(mask)
    rows, columns = ndimage.find_objects((coverage > 0.5).astype(int))[0]
    box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
    place = 3 * min(int((box[1] + box[3]) / 2 // 16), 2) + min(int((box[0] + box[2]) / 2 // 16), 2)
    return Seen(color, _shape(coverage, rows, columns), place, box)


def _shape(coverage: np.ndarray, rows: slice, columns: slice) -> str:
    """By how much of its box a thing fills, measured to a fraction of a pixel: square 1, circle 0.79, the others less.

    Triangle and cross fill about half; the one whose template overlaps more it is. The template also has the last word
    on whether it is a shape at all.
    """
    fill = coverage.sum() / (coverage.sum(axis=0).max() * coverage.sum(axis=1).max())
    overlap = {
        name: _overlap(coverage[rows, columns], _template(name, *coverage[rows, columns].shape)) for name in SHAPES
    }
    if fill > 0.9:
        shape = "square"
    elif fill > 0.68:
        shape = "circle"
    else:
        shape = max(("triangle", "cross"), key=overlap.get)
    return shape if overlap[shape] >= 0.7 else "blob"


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Soft intersection over union of two coverages of one shape, in [0, 1]."""
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-6))


def holds(prompt: Prompt, seen: Sequence[Seen]) -> bool:
    """Does the picture keep the prompt? GenEval's rules: extra things are forgiven, except that a count is exact."""
    if prompt.task == "counting":
        return all(sum(thing.shape == shape for thing in seen) == number for shape, number in prompt.counts)
    if prompt.task == "position":
        first, relation, second = prompt.spatial
        return any(
            _stands(a.box, relation, b.box) for a in seen if a.shape == first for b in seen if b.shape == second
        )
    if prompt.attr_nouns:
        there = {f"{thing.color} {thing.shape}" for thing in seen}
        return set(prompt.attr_nouns) <= there
    return set(prompt.nouns) <= {thing.shape for thing in seen}


def _stands(a: tuple[float, ...], relation: str, b: tuple[float, ...]) -> bool:
    """GenEval's position rule on boxes a and b: offset shrunk by a tenth of both sides, over the unshrunk length."""
    offset = np.array([(a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2])
    sides = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sides, 0)
    if np.all(np.abs(shrunk) < 1e-3):
        return False
    x, y = shrunk / np.linalg.norm(offset)
    return {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[relation]


def reads_exactly(scene: Scene, seen: Sequence[Seen]) -> bool:
    """The oracle found every thing of the scene, with colour, shape and place, and nothing else."""
    return sorted((t.color, t.shape, t.place) for t in scene) == sorted((s.color, s.shape, s.place) for s in seen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Say how well the oracle reads true scenes.")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes to read")
    args = parser.parse_args()
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(args.scenes)]
    right = [reads_exactly(scene, see(draw(scene, rng))) for scene in scenes]
    print(f"the oracle reads {sum(right)} of {len(right)} true scenes exactly ({sum(right) / len(right):.1%})")


if __name__ == "__main__":
    main()
