"""Make the training prompts: 1,000 for GRPO, 8,000 for the cold start, balanced, and disjoint from given benchmarks.

    python data/make_prompts.py --out_dir data --exclude benchmark.jsonl other.txt    (or: python -m data.make_prompts)

Writes generation_prompts_1k_filterd.txt (the published file name, with its spelling), its .jsonl twin with the fields,
and cold_start_prompts_8k.jsonl. GRPO's are of GenEval's six tasks, which every reward can judge; the cold start's are
of these and eight more. The same seed gives the same bytes. "Disjoint", from benchmarks and of the two files from each
other, means: no normal form of a text in common, and no common `data.grammar.canonical` tuple. None of our
objects is a COCO class, so GenEval's prompts cannot come up at all.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import vocabulary as words
from data.grammar import COLORS, LEAD, TASKS, article, canonical, plural, read, write
from data.prompts import dump_prompt, load_prompts
from data.text import normalize
from errors import UserError
from interfaces import Prompt
from run.options import option, parse, run_main

RL_STEM, COLD_START = "generation_prompts_1k_filterd", "cold_start_prompts_8k.jsonl"
MORE_TASKS = ("texture", "shape", "size", "spatial_3d", "negation", "complex", "non", "text")
_NUMBERS = ("", "one", "two", "three", "four", "five", "six")
_MISSES = 5_000  # draws in a row without a new prompt after which a task counts as exhausted


@dataclass
class PromptOptions:
    """Which prompts are made, and where they go."""

    out_dir: str = option("data", "Folder to write to.", changes="nothing")
    exclude: list[str] = option([], "Benchmark files: .txt, .jsonl, .json.", changes="run")
    seed: int = option(0, "The same seed gives the same bytes.", changes="run")
    rl: int = option(1000, "Prompts for GRPO.", changes="run", least=1)
    cold_start: int = option(8000, "Prompts for the cold start.", changes="run", least=1)


def make_prompts(
    seed: int | str,
    total: int,
    tasks: Sequence[str] = TASKS,
    excluded: Sequence[Prompt] = (),
    taken: Sequence[Prompt] = (),
) -> tuple[list[Prompt], Counter[str]]:
    """(`total` prompts, shuffled, as many of each task as of any other; candidates of each that were excluded).

    Where a task has fewer ("a photo of a <noun>" has as many as there are nouns) the later ones have more.

    Args:
        tasks: of TASKS and MORE_TASKS, the scarce ones first.
        excluded: prompts that must not come up, in no wording.
        taken: the same, but that they are not counted.

    Raises:
        UserError: there are no `total` prompts.
    """
    prompts, leaks = [], set()
    barred, seen = ({key for prompt in some for key in _keys(prompt)} for some in (excluded, taken))
    for i, task in enumerate(tasks):
        wanted, misses = len(prompts) + math.ceil((total - len(prompts)) / (len(tasks) - i)), 0
        for candidate in _candidates(task, random.Random(f"{seed}/{task}")):
            if len(prompts) == wanted or misses == _MISSES:
                break
            keys = _keys(candidate)
            misses += 1
            if not barred.isdisjoint(keys):
                leaks.add((task, candidate.text))
            elif seen.isdisjoint(keys):
                seen |= keys
                prompts.append(candidate)
                misses = 0
    if len(prompts) < total:
        raise UserError(f"only {len(prompts)} of {total} prompts of {', '.join(tasks)} exist; ask for fewer")
    random.Random(f"{seed}/order").shuffle(prompts)
    return prompts, Counter(task for task, _ in leaks)


def _keys(prompt: Prompt) -> set:
    return {normalize(prompt.text), canonical(prompt), canonical(read(prompt.text))}


def _deck(values: Sequence, rng: random.Random) -> Iterator:
    """Endless shuffled rounds of `values`, so that all are used equally often."""
    while True:
        yield from rng.sample(values, len(values))


class _Decks:
    """The parts of one task's prompts, each kind used evenly."""

    def __init__(self, rng: random.Random):
        self._decks = {name: _deck(values, rng) for name, values in _VALUES.items()}

    def one(self, name: str):
        return next(self._decks[name])

    def several(self, name: str, n: int) -> list:
        """The next n values; across the end of a round the same one could come twice, then it is drawn again."""
        values = [self.one(name) for _ in range(n)]
        return values if len({*values}) == n else self.several(name, n)

    def other(self, name: str, than: Sequence[str]) -> str:
        value = self.one(name)
        return value if value not in than else self.other(name, than)


_VALUES = {
    "nouns": words.NOUNS, "animal": words.ANIMALS, "thing": words.THINGS, "colors": COLORS, "counts": words.COUNTS,
    "relations": words.RELATIONS_2D, "depths": words.RELATIONS_3D, "textures": words.TEXTURES, "shapes": words.SHAPES,
    "sizes": words.SIZES, "reversed": (1, -1), "comparisons": words.COMPARISONS, "absences": words.ABSENCES,
    "scenes": words.SCENES, "looks": ("colors", "textures"), "compared": (True, False, False, False),
    "alone": (True, False), "surfaces": words.SURFACES, "said": words.SAID, "words": words.WORDS,
    "cases": words.CASES, **words.PARTS, **{f"forms of {nouns[0]}": forms for nouns, forms in words.FORMS.items()},
}  # fmt: skip


def _candidates(task: str, rng: random.Random) -> Iterator[Prompt]:
    of = _Decks(rng)
    while True:
        yield _MAKERS[task](of)


# ----- one candidate of a task that the grammar cannot write


def _bound(task: str, of: _Decks, attributes: Sequence[str]) -> Prompt:
    """ "a photo of a wooden anvil and a glass radio": two things, an attribute each."""
    nouns = of.several("nouns", 2)
    names = tuple(f"{attribute} {noun}" for attribute, noun in zip(attributes, nouns, strict=True))
    return Prompt(f"{LEAD} {_a(names[0])} and {_a(names[1])}", task, tuple(nouns), names)


def _size(of: _Decks) -> Prompt:
    """Sizes said of each thing, or one in four times by comparison, which no field holds."""
    if not of.one("compared"):
        return _bound("size", of, of.one("sizes")[:: of.one("reversed")])
    first, second = of.several("nouns", 2)
    return Prompt(f"{LEAD} {_a(first)} that is {of.one('comparisons')} {_a(second)}", "size", (first, second))


def _negation(of: _Decks) -> Prompt:
    """The fields name what is to be seen; what is not, the text alone says."""
    *seen, absent = of.several("nouns", 2 if of.one("alone") else 3)
    no = of.one("absences")
    comma = "," if len(seen) > 1 else ""
    nothing = f"{no} {absent if no.endswith(' no') else _a(absent)}"
    return Prompt(f"{LEAD} {' and '.join(map(_a, seen))}{comma} {nothing}", "negation", (*seen,))


def _scene(of: _Decks) -> Prompt:
    """Three things: one of a number, one of a colour or a material, one that it stands in relation to."""
    many, one, other = of.several("nouns", 3)
    number, relation = of.one("counts"), of.one("relations")
    thing = f"{of.one(of.one('looks'))} {one}"
    several = f"{_NUMBERS[number]} {plural(many)}"
    text = of.one("scenes").format(one=_a(thing), relation=relation, other=_a(other), many=several)
    return Prompt(text, "complex", (many, one, other), (many, thing, other), (one, relation, other), ((many, number),))


def _free(of: _Decks) -> Prompt:
    """A sentence with an action, a place, a moment or a manner; fields: its objects, a colour, a number."""
    noun = of.one("nouns")
    form = of.one(next(f"forms of {nouns[0]}" for nouns in words.FORMS if noun in nouns))
    nouns, names, counts = [], [], []

    def say(slot: re.Match) -> str:
        kind = slot[1]
        if kind in words.PARTS:
            return of.one(kind)
        nouns.append(noun if kind in ("it", "colored", "them") else of.other(kind, nouns))
        names.append(f"{of.one('colors')} {noun}" if kind == "colored" else nouns[-1])
        if kind != "them":
            return _a(names[-1])
        counts.append((noun, of.one("counts")))
        return f"{_NUMBERS[counts[0][1]]} {plural(noun)}"

    text = re.sub(r"{(\w+)}", say, form)
    colored = tuple(names) if names != nouns else ()
    return Prompt(text[0].upper() + text[1:], "non", tuple(nouns), colored, counts=tuple(counts))


def _text(of: _Decks) -> Prompt:
    """`a neon sign that says "Wet paint"`, one time in four with a thing beside it."""
    surface, said = of.one("surfaces"), of.one("cases")(of.one("words"))
    beside, nouns = "", ()
    if of.one("compared"):
        nouns = (of.one("nouns"),)
        beside = f" next to {_a(nouns[0])}"
    return Prompt(f'{_a(surface)} {of.one("said")} "{said}"{beside}', "text", (surface.lower(), *nouns))


def _a(name: str) -> str:
    return f"{article(name)} {name}"


_MAKERS: dict[str, Callable[[_Decks], Prompt]] = {
    "single_object": lambda of: read(write([of.one("nouns")])),
    "two_object": lambda of: read(write(of.several("nouns", 2))),
    "counting": lambda of: read(write([of.one("nouns")], count=of.one("counts"))),
    "colors": lambda of: read(write([of.one("nouns")], colors=[of.one("colors")])),
    "position": lambda of: read(write(of.several("nouns", 2), relation=of.one("relations"))),
    "color_attr": lambda of: read(write(of.several("nouns", 2), colors=of.several("colors", 2))),
    "spatial_3d": lambda of: read(write(of.several("nouns", 2), relation=of.one("depths"))),
    "texture": lambda of: _bound("texture", of, of.several("textures", 2)),
    "shape": lambda of: _bound("shape", of, of.several("shapes", 2)),
    "size": _size,
    "negation": _negation,
    "complex": _scene,
    "non": _free,
    "text": _text,
}


# ----- files and report


def make(options: PromptOptions) -> None:
    """Write the files and print the report; UserError as from `load_prompts` and `make_prompts`."""
    excluded = [prompt for path in options.exclude for prompt in load_prompts(path)]
    everything = (*TASKS, *MORE_TASKS)
    rl, leaks = make_prompts(f"{options.seed}/rl", options.rl, TASKS, excluded)
    cold, more_leaks = make_prompts(f"{options.seed}/cold start", options.cold_start, everything, excluded, rl)
    files = {f"{RL_STEM}.txt": [prompt.text for prompt in rl]}
    for name, prompts in ((f"{RL_STEM}.jsonl", rl), (COLD_START, cold)):
        files[name] = [json.dumps(dump_prompt(prompt)) for prompt in prompts]
    folder = Path(options.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode())
        print(f"wrote {folder / name}")
    columns = [Counter(prompt.task for prompt in rl), Counter(prompt.task for prompt in cold), leaks + more_leaks]
    rows = [(task, *(column[task] for column in columns)) for task in everything]
    rows.append(("all", *(column.total() for column in columns)))
    for task, *numbers in [("task", "GRPO", "cold start", "leaks"), *rows]:
        print(f"{task:<14}" + "".join(f"{number:>12}" for number in numbers))
    print(f"leaks are candidates that asked for one of {len(excluded)} benchmark prompts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("make_prompts", lambda: make(*parse([PromptOptions], None, words)))


if __name__ == "__main__":
    sys.exit(main())
