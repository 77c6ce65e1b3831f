"""Rewrites -> samples with images: which noise each starts from; every distinct picture is drawn once.

All members of a group start from the same noise, a pure function of run, prompt, step and image index (run/seeds.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from errors import ScoringError
from interfaces import Prompt, Renderer, Reward, Sample
from run.seeds import render_seed
from scoring.cache import PictureCache
from scoring.prefetch import Prefetcher

Row = tuple[str, int]  # a text to draw, and the seed of its noise
Drawing = dict[Row, Image.Image | None]


@dataclass(frozen=True)
class Answered:
    """A prompt with the policy's completion, and the rewrite that was read in it; None if it could not be read."""

    prompt: Prompt
    completion: str
    rewrite: str | None


@dataclass(frozen=True)
class Drawn:
    """What became of a batch of answers.

    Attributes:
        samples: one for each answer.
        seeds: for each answer, the noise of its images; () if nothing was drawn.
        metrics: seconds, and counts of images.
    """

    samples: list[Sample]
    seeds: list[tuple[int, ...]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Order:
    """What is to be drawn for one answer; `baseline` is the raw prompt where its images are wanted too."""

    answer: Answered
    seeds: tuple[int, ...]
    baseline: str | None
    baseline_seeds: tuple[int, ...]

    @property
    def rows(self) -> list[Row]:
        """Each (text, seed) of which it needs the image."""
        texts = ((self.answer.rewrite, self.seeds), (self.baseline, self.baseline_seeds))
        return [(text, seed) for text, seeds in texts if text is not None for seed in seeds]

    def sample(self, drawn: Drawing) -> Sample:
        """The sample with its images."""
        answer = self.answer
        images = () if answer.rewrite is None else tuple(drawn[answer.rewrite, seed] for seed in self.seeds)
        baseline = () if self.baseline is None else tuple(drawn[self.baseline, seed] for seed in self.baseline_seeds)
        return Sample(answer.prompt, answer.completion, answer.rewrite, images, baseline)


class Drawer:
    """Draws the rewrites of one process's batch.

    Args:
        renderer: frozen.
        group: members of a group; each batch must be whole groups.
        images_per_rewrite: images of each rewrite, one seed each.
        run_seed: the run's `--seed`.
        common_seeds: whether all members of a group start from the same noise.
        cache: of baseline images, which are wanted again at later steps; None keeps none.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        group: int,
        images_per_rewrite: int = 1,
        run_seed: int = 0,
        common_seeds: bool = True,
        cache: PictureCache | None = None,
    ):
        self.renderer, self.group = renderer, group
        self.images_per_rewrite, self.run_seed = images_per_rewrite, run_seed
        self.common_seeds, self.cache = common_seeds, cache

    def __call__(self, answers: Sequence[Answered], scorers: Sequence[Reward], step: int) -> Drawn:
        """Draw what `scorers` look at, for the rollouts that feed optimiser step `step`.

        Raises:
            ScoringError: a group is not one prompt's, or the renderer broke its contract.
        """
        self._check_groups(answers)
        images = self.images_per_rewrite if any(scorer.needs_images for scorer in scorers) else 0
        baseline = any(scorer.needs_baseline_images for scorer in scorers)
        orders = [self._order(answer, step, i % self.group, images, baseline) for i, answer in enumerate(answers)]
        started = time.perf_counter()
        with Prefetcher(scorers) as prefetcher:
            drawn, counts = self._draw(orders, prefetcher)
        metrics = {"seconds/render": time.perf_counter() - started, **counts}
        samples, seeds = [order.sample(drawn) for order in orders], [order.seeds for order in orders]
        return Drawn(samples, seeds, metrics)

    def _check_groups(self, answers: Sequence[Answered]) -> None:
        if len(answers) % self.group:
            raise ScoringError(f"{len(answers)} rollouts on this process are not whole groups of {self.group}")
        for start in range(0, len(answers), self.group):
            prompts = {answer.prompt.id for answer in answers[start : start + self.group]}
            if len(prompts) > 1:
                last = start + self.group - 1
                raise ScoringError(f"rollouts {start} to {last} mix prompts {sorted(prompts)}: no group")

    def _order(self, answer: Answered, step: int, member: int, images: int, baseline: bool) -> _Order:
        """One seed an image; a member of a group has its own indices only where seeds are not common."""
        if answer.rewrite is None or not images:
            return _Order(answer, (), None, ())
        first, id = (0 if self.common_seeds else member * images), answer.prompt.id
        seeds = tuple(render_seed(self.run_seed, id, step, k) for k in range(first, first + images))
        if not baseline:
            return _Order(answer, seeds, None, ())
        return _Order(
            answer, seeds, answer.prompt.text, tuple(render_seed(self.run_seed, id, 0, k) for k in range(images))
        )

    def _draw(self, orders: Sequence[_Order], prefetcher: Prefetcher) -> tuple[Drawing, dict[str, float]]:
        """Every distinct image once, from the cache or drawn, and the counts; `prefetcher` gets whole groups."""
        groups = _Groups(orders, self.group, prefetcher)
        kept = self._kept(orders) if self.cache else set()
        for row in sorted(kept):
            if (image := self.cache.get(*row)) is not None:
                groups.add(row, image)
        cached = len(groups.drawn)
        wanted = dict.fromkeys(row for order in orders for row in order.rows)
        rows = [row for row in wanted if row not in groups.drawn]
        more = {"on_image": lambda i, image: groups.add(rows[i], image)} if prefetcher.scorers else {}
        images = self.renderer([text for text, _ in rows], [seed for _, seed in rows], **more) if rows else []
        if len(images) != len(rows):
            raise ScoringError(f"the renderer returned {len(images)} images for {len(rows)} rewrites")
        for row, image in zip(rows, images, strict=True):
            if row not in groups.drawn:
                groups.add(row, image)
            if row in kept and image is not None:
                self.cache.put(*row, image)
        counts = {"images/drawn": float(len(rows))}
        rewrites = [(order.answer.rewrite, seed) for order in orders for seed in order.seeds]
        if rewrites:
            counts["images/distinct"] = len(set(rewrites)) / len(rewrites)
        if kept:
            counts["images/cached"] = cached / len(groups.drawn)
        return groups.drawn, counts

    def _kept(self, orders: Sequence[_Order]) -> set[Row]:
        """The images that are wanted again at a later step: the raw prompts', whose noise stays."""
        return {(o.baseline, seed) for o in orders if o.baseline is not None for seed in o.baseline_seeds}


class _Groups:
    """Which groups have all their images, as images come in."""

    def __init__(self, orders: Sequence[_Order], size: int, prefetcher: Prefetcher):
        self.drawn: Drawing = {}
        self._prefetcher = prefetcher
        self._groups = {first: orders[first : first + size] for first in range(0, len(orders), size)}
        self._lacks = {first: {row for o in group for row in o.rows} for first, group in self._groups.items()}

    def add(self, row: Row, image: Image.Image | None) -> None:
        self.drawn[row] = image
        for first, rows in self._lacks.items():
            if row in rows:
                rows.remove(row)
                if not rows:
                    self._prefetcher.ready([order.sample(self.drawn) for order in self._groups[first]])
