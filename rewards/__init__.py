"""Samples -> one float each, or None: every reward by its name, built only when named.

A model's module is imported and its weights are loaded when `build` meets its name and not before, so a run that asks
for `hps` needs neither the packages nor the checkpoints of the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from interfaces import Renderer, Reward


class RewardError(RuntimeError):
    """A reward cannot be built or its checkpoint cannot be read; the message says what to do next."""


@dataclass(frozen=True)
class RewardSettings:
    """All that the constructors below choose from; each takes what it needs.

    Attributes:
        device: where the models run ("cuda:3", "cpu").
        dtype: arithmetic of the models, "float32", "bfloat16" or "float16".
        batch_size: pictures (or texts) per forward pass.
        hps_path: the `.pt` file or folder for `rewards.hps.HPS`; None is the published HPS v2.1, from the hub.
        length_low: shortest rewrite, in the renderer's tokens, that has the full length score.
        length_high: longest such rewrite.
        renderer: whose tokens `length` counts; None if no reward that counts them is named.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    hps_path: str | Path | None = None
    length_low: int = 15
    length_high: int = 77
    renderer: Renderer | None = None


def _hps(settings: RewardSettings) -> Reward:
    from rewards.hps import DEFAULT, HPS

    path = DEFAULT if settings.hps_path is None else settings.hps_path
    return HPS(path, device=settings.device, dtype=settings.dtype, batch_size=settings.batch_size)


def _format(settings: RewardSettings) -> Reward:
    from rewards.text import Format

    return Format()


def _length(settings: RewardSettings) -> Reward:
    from rewards.text import Length

    renderer = settings.renderer
    if renderer is None:
        raise RewardError("reward 'length' counts the renderer's tokens, but RewardSettings.renderer is None: set it")
    return Length(renderer.count_tokens, settings.length_low, settings.length_high, renderer.max_tokens)


REWARDS: dict[str, Callable[[RewardSettings], Reward]] = {"hps": _hps, "format": _format, "length": _length}


def build(names: Sequence[str], settings: RewardSettings) -> list[Reward]:
    """Build the named rewards, in the order of `names`. All names are checked before the first model is loaded.

    Raises:
        RewardError: an unknown or repeated name, or a reward that cannot be built (missing checkpoint).
    """
    for name in names:
        if name not in REWARDS:
            nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise RewardError(
                f"unknown reward {name!r}, did you mean {nearest!r}? Valid: {', '.join(sorted(REWARDS))}"
            )
    if len(set(names)) != len(names):
        raise RewardError(f"a reward is named twice in {list(names)}: name each once and weight it instead")
    return [REWARDS[name](settings) for name in names]
