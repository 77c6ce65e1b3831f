"""All that crosses a wall: a prompt, one rollout, and the two protocols that turn a rewrite into a score.

No torch here: images are PIL at every border, tensors stay inside the part that made them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from PIL import Image

# A double mark after a digit means inches; a single one within a word, or before "90s" or "n'", is an apostrophe.
QUOTED = re.compile(
    r"(?<!\d)[\"＂“”„‟〝][^\"＂“”„‟〝〞]{1,500}[\"＂“”〞]|[«»‹›][^«»‹›]{1,500}[«»‹›]"
    r"|[「『][^「」『』]{1,500}[」』]|`[^`]{1,500}(?:`|'')"
    r"|(?<!\w)['‘‚](?!\s|(?i:\d0s|n|em|til|tis|twas)\b).{1,500}?(?<!\s)['’‘](?!\w)"
)


@dataclass(frozen=True)
class Prompt:
    """What the user asked for. Rewards judge against `text` and these fields, never against a rewrite.

    Attributes:
        text: the user's words.
        task: one of `data.grammar.TASKS`, or shape, texture, complex, non, size, spatial_3d, negation, text; "" if
            unknown.
        nouns: object names, singular, lower case, no article ("teddy bear").
        attr_nouns: attribute + noun in the order of `nouns` ("purple teddy bear"); empty if none was asked for.
        spatial: (object 1, relation, object 2), read "object 1 [is] relation object 2"; None if no relation.
        counts: (object, number) pairs; empty if no number was asked for.
    """

    text: str
    task: str = ""
    nouns: tuple[str, ...] = ()
    attr_nouns: tuple[str, ...] = ()
    spatial: tuple[str, str, str] | None = None
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def id(self) -> str:
        """16 hex digits of the text's SHA-256: the same prompt has the same id in every run and file."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def texts(self) -> tuple[str, ...]:
        """What the text quotes, between marks of any kind: words that the picture is to show."""
        inner = self.text.strip()
        if (whole := QUOTED.match(inner)) and whole.end() == len(inner):  # marks around all of it mean nothing
            inner = whole[0][1:-1]
        found = (match[0].strip(" \t'\"`＂“”„‟〝〞«»‹›「」『』‘’‚,") for match in QUOTED.finditer(inner))
        return tuple(text for text in found if text)


@dataclass(frozen=True)
class Sample:
    """One rollout. `rewrite is None`: the answer could not be read, nothing was drawn, `images == ()`.

    Attributes:
        prompt: what the user asked for.
        completion: the policy's whole text.
        rewrite: the text given to the renderer, or None.
        images: one RGB picture per seed; None where the renderer failed (the sample is then absent, not bad).
        baseline_images: as many pictures of the raw prompt, the same in all steps of a run, for rewards that compare
            with them; else ().
    """

    prompt: Prompt
    completion: str
    rewrite: str | None
    images: tuple[Image.Image | None, ...] = ()
    baseline_images: tuple[Image.Image | None, ...] = ()


OnImage = Callable[[int, Image.Image], None]


class Renderer(Protocol):
    """rewrite + seed -> image. Frozen. A row's picture does not depend on the rest of the batch."""

    def __call__(
        self, texts: Sequence[str], seeds: Sequence[int], on_image: OnImage | None = None
    ) -> list[Image.Image | None]:
        """Draw `texts[i]` from noise `seeds[i]`; None where a row could not be drawn. Same length as `texts`.

        `on_image(i, image)` is called as soon as image i is drawn, on the caller's thread.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Length of `text` in the renderer's own tokens (its longest-context text encoder, before truncation)."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that the renderer reads; what is beyond is cut."""
        ...


class Reward(Protocol):
    """Samples -> one float each, or None where no score could be had (absent is not zero).

    Called with whole groups: samples of one prompt are adjacent. A reward with `needs_images` is only given samples
    whose images are all there and averages over a sample's images; the others also see unreadable answers.

    Attributes:
        name: as in `--rewards`.
        range: lowest and highest score.
        needs_images: whether it looks at pictures.
        needs_baseline_images: whether samples must come with pictures of the raw prompt.
        max_tokens: that it reads of a prompt; None if it reads all.
        can_prefetch: whether `prefetch` may be called; true for rewards that wait for another machine.
        metrics: what the last call has to say beside its scores: "<name>/<metric>" -> number.
    """

    name: str
    range: tuple[float, float]
    needs_images: bool = True
    needs_baseline_images: bool = False
    max_tokens: int | None = None
    can_prefetch: bool = False
    metrics: Mapping[str, float] = MappingProxyType({})

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]: ...

    def count_tokens(self, prompt: Prompt) -> int:
        """Length of what it reads of a prompt in its own tokens, before truncation."""
        return 0

    def limits(self, prompts: Sequence[Prompt]) -> list[str]:
        """What it does not see of these prompts, in words."""
        if self.max_tokens is None or not prompts:
            return []
        cut = sum(self.count_tokens(prompt) > self.max_tokens for prompt in prompts)
        return [f"reads {self.max_tokens} tokens of a prompt, which cuts {cut} of {len(prompts)} prompts"]

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Start scoring these whole groups in the background; the next `__call__` will contain them."""
