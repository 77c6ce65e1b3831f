"""What is compared: ways from a prompt to a picture. Every one draws sample k of a prompt from the same noise.

    raw         the user's own words
    rewrite     the policy's rewrite, greedy; the user's own words where the answer cannot be read
    given       rewrites from a file
    best_of     n sampled rewrites, all drawn; the picture that a reward likes best is kept
    revise      one rewrite is drawn and looked at; the policy is told what the picture lacks and answers again, up to
                k times; the picture that the reward likes best is kept, and once nothing is missing no more is drawn
    drawn       pictures that are there already, in the benchmark's own layout (layouts.py)

A reward that selects sees the ORIGINAL prompt and the picture. What it must not be is the benchmark's own judge: then
the score says how well the judge was pleased.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from data.grammar import article
from evaluation.benchmark import Item
from interfaces import Prompt, Renderer, Reward, Sample
from prompting import messages, revision

SATISFIED = 0.5  # of a reward's range: below, a thing is missing; above in all, nothing is


@dataclass(frozen=True)
class Drawn:
    """What a system made of one (prompt, sample).

    Attributes:
        text: what was drawn: the rewrite, or the user's own words.
        readable: whether the policy's answer could be read; True where none was asked for.
        image: None if it could not be drawn.
        pictures: drawn on the way.
        seconds: of rewriting again, drawing and selecting, shared evenly among what was drawn together.
    """

    text: str
    readable: bool
    image: Image.Image | None
    pictures: int
    seconds: float


class Answer(Protocol):
    """One of the policy's answers, as `inference.Rewrite`."""

    rewrite: str
    readable: bool
    completion: str


class Sampler(Protocol):
    """A policy that can be asked again, as `inference.Reprompter.sample`."""

    def __call__(
        self, text: str, conversation: list[dict[str, str]], count: int, temperature: float
    ) -> Sequence[Answer]: ...


System = Callable[[Sequence[Item], Sequence[int], Callable[[Item, int], int]], list[Drawn]]
"""(items, sample numbers, seed of (item, sample)) -> one Drawn per item and sample, items outermost."""


@dataclass(frozen=True)
class Fixed:
    """One text a prompt: raw, rewritten or given.

    Args:
        texts: item id -> (text, readable).
        seconds: item id -> what rewriting it took; {} for none.
    """

    renderer: Renderer
    texts: Mapping[str, tuple[str, bool]]
    seconds: Mapping[str, float]

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        rows = [(item, k) for item in items for k in samples]
        started = time.perf_counter()
        pictures = self.renderer([self.texts[i.id][0] for i, _ in rows], [seed(i, k) for i, k in rows])
        each = (time.perf_counter() - started) / len(rows)
        return [
            Drawn(*self.texts[item.id], image, 1, each + self.seconds.get(item.id, 0.0) / len(samples))
            for (item, _), image in zip(rows, pictures, strict=True)
        ]


@dataclass(frozen=True)
class Chooser:
    """A reward that says how well pictures keep their original prompts."""

    reward: Reward

    def __call__(self, rows: Sequence[tuple[Prompt, Image.Image | None]]) -> list[float]:
        """A score per picture; the reward's lowest for one that could not be drawn or judged: it is not chosen."""
        there = [Sample(prompt, "", "", (image,)) for prompt, image in rows if image is not None]
        scores = iter(self.reward(there) if there else ())
        found = [None if image is None else next(scores) for _, image in rows]
        return [self.reward.range[0] if score is None else score for score in found]

    def missing(self, rows: Sequence[tuple[Prompt, Image.Image | None]]) -> list[list[str]]:
        """Of the things that each prompt names those that the reward does not find in its picture, in words."""
        asked = [(i, name, thing) for i, (prompt, _) in enumerate(rows) for name, thing in _things(prompt)]
        scores = self([(_alone(name, thing), rows[i][1]) for i, name, thing in asked])
        lacking: list[list[str]] = [[] for _ in rows]
        for (i, name, _), score in zip(asked, scores, strict=True):
            if not self.is_content(score):
                lacking[i].append(f"{article(name)} {name}")
        return lacking

    def is_content(self, score: float) -> bool:
        """Whether a score lies in the upper part of the reward's range."""
        low, high = self.reward.range
        return score >= low + SATISFIED * (high - low)


def _things(prompt: Prompt) -> list[tuple[str, str]]:
    """(name with its attribute, name) of each thing that the prompt names."""
    names = prompt.attr_nouns if len(prompt.attr_nouns) == len(prompt.nouns) else prompt.nouns
    return list(zip(names, prompt.nouns, strict=True))


def _alone(name: str, thing: str) -> Prompt:
    """The prompt that asks for that one thing."""
    return Prompt(f"a photo of {article(name)} {name}", "single_object", (thing,), (name,) if name != thing else ())


@dataclass(frozen=True)
class BestOf:
    """`n` sampled rewrites of a prompt, for each sample drawn from its noise; the best picture of them."""

    renderer: Renderer
    sampler: Sampler
    choose: Chooser
    n: int
    reasoning: bool = True
    temperature: float = 1.0

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        started = time.perf_counter()
        answers = {item.id: self._ask(item.prompt.text) for item in items}
        rows = [(item, k, answer) for item in items for k in samples for answer in answers[item.id]]
        images = self.renderer([answer.rewrite for *_, answer in rows], [seed(item, k) for item, k, _ in rows])
        scores = self.choose([(item.prompt, image) for (item, *_), image in zip(rows, images, strict=True)])
        best = [max(range(i, i + self.n), key=scores.__getitem__) for i in range(0, len(rows), self.n)]
        each = (time.perf_counter() - started) / len(best)
        return [Drawn(rows[i][2].rewrite, rows[i][2].readable, images[i], self.n, each) for i in best]

    def _ask(self, text: str) -> Sequence[Answer]:
        return self.sampler(text, messages(text, self.reasoning), self.n, self.temperature)


@dataclass
class _Try:
    """One (prompt, sample) on its way: the answer to be drawn next, and the best so far."""

    prompt: Prompt
    seed: int
    answer: Answer
    score: float = float("-inf")
    best: Answer | None = None
    image: Image.Image | None = None
    pictures: int = 0


@dataclass(frozen=True)
class Revise:
    """Draw, look, tell the policy what is missing, draw again: at most `rounds` more pictures a sample."""

    renderer: Renderer
    sampler: Sampler
    choose: Chooser
    rounds: int
    first: Mapping[str, Answer]  # item id -> the greedy answer that the first picture is drawn from
    reasoning: bool = True
    temperature: float = 1.0

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        started = time.perf_counter()
        tries = [_Try(item.prompt, seed(item, k), self.first[item.id]) for item in items for k in samples]
        open_ = list(tries)
        for turn in range(1 + self.rounds):
            missing = self._draw_and_look(open_)
            open_ = [one for one in open_ if missing[id(one)] is not None]
            if not open_ or turn == self.rounds:
                break
            for one in open_:
                one.answer = self._again(one.prompt.text, one.answer, missing[id(one)], turn + 1)
        each = (time.perf_counter() - started) / len(tries)
        return [Drawn(one.best.rewrite, one.best.readable, one.image, one.pictures, each) for one in tries]

    def _draw_and_look(self, tries: Sequence[_Try]) -> dict[int, list[str] | None]:
        """Draws each try's answer and keeps the best; what its picture lacks, None where it lacks nothing."""
        images = self.renderer([one.answer.rewrite for one in tries], [one.seed for one in tries])
        rows = [(one.prompt, image) for one, image in zip(tries, images, strict=True)]
        found = {}
        for one, image, score, lacks in zip(tries, images, self.choose(rows), self.choose.missing(rows), strict=True):
            one.pictures += 1
            if one.best is None or score > one.score:
                one.score, one.best, one.image = score, one.answer, image
            content = image is not None and self.choose.is_content(score) and not lacks
            found[id(one)] = None if content else lacks
        return found

    def _again(self, text: str, answer: Answer, missing: Sequence[str], turn: int) -> Answer:
        """The next answer; where the policy cannot follow a second turn, a fresh one to the request itself."""
        asked = revision(text, answer.completion, missing, self.reasoning)
        (again,) = self.sampler(text, asked, 1, self.temperature)
        if again.readable and again.rewrite != answer.rewrite:
            return again
        return self.sampler(text, messages(text, self.reasoning), turn + 1, self.temperature)[-1]
