"""Make the training prompts: GenEval-style requests, balanced over the six tasks, disjoint from given benchmarks.

    python data/make_prompts.py --out_dir data --exclude benchmark.jsonl other.txt    (or: python -m data.make_prompts)

Writes generation_prompts_1k_filterd.txt (the published file name, with its spelling) and its .jsonl twin with the
fields. The same seed gives the same bytes. "Disjoint" means: no text in common, case and blanks aside, and no common
`data.grammar.canonical` tuple. None of our objects is a COCO class, so GenEval's prompts cannot come up at all.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.grammar import COLORS, TASKS, canonical, normalize, read, write
from data.prompts import DataError, dump_prompt, load_prompts
from interfaces import Prompt

FILE_STEM = "generation_prompts_1k_filterd"
COUNTS = (2, 3, 4, 5, 6)
RELATIONS = ("left of", "right of", "above", "below", "next to")  # 2-D ones, that a detector can check
NOUNS = tuple(
    noun.strip()
    for noun in """
    accordion, acorn, alarm clock, anchor, anvil, apron, armchair, avocado, axe, bagel, balloon, banjo, barrel,
    bathtub, beach ball, beetle, bell, binder, birdcage, birdhouse, blender, bonsai tree, bookshelf, boomerang,
    bracelet, briefcase, broom, bucket, butterfly, button, cactus, calculator, camel, camera, candle, canoe,
    cauldron, cello, chalkboard, chandelier, cheese wheel, cherry, chess board, clipboard, clothes iron, coconut,
    coin, comb, compass, cookie, corkscrew, cowboy hat, crab, croissant, crown, cupcake, curtain, cushion,
    desk lamp, dinosaur, dolphin, doorbell, dragonfly, drawer, drum, duck, dumbbell, easel, eggplant, envelope,
    eraser, feather, fishing rod, flag, flamingo, flashlight, flute, fountain, fox, frog, funnel, garlic bulb,
    gift box, globe, goldfish, goose, gramophone, guitar, hammer, hammock, harp, hedgehog, helicopter, helmet,
    horseshoe, hourglass, ice cream cone, igloo, jacket, jar, jellyfish, jewelry box, kangaroo, kettle, key, koala,
    ladder, ladybug, lantern, lemon, lighthouse, lizard, lobster, lollipop, magnet, mailbox, mango, mask, medal,
    microphone, mirror, mitten, mug, mushroom, necklace, nest, notebook, octopus, ostrich, owl, paddle, paintbrush,
    palm tree, panda, parachute, parrot, peach, peacock, pear, pencil, penguin, piano, picnic basket, piggy bank,
    pillow, pineapple, pinwheel, pumpkin, puzzle piece, rabbit, raccoon, radio, ring, robot, rocket, rocking chair,
    ruler, saddle, sailboat, saxophone, scarf, screwdriver, seashell, sewing machine, shovel, snail, snowman,
    soccer cleat, sombrero, spider, squirrel, starfish, statue, stethoscope, stool, strawberry, submarine,
    sunflower, swan, tambourine, teapot, telescope, tent, thermometer, tiger, tomato, top hat, tractor,
    treasure chest, tricycle, trophy, trumpet, tulip, turtle, typewriter, ukulele, unicycle, violin, wallet,
    walrus, watering can, watermelon, wheelbarrow, whistle, windmill, wolf, wrench, xylophone, yacht
    """.split(",")
)  # everyday things that are no COCO class and hold no colour word
_MISSES = 5_000  # draws in a row without a new prompt after which a task counts as exhausted


@dataclass
class Report:
    """What came of it: prompts kept per task, candidates dropped as repeats, candidates dropped as leaks."""

    kept: Counter = field(default_factory=Counter)
    repeats: int = 0
    leaks: int = 0


def make_prompts(seed: int, per_task: int, excluded: Sequence[Prompt] = ()) -> tuple[list[Prompt], Report]:
    """`per_task` prompts of each task, shuffled; a pure function of its arguments.

    Args:
        seed: any whole number.
        per_task: from 1; at most `len(NOUNS)`, since "a photo of a <noun>" has no more.
        excluded: prompts that must not come up, in no wording.

    Raises:
        DataError: a task has fewer than `per_task` prompts left.
    """
    report, seen, prompts = Report(), set(), []
    barred = {key for prompt in excluded for key in _keys(prompt)}
    for task in TASKS:
        candidates, misses = _candidates(task, random.Random(f"{seed}/{task}")), 0
        while report.kept[task] < per_task and misses < _MISSES:
            candidate = next(candidates)
            keys = _keys(candidate)
            misses += 1
            if not barred.isdisjoint(keys):
                report.leaks += 1
            elif not seen.isdisjoint(keys):
                report.repeats += 1
            else:
                seen |= keys
                prompts.append(candidate)
                report.kept[task] += 1
                misses = 0
        if report.kept[task] < per_task:
            n = report.kept[task]
            raise DataError(f"only {n} of {per_task} {task} prompts exist; give a smaller --per_task or --exclude")
    random.Random(f"{seed}/order").shuffle(prompts)
    return prompts, report


def write_files(prompts: Sequence[Prompt], out_dir: Path) -> tuple[Path, Path]:
    """Write the .txt and its .jsonl twin, line by line the same prompts; gives back both paths."""
    out_dir.mkdir(parents=True, exist_ok=True)
    text_file, json_file = out_dir / f"{FILE_STEM}.txt", out_dir / f"{FILE_STEM}.jsonl"
    text_file.write_bytes("".join(f"{prompt.text}\n" for prompt in prompts).encode())
    json_file.write_bytes("".join(f"{json.dumps(dump_prompt(prompt))}\n" for prompt in prompts).encode())
    return text_file, json_file


def _keys(prompt: Prompt) -> set:
    return {normalize(prompt.text), canonical(prompt), canonical(read(prompt.text))}


def _deck(values: Sequence, rng: random.Random) -> Iterator:
    """Endless shuffled rounds of `values`, so that all are used equally often."""
    while True:
        yield from rng.sample(values, len(values))


def _candidates(task: str, rng: random.Random) -> Iterator[Prompt]:
    nouns, colors = _deck(NOUNS, rng), _deck(COLORS, rng)
    counts, relations = _deck(COUNTS, rng), _deck(RELATIONS, rng)
    n_nouns = 2 if task in ("two_object", "position", "color_attr") else 1
    while True:
        yield read(
            write(
                _different(nouns, n_nouns),
                colors=_different(colors, n_nouns) if task in ("colors", "color_attr") else (),
                relation=next(relations) if task == "position" else "",
                count=next(counts) if task == "counting" else 1,
            )
        )


def _different(deck: Iterator, n: int) -> list:
    """The next n values; across the end of a round the same one could come twice, then it is drawn again."""
    values = [next(deck) for _ in range(n)]
    return values if len({*values}) == n else _different(deck, n)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write both files, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=Path("data"), help="where both files go (default: data)")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="benchmark files: .txt, .jsonl, .json")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--per_task", type=int, default=170, help="prompts of each of the six tasks (default: 170)")
    args = parser.parse_args(argv)
    try:
        excluded = [prompt for path in args.exclude for prompt in load_prompts(path)]
        prompts, report = make_prompts(args.seed, args.per_task, excluded)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for path in write_files(prompts, args.out_dir):
        print(f"wrote {path}")
    print(f"{len(prompts)} prompts: " + ", ".join(f"{task} {n}" for task, n in report.kept.items()))
    print(f"left out: {report.repeats} repeats, {report.leaks} leaks from {len(excluded)} benchmark prompts")


if __name__ == "__main__":
    main()
