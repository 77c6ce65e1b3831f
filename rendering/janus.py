"""Draws with a Janus in this process: from a text as it is, or from the text and a plan that it writes first.

How it samples is what its folder says: a run of `t2i_r1` leaves its settings there. Same contract as `local`: a row's
picture depends on its text and seed alone.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from PIL import Image

from interfaces import OnImage
from models.frozen import without_zero3_init
from models.janus import Janus, Settings, load_janus
from rendering.levers import smallest_good_batch
from rendering.options import RenderOptions
from rendering.rows import OnRow, Outcome, Row, draw_distinct

logger = logging.getLogger(__name__)

NOT_TAKEN = ("render_steps", "resolution", "max_sequence_length", "render_lora")
TRIAL_TEXT = "a photo of {} things, of no importance whatever"


@dataclass(frozen=True)
class Picture:
    """One picture, and how it came about.

    Attributes:
        plan_prefix, plan, plan_log_probs: token ids of the request for a plan, the plan's (with its end where it was
            written) and their log-probabilities; all empty where none was written.
        text: of the plan, None where none was written.
        prefix, tokens, log_probs: the same for the image.
    """

    image: Image.Image
    plan_prefix: list[int]
    plan: list[int]
    plan_log_probs: list[float]
    text: str | None
    prefix: list[int]
    tokens: list[int]
    log_probs: list[float]


class JanusRenderer:
    """A Janus as an `interfaces.Renderer`.

    Args:
        janus: the model.
        settings: how it samples.
        plans: whether it writes a plan for each text.
        chunk_size: rows drawn at once; halved for good when the device runs out of memory.

    Attributes:
        failures: why rows came back as None, one count per row.
    """

    def __init__(self, janus: Janus, settings: Settings, plans: bool, chunk_size: int):
        self.janus, self.settings, self.plans, self.chunk_size = janus, settings, plans, chunk_size
        self.failures: Counter[str] = Counter()

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], seeds: Sequence[int], on_image: OnImage | None = None
    ) -> list[Image.Image | None]:
        """See `interfaces.Renderer`."""
        return draw_distinct(texts, seeds, on_image, self.failures, self._draw_all)

    def _draw_all(self, rows: Sequence[Row], on_row: OnRow) -> dict[Row, Outcome]:
        found: dict[Row, Outcome] = {}
        for first in range(0, len(rows), self.chunk_size):
            for row, picture in zip(
                part := rows[first : first + self.chunk_size], self.sample(*zip(*part, strict=True)), strict=True
            ):
                found[row] = picture.image if picture else "out of memory"
                if picture:
                    on_row(row, picture.image)
        return found

    def sample(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Picture | None]:
        """Plan and draw `texts[i]` with the noise of `seeds[i]`; None where even one alone does not fit in memory."""
        try:
            return self._sample(texts, seeds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(texts) == 1:
                return [None]
            half = (len(texts) + 1) // 2
            self.chunk_size = min(self.chunk_size, half)
            return self.sample(texts[:half], seeds[:half]) + self.sample(texts[half:], seeds[half:])

    def _sample(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        janus, how = self.janus, self.settings
        asked, plans, log_probs, written = [[]] * len(texts), [[]] * len(texts), [[]] * len(texts), [None] * len(texts)
        if self.plans:
            asked = [janus.plan_prefix(text) for text in texts]
            plans, log_probs = janus.write(asked, seeds, how.max_plan_tokens, how.temperature, how.top_p)
            written = [janus.text_of(plan) for plan in plans]
        prefixes = [janus.image_prefix(*pair) for pair in zip(texts, written, strict=True)]
        drawn = janus.draw(prefixes, seeds, how.guidance, how.image_temperature)
        images = janus.pictures(drawn.tokens)
        columns = (images, asked, plans, log_probs, written, prefixes, drawn.tokens.tolist(), drawn.log_prob.tolist())
        return [Picture(*row) for row in zip(*columns, strict=True)]

    def choose_batch_size(self) -> int:
        """As `LocalRenderer.choose_batch_size`."""
        self.chunk_size = min(gather_object([smallest_good_batch(self.trial)]))
        return self.chunk_size

    def trial(self, size: int) -> float | None:
        """Seconds a picture when `size` are drawn at once, None if that does not fit."""
        started = time.perf_counter()
        pictures = self.sample([TRIAL_TEXT.format(number) for number in range(size)], range(size))
        return None if None in pictures or self.chunk_size < size else (time.perf_counter() - started) / size

    def count_tokens(self, text: str) -> int:
        """Length of `text` in the model's tokens."""
        return len(self.janus.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that the model reads, its picture's places left free."""
        return self.janus.model.config.text_config.max_position_embeddings - self.janus.length


def load_janus_renderer(options: RenderOptions, device: str) -> JanusRenderer:
    """The Janus at `sdmodel_name`; `render_plan` says whether it plans, `guidance` replaces its folder's."""
    unused = {name: vars(options)[name] for name in NOT_TAKEN if vars(options)[name] is not None}
    if unused:
        logger.warning("a Janus draws its tokens one by one and at its own size: %s is not used", unused)
    with without_zero3_init():
        janus = load_janus(options.sdmodel_name, options.render_dtype, device)
    janus.requires_grad_(False)
    settings = janus.settings if options.guidance is None else janus.settings._replace(guidance=options.guidance)
    return JanusRenderer(janus, settings, options.render_plan, options.render_batch_size)
