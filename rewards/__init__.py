"""Samples -> one float each, or None: every reward by its name, built only when named.

A model's module is imported and its weights are loaded when `build` meets its name and not before, so a run that asks
for `hps` needs neither the packages nor the checkpoints of the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from interfaces import Prompt, Renderer, Reward


class RewardError(RuntimeError):
    """A reward cannot be built or its checkpoint cannot be read; the message says what to do next."""


@dataclass(frozen=True)
class RewardSettings:
    """All that the constructors below choose from; each takes what it needs.

    Attributes:
        device: where the models run ("cuda:3", "cpu").
        dtype: arithmetic of the models, "float32", "bfloat16" or "float16".
        batch_size: pictures (or texts) per forward pass.
        prompts: the data, so that a reward can say at load what it cannot judge, and refuse what it would get wrong.
        renderer: whose tokens `length` counts; None if no reward that counts them is named.
        length_low, length_high: shortest and longest rewrite, in those tokens, that has the full length score.
        hps_path, git_path, gdino_path, orm_path, imagereward_path, pickscore_path: checkpoint file or folder; None is
            the published one, from the hub's local cache.
        git_formula, gdino_formula: "faithful" or "released", see `rewards.git` and `rewards.gdino`.
        orm_dtype: weights and arithmetic of the ORM; it has 8 billion parameters.
        orm_temperature: of its yes/no softmax; 1 is the model's own probability.
        judge_url: base of an OpenAI-compatible API ("http://127.0.0.1:8080/v1"). Its key: environment JUDGE_API_KEY.
        judge_model: the model's name there.
        judge_concurrency: calls in flight at once.
        judge_timeout: seconds for one call, retries included.
        judge_batch_timeout: seconds for all calls of one batch; below half of the process group's timeout.
        judge_cache: SQLite file of verdicts; None keeps none.
        preference_pairs: "all", "anchor", or how many partners each picture of a group meets.
        preference_both_orders: ask each pair twice, swapped; a disagreement is a tie.
        seed: of what a judge reward draws at random (which picture is shown first).
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    prompts: Sequence[Prompt] = ()
    renderer: Renderer | None = None
    length_low: int = 15
    length_high: int = 77
    hps_path: str | Path | None = None
    git_path: str | Path | None = None
    git_formula: str = "faithful"
    gdino_path: str | Path | None = None
    gdino_formula: str = "faithful"
    orm_path: str | Path | None = None
    orm_dtype: str = "bfloat16"
    orm_temperature: float = 1.0
    imagereward_path: str | Path | None = None
    pickscore_path: str | Path | None = None
    judge_url: str = "http://127.0.0.1:8080/v1"
    judge_model: str = "UnifiedReward"
    judge_concurrency: int = 16
    judge_timeout: float = 120.0
    judge_batch_timeout: float = 900.0
    judge_cache: str | Path | None = None
    preference_pairs: str = "all"
    preference_both_orders: bool = False
    seed: int = 0

    def computing(self) -> dict[str, object]:
        """The keyword arguments that every model reward takes."""
        return {"device": self.device, "dtype": self.dtype, "batch_size": self.batch_size}


def _hps(settings: RewardSettings) -> Reward:
    from rewards.hps import DEFAULT, HPS

    return HPS(settings.hps_path or DEFAULT, **settings.computing())


def _git(settings: RewardSettings) -> Reward:
    from rewards.git import GIT, PUBLISHED

    return GIT(
        settings.git_path or PUBLISHED.repo,
        formula=settings.git_formula,
        prompts=settings.prompts,
        **settings.computing(),
    )


def _gdino(settings: RewardSettings) -> Reward:
    from rewards.gdino import PUBLISHED, GroundingDino

    return GroundingDino(
        settings.gdino_path or PUBLISHED.repo,
        formula=settings.gdino_formula,
        prompts=settings.prompts,
        **settings.computing(),
    )


def _orm(settings: RewardSettings) -> Reward:
    from rewards.orm import ORM, PUBLISHED

    return ORM(
        settings.orm_path or PUBLISHED.repo,
        temperature=settings.orm_temperature,
        **{**settings.computing(), "dtype": settings.orm_dtype},
    )


def _imagereward(settings: RewardSettings) -> Reward:
    from rewards.imagereward import PUBLISHED, ImageReward

    return ImageReward(settings.imagereward_path or PUBLISHED.repo, **settings.computing())


def _pickscore(settings: RewardSettings) -> Reward:
    from rewards.pickscore import PUBLISHED, PickScore

    return PickScore(settings.pickscore_path or PUBLISHED.repo, **settings.computing())


def _judge(settings: RewardSettings) -> Reward:
    from rewards.judge import Judge

    return Judge(_client(settings))


def _preference(settings: RewardSettings) -> Reward:
    from rewards.preference import Preference

    return Preference(
        _client(settings),
        pairs=settings.preference_pairs,
        both_orders=settings.preference_both_orders,
        seed=settings.seed,
    )


def _client(settings: RewardSettings):
    from rewards.vlm import VLMClient

    return VLMClient(
        settings.judge_url,
        settings.judge_model,
        concurrency=settings.judge_concurrency,
        call_timeout=settings.judge_timeout,
        batch_timeout=settings.judge_batch_timeout,
        cache=settings.judge_cache,
    )


def _format(settings: RewardSettings) -> Reward:
    from rewards.text import Format

    return Format()


def _length(settings: RewardSettings) -> Reward:
    from rewards.text import Length

    renderer = settings.renderer
    if renderer is None:
        raise RewardError("reward 'length' counts the renderer's tokens, but RewardSettings.renderer is None: set it")
    return Length(renderer.count_tokens, settings.length_low, settings.length_high, renderer.max_tokens)


REWARDS: dict[str, Callable[[RewardSettings], Reward]] = {
    "hps": _hps,
    "git": _git,
    "gdino": _gdino,
    "orm": _orm,
    "imagereward": _imagereward,
    "pickscore": _pickscore,
    "judge": _judge,
    "preference": _preference,
    "format": _format,
    "length": _length,
}


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
