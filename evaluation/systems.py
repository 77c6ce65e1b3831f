"""What is compared: ways from a prompt to a picture. Every one draws sample k of a prompt from the same noise.

    raw         the user's own words
    planned     the same words, and a plan that the renderer (a Janus) writes itself
    tuned       the same words, drawn with what `pref_grpo` or `t2i_r1` made of the renderer
    rewrite     the policy's rewrite, greedy; the user's own words where the answer cannot be read
    given       rewrites from a file
    best_of     n sampled rewrites, all drawn; the picture that a reward likes best is kept
    revise      one rewrite is drawn and looked at; the policy is told what the picture lacks and answers again, up to
                k times; the picture that the reward likes best is kept, and once nothing is missing no more is drawn
    drawn       pictures that are there already, in the benchmark's own layout (layouts.py)

A reward that selects sees the ORIGINAL prompt and the picture. It must not be the benchmark's own judge, because the
score would then say how well the judge was pleased.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from data.grammar import article
from evaluation.benchmark import Item
from inference import Reprompter, Rewrite
from interfaces import Prompt, Renderer, Reward, Sample
from prompting import messages, revision

SATISFIED = 0.5  # share of a reward's range: a thing that scores less is missing from the picture


@dataclass(frozen=True)
class Drawn:
    """What a system made of one (prompt, sample).

    Attributes:
        text: what was drawn: the rewrite, or the user's own words.
        readable: whether the policy's answer could be read; True where none was asked for.
        image: None if it could not be drawn, or none of those to choose from could be scored.
        pictures: drawn on the way.
        seconds: of rewriting again, drawing and selecting, shared evenly among what was drawn together.
    """

    text: str
    readable: bool
    image: Image.Image | None
    pictures: int
    seconds: float


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

    def __call__(self, rows: Sequence[tuple[Prompt, Image.Image | None]]) -> list[float | None]:
        """A score per picture; None for one that could not be drawn or scored: it is not chosen."""
        there = [Sample(prompt, "", "", (image,)) for prompt, image in rows if image is not None]
        scores = iter(self.reward(there) if there else ())
        return [None if image is None else next(scores) for _, image in rows]

    def missing(self, rows: Sequence[tuple[Prompt, Image.Image | None]]) -> list[list[str]]:
        """For each row the things of its prompt that the reward does not find in its picture, in words."""
        asked = [(i, name, thing) for i, (prompt, _) in enumerate(rows) for name, thing in _things(prompt)]
        scores = self([(_alone(name, thing), rows[i][1]) for i, name, thing in asked])
        lacking: list[list[str]] = [[] for _ in rows]
        for (i, name, _), score in zip(asked, scores, strict=True):
            if score is not None and not self.is_content(score):
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
    policy: Reprompter
    choose: Chooser
    n: int
    temperature: float

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        started = time.perf_counter()
        answers = {item.id: self._ask(item.prompt.text) for item in items}
        rows = [(item, k, answer) for item in items for k in samples for answer in answers[item.id]]
        images = self.renderer([answer.rewrite for *_, answer in rows], [seed(item, k) for item, k, _ in rows])
        scores = self.choose([(item.prompt, image) for (item, *_), image in zip(rows, images, strict=True)])
        images = [None if score is None else image for image, score in zip(images, scores, strict=True)]
        rank = [(score is not None, score) for score in scores]
        best = [max(range(i, i + self.n), key=rank.__getitem__) for i in range(0, len(rows), self.n)]
        each = (time.perf_counter() - started) / len(best)
        return [Drawn(rows[i][2].rewrite, rows[i][2].readable, images[i], self.n, each) for i in best]

    def _ask(self, text: str) -> Sequence[Rewrite]:
        return self.policy.sample(text, messages(text, self.policy.reasoning), self.n, self.temperature)


@dataclass
class _Try:
    """One (prompt, sample): the best answer so far, the next one, what its picture lacks (None: no score)."""

    prompt: Prompt
    seed: int
    best: Rewrite
    answer: Rewrite
    missing: Sequence[str] | None = None
    score: float = float("-inf")
    image: Image.Image | None = None
    pictures: int = 0


@dataclass(frozen=True)
class Revise:
    """Draw, look, tell the policy what is missing, draw again: at most `rounds` more pictures a sample."""

    renderer: Renderer
    policy: Reprompter
    choose: Chooser
    rounds: int
    first: Mapping[str, Rewrite]  # item id -> the greedy answer that the first picture is drawn from
    temperature: float

    def __call__(self, items: Sequence[Item], samples: Sequence[int], seed: Callable) -> list[Drawn]:
        started = time.perf_counter()
        tries = [_Try(item.prompt, seed(item, k), *[self.first[item.id]] * 2) for item in items for k in samples]
        wrong = self._draw(tries)
        for turn in range(1, 1 + self.rounds):
            for one in wrong:
                one.answer = self._again(one, turn)
            wrong = self._draw(wrong) if wrong else []
        each = (time.perf_counter() - started) / len(tries)
        return [Drawn(one.best.rewrite, one.best.readable, one.image, one.pictures, each) for one in tries]

    def _draw(self, tries: Sequence[_Try]) -> list[_Try]:
        """Draw each try's answer and keep its best picture; returns the tries whose new picture is not right."""
        images = self.renderer([one.answer.rewrite for one in tries], [one.seed for one in tries])
        rows = [(one.prompt, image) for one, image in zip(tries, images, strict=True)]
        wrong = []
        for one, image, score, lacks in zip(tries, images, self.choose(rows), self.choose.missing(rows), strict=True):
            one.pictures, one.missing = one.pictures + 1, None if score is None else lacks
            if score is not None and score > one.score:
                one.score, one.best, one.image = score, one.answer, image
            if score is None or lacks or not self.choose.is_content(score):
                wrong.append(one)
        return wrong

    def _again(self, one: _Try, turn: int) -> Rewrite:
        """The next answer; where the picture has no score or the policy follows no second turn, a fresh one."""
        text, reasoning = one.prompt.text, self.policy.reasoning
        if one.missing is not None:
            conversation = revision(text, one.answer.completion, one.missing, reasoning)
            (again,) = self.policy.sample(text, conversation, 1, self.temperature)
            if again.readable and again.rewrite != one.answer.rewrite:
                return again
        return self.policy.sample(text, messages(text, reasoning), turn + 1, self.temperature)[-1]
