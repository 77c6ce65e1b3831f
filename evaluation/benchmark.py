"""What a benchmark is: prompts with metadata in, a verdict per picture out. One benchmark one file.

Arrow of the design: (prompt, picture) -> verdict -> table. Rewriting, drawing, resuming and statistics are the same
for all of them and live in `pipeline.py` and `statistics.py`. A benchmark is never given a rewrite: the text that it
judges by is the original prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from interfaces import Prompt


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
        id: unique in the benchmark and safe as a file name: "00017". Derived from the row, never from the text.
        prompt: the original prompt; what is drawn from raw, what is rewritten, and what is judged by.
        category: the row's own category, by which prompts are resampled.
        meta: what else the benchmark needs to judge, JSON-able.
    """

    id: str
    prompt: Prompt
    category: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What was seen in one picture.

    Attributes:
        parts: category -> scores in [0, 1] that this picture adds to it; one for most benchmarks, one per test point
            for some. None: it could not be judged, so it is in no mean, and the picture is judged again on resume.
        detail: what was seen and why, JSON-able, for the reader of the rows.
        absent: why parts are None: a reason for each answer that could not be had, in the words of the model's server.
    """

    parts: Mapping[str, Sequence[float | None]]
    detail: Mapping[str, Any] = field(default_factory=dict)
    absent: Sequence[str] = ()


class Benchmark(Protocol):
    """One benchmark with the models that judge it.

    Attributes:
        name: as in `--benchmark` ("geneval").
        title: as printed; honest about substitutes ("GenEval-HF").
        categories: rows of the table in their order; every key of `Verdict.parts` is one of them.
        images_per_prompt: of the published protocol.
        settings: thresholds, template versions, "contents" of models: all that a score depends on, JSON-able.
    """

    name: str
    title: str
    categories: Sequence[str]
    images_per_prompt: int
    settings: Mapping[str, Any]

    def load(self, path: Path) -> list[Item]:
        """The prompts in the file or folder at `path`; needs no model.

        Raises:
            UserError: malformed rows; one message counts them and names the first by their line numbers.
        """
        ...

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """A verdict per (item, upright RGB image), in order; batched. Never raises for what one picture is like."""
        ...

    def overall(self, means: Mapping[str, float]) -> float:
        """The headline number from each category's mean; absent categories are not in."""
        ...
