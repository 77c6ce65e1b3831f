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
    """One of the policy's answers, as `scripts.reprompt.Rewrite`."""

    rewrite: str
    readable: bool
    completion: str


class Sampler(Protocol):
    """A policy that can be asked again, as `scripts.reprompt.Reprompter.sample`."""

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
    """A reward that says which of several pictures keeps the original prompt best."""

    reward: Reward

    def __call__(self, prompt: Prompt, images: Sequence[Image.Image | None]) -> list[float]:
        """A score per picture; the reward's lowest for one that could not be drawn or judged: it is not chosen."""
        there = [image for image in images if image is not None]
        scores = iter(self.reward([Sample(prompt, "", "", (image,)) for image in there]) if there else ())
        found = [None if image is None else next(scores) for image in images]
        return [self.reward.range[0] if score is None else score for score in found]

    def missing(self, prompt: Prompt, image: Image.Image) -> list[str]:
        """Of the things that the prompt names those that the reward does not find in the picture, in words."""
        wanted = [(name, thing) for name, thing in zip(prompt.attr_nouns or prompt.nouns, prompt.nouns, strict=False)]
        asked = [Prompt(f"a photo of {article(n)} {n}", "single_object", (t,), (n,) * (n != t)) for n, t in wanted]
        scores = self.reward([Sample(one, "", "", (image,)) for one in asked]) if asked else []
        low = [not self.is_content(score) for score in scores]
        return [f"{article(name)} {name}" for (name, _), gone in zip(wanted, low, strict=True) if gone]

    def is_content(self, score: float | None) -> bool:
        """Whether a score lies in the upper part of the reward's range; None does not."""
        low, high = self.reward.range
        return score is not None and score >= low + SATISFIED * (high - low)


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
        return [drawn for item in items for drawn in self._one(item, samples, seed)]

    def _one(self, item: Item, samples: Sequence[int], seed: Callable) -> list[Drawn]:
        started, text = time.perf_counter(), item.prompt.text
        answers = self.sampler(text, messages(text, self.reasoning), self.n, self.temperature)
        rows = [(answer, k) for k in samples for answer in answers]
        images = self.renderer([answer.rewrite for answer, _ in rows], [seed(item, k) for _, k in rows])
        scores = self.choose(item.prompt, images)
        best = [max(range(i, i + self.n), key=scores.__getitem__) for i in range(0, len(rows), self.n)]
        each = (time.perf_counter() - started) / len(samples)
        return [Drawn(rows[i][0].rewrite, rows[i][0].readable, images[i], self.n, each) for i in best]


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
        return [self._one(item, seed(item, k)) for item in items for k in samples]

    def _one(self, item: Item, seed: int) -> Drawn:
        started, prompt, answer = time.perf_counter(), item.prompt, self.first[item.id]
        tried: list[tuple[float, Answer, Image.Image | None]] = []
        while True:
            (image,) = self.renderer([answer.rewrite], [seed])
            (score,) = self.choose(prompt, [image])
            tried.append((score, answer, image))
            missing = self.choose.missing(prompt, image) if image is not None else []
            if len(tried) > self.rounds or (self.choose.is_content(score) and not missing):
                break
            answer = self._again(prompt.text, answer, missing, len(tried))
        score, answer, image = max(tried, key=lambda row: row[0])
        return Drawn(answer.rewrite, answer.readable, image, len(tried), time.perf_counter() - started)

    def _again(self, text: str, answer: Answer, missing: Sequence[str], turn: int) -> Answer:
        """The next answer; where the policy cannot follow a second turn, a fresh one to the request itself."""
        asked = revision(text, answer.completion, missing, self.reasoning)
        (again,) = self.sampler(text, asked, 1, self.temperature)
        if again.readable and again.rewrite != answer.rewrite:
            return again
        return self.sampler(text, messages(text, self.reasoning), turn + 1, self.temperature)[-1]
