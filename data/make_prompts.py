"""Make the training prompts: 1,000 for GRPO, 8,000 for the cold start, balanced, and disjoint from given benchmarks.

    python data/make_prompts.py --out_dir data --exclude benchmark.jsonl other.txt    (or: python -m data.make_prompts)

Writes generation_prompts_1k_filterd.txt (the published file name, with its spelling), its .jsonl twin with the fields,
and cold_start_prompts_8k.jsonl. GRPO's are of GenEval's six tasks, which every reward can judge; the cold start's are
of these and seven more. The same seed gives the same bytes. "Disjoint", from benchmarks and of the two files from each
other, means: no text in common, case and blanks aside, and no common `data.grammar.canonical` tuple. None of our
objects is a COCO class, so GenEval's prompts cannot come up at all.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import vocabulary as words
from data.grammar import COLORS, LEAD, TASKS, article, canonical, normalize, plural, read, write
from data.prompts import DataError, dump_prompt, load_prompts
from interfaces import Prompt

RL_STEM, COLD_START = "generation_prompts_1k_filterd", "cold_start_prompts_8k.jsonl"
MORE_TASKS = ("texture", "shape", "size", "spatial_3d", "negation", "complex", "non")
_NUMBERS = ("", "one", "two", "three", "four", "five", "six")
_MISSES = 5_000  # draws in a row without a new prompt after which a task counts as exhausted


@dataclass
class Report:
    """What came of it: prompts kept per task, candidates dropped as repeats, candidates dropped as leaks."""

    kept: Counter = field(default_factory=Counter)
    repeats: int = 0
    leaks: int = 0


def make_prompts(
    seed: int, total: int, tasks: Sequence[str] = TASKS, excluded: Sequence[Prompt] = ()
) -> tuple[list[Prompt], Report]:
    """`total` prompts, shuffled, as many of each task as of any other; a pure function of its arguments.

    Where a task has fewer ("a photo of a <noun>" has as many as there are nouns) the later ones have more.

    Args:
        seed: any whole number.
        total: from 1.
        tasks: of TASKS and MORE_TASKS, the scarce ones first.
        excluded: prompts that must not come up, in no wording.

    Raises:
        DataError: there are no `total` prompts.
    """
    report, prompts = Report(), []
    seen, barred = set(), {key for prompt in excluded for key in _keys(prompt)}
    for i, task in enumerate(tasks):
        candidates, misses = _candidates(task, random.Random(f"{seed}/{task}")), 0
        wanted = -(-(total - len(prompts)) // (len(tasks) - i))
        while report.kept[task] < wanted and misses < _MISSES:
            candidate = next(candidates)
            keys, misses = _keys(candidate), misses + 1
            if not barred.isdisjoint(keys):
                report.leaks += 1
            elif not seen.isdisjoint(keys):
                report.repeats += 1
            else:
                seen |= keys
                prompts.append(candidate)
                report.kept[task] += 1
                misses = 0
    if len(prompts) < total:
        raise DataError(f"only {len(prompts)} of {total} prompts of {', '.join(tasks)} exist; ask for fewer")
    random.Random(f"{seed}/order").shuffle(prompts)
    return prompts, report


def _keys(prompt: Prompt) -> set:
    return {normalize(prompt.text), canonical(prompt), canonical(read(prompt.text))}


def _deck(values: Sequence, rng: random.Random) -> Iterator:
    """Endless shuffled rounds of `values`, so that all are used equally often."""
    while True:
        yield from rng.sample(values, len(values))


def _different(deck: Iterator, n: int) -> list:
    """The next n values; across the end of a round the same one could come twice, then it is drawn again."""
    values = [next(deck) for _ in range(n)]
    return values if len({*values}) == n else _different(deck, n)


class _Decks(NamedTuple):
    """What one task's prompts are made of, each used evenly."""

    nouns: Iterator
    colors: Iterator
    counts: Iterator
    relations: Iterator
    depths: Iterator
    textures: Iterator
    shapes: Iterator
    sizes: Iterator
    forms: Iterator
    rng: random.Random


def _candidates(task: str, rng: random.Random) -> Iterator[Prompt]:
    decks = (
        words.NOUNS, COLORS, words.COUNTS, words.RELATIONS_2D, words.RELATIONS_3D, words.TEXTURES, words.SHAPES,
        words.SIZES, range(4),
    )  # fmt: skip
    of = _Decks(*(_deck(values, rng) for values in decks), rng)
    while True:
        yield _MAKERS[task](of)


# ----- GenEval's six


def _single(of: _Decks) -> Prompt:
    return read(write([next(of.nouns)]))


def _two(of: _Decks) -> Prompt:
    return read(write(_different(of.nouns, 2)))


def _counting(of: _Decks) -> Prompt:
    return read(write([next(of.nouns)], count=next(of.counts)))


def _colored(of: _Decks) -> Prompt:
    return read(write([next(of.nouns)], colors=[next(of.colors)]))


def _position(of: _Decks) -> Prompt:
    return read(write(_different(of.nouns, 2), relation=next(of.relations)))


def _binding(of: _Decks) -> Prompt:
    return read(write(_different(of.nouns, 2), colors=_different(of.colors, 2)))


# ----- seven more


def _bound(task: str, of: _Decks, attributes: Sequence[str]) -> Prompt:
    """ "a photo of a wooden drum and a glass key": two things, an attribute each."""
    nouns = _different(of.nouns, 2)
    names = tuple(f"{attribute} {noun}" for attribute, noun in zip(attributes, nouns, strict=True))
    return Prompt(f"{LEAD} {_a(names[0])} and {_a(names[1])}", task, tuple(nouns), names)


def _texture(of: _Decks) -> Prompt:
    return _bound("texture", of, _different(of.textures, 2))


def _shape(of: _Decks) -> Prompt:
    return _bound("shape", of, _different(of.shapes, 2))


def _size(of: _Decks) -> Prompt:
    """Sizes said of each thing, or one in four times by comparison, which no field holds."""
    if next(of.forms):
        return _bound("size", of, of.rng.sample(next(of.sizes), 2))
    first, second = _different(of.nouns, 2)
    text = f"{LEAD} {_a(first)} that is {of.rng.choice(words.COMPARISONS)} {_a(second)}"
    return Prompt(text, "size", (first, second))


def _depth(of: _Decks) -> Prompt:
    return read(write(_different(of.nouns, 2), relation=next(of.depths)))


def _negation(of: _Decks) -> Prompt:
    """The fields name what is to be seen; what is not, the text alone says."""
    first, second, absent = _different(of.nouns, 3)
    no = of.rng.choice(words.ABSENCES)
    nothing = f"{no} {absent}" if no.endswith(" no") else f"{no} {_a(absent)}"
    if next(of.forms) % 2:
        return Prompt(f"{LEAD} {_a(first)} {nothing}", "negation", (first,))
    return Prompt(f"{LEAD} {_a(first)} and {_a(second)}, {nothing}", "negation", (first, second))


def _scene(of: _Decks) -> Prompt:
    """Three things: one of a number, one of a colour or a material, one that it stands in relation to."""
    many, one, other = _different(of.nouns, 3)
    number, relation = next(of.counts), next(of.relations)
    attribute = next(of.colors) if of.rng.random() < 0.5 else next(of.textures)
    several, thing = f"{_NUMBERS[number]} {plural(many)}", f"{attribute} {one}"
    text = (
        f"{several} and {_a(thing)} {relation} {_a(other)}",
        f"{_a(thing)} {relation} {_a(other)}, with {several} around them",
        f"a scene with {_a(thing)} {relation} {_a(other)} and {several} in the background",
        f"{several}, and {_a(thing)} that is {relation} {_a(other)}",
    )[next(of.forms)]
    nouns, spatial = (many, one, other), (one, relation, other)
    return Prompt(text, "complex", nouns, (many, thing, other), spatial, ((many, number),))


def _free(of: _Decks) -> Prompt:
    """A sentence with a place, a moment, a manner, somebody who does something; fields: its things."""
    one, other = _different(of.nouns, 2)
    place, moment, manner = (of.rng.choice(v) for v in (words.PLACES, words.MOMENTS, words.MANNERS))
    state, deed = of.rng.choice(words.STATES), of.rng.choice(words.DEEDS)
    text, nouns = (
        (f"{_a(one)} {state} {place}, {moment}", (one,)),
        (f"{manner} {_a(one)} and {_a(other)} {place}", (one, other)),
        (f"{place} {moment}, {deed} {_a(one)} while {_a(other)} {state}", (one, other)),
        (f"{manner} {_a(one)}: it {state}, {moment}, and {deed} it", (one,)),
    )[next(of.forms)]
    return Prompt(text, "non", nouns)


def _a(name: str) -> str:
    return f"{article(name)} {name}"


_MAKERS: dict[str, Callable[[_Decks], Prompt]] = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colored,
    "position": _position,
    "color_attr": _binding,
    "texture": _texture,
    "shape": _shape,
    "size": _size,
    "spatial_3d": _depth,
    "negation": _negation,
    "complex": _scene,
    "non": _free,
}


# ----- files and report


def write_files(rl: Sequence[Prompt], cold_start: Sequence[Prompt], out_dir: Path) -> list[Path]:
    """Write GRPO's .txt and .jsonl, line by line the same prompts, and the cold start's .jsonl; returns the paths."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {f"{RL_STEM}.txt": [prompt.text for prompt in rl]}
    for name, prompts in ((f"{RL_STEM}.jsonl", rl), (COLD_START, cold_start)):
        files[name] = [json.dumps(dump_prompt(prompt)) for prompt in prompts]
    for name, lines in files.items():
        (out_dir / name).write_bytes("".join(f"{line}\n" for line in lines).encode())
    return [out_dir / name for name, lines in files.items() if lines]


def evenness(prompts: Sequence[Prompt]) -> str:
    """How often the most and the least used object, colour and number come up."""
    uses = {
        "objects": Counter(dict.fromkeys(words.NOUNS, 0)),
        "colours": Counter(dict.fromkeys(COLORS, 0)),
        "numbers": Counter(dict.fromkeys(words.COUNTS, 0)),
    }
    for prompt in prompts:
        uses["objects"].update(prompt.nouns)
        uses["colours"].update(color for name in prompt.attr_nouns if (color := name.split()[0]) in COLORS)
        uses["numbers"].update(number for _, number in prompt.counts)
    said = (f"{len(use)} {name}, {min(use.values())} to {max(use.values())} times" for name, use in uses.items())
    return "; ".join(said)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the files, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=Path("data"), help="where the files go (default: data)")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="benchmark files: .txt, .jsonl, .json")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--rl", type=int, default=1000, help="prompts for GRPO (default: 1000)")
    parser.add_argument("--cold_start", type=int, default=8000, help="prompts for the cold start (default: 8000)")
    args = parser.parse_args(argv)
    try:
        excluded = [prompt for path in args.exclude for prompt in load_prompts(path)]
        rl, for_rl = make_prompts(args.seed, args.rl, TASKS, excluded)
        both = (*TASKS, *MORE_TASKS)
        cold_start, for_cold_start = make_prompts(args.seed + 1, args.cold_start, both, [*excluded, *rl])
    except DataError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for path in write_files(rl, cold_start, args.out_dir):
        print(f"wrote {path}")
    for name, prompts, report in (("GRPO", rl, for_rl), ("cold start", cold_start, for_cold_start)):
        print(f"{name}: {len(prompts)} prompts: " + ", ".join(f"{task} {n}" for task, n in report.kept.items()))
        print(f"  {evenness(prompts)}")
        print(f"  left out: {report.repeats} repeats, {report.leaks} leaks", end="")
        print(
            f" from {len(excluded)} benchmark prompts" + (f" and {len(rl)} of GRPO" if prompts is cold_start else "")
        )


if __name__ == "__main__":
    main()
