"""Samples -> one float each, or None: every reward by its name, built only when named.

A model's module is imported and its weights are loaded when `build` meets its name and not before, so a run that asks
for `hps` needs neither the packages nor the checkpoints of the others.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError
from interfaces import Prompt, Renderer, Reward
from models.devices import pick_device, pick_dtype
from models.hub import contents_of
from run.options import device, option

if TYPE_CHECKING:
    from clients.chat import VLMClient
    from run.files import Contents


DTYPES = ["float32", "bfloat16", "float16"]
PAIRS = ["all", "anchor"]
FORMULAS = ["faithful", "released"]


@dataclass
class RewardOptions:
    """What a user may choose about rewards; every field is a flag of the trainer and a key of its YAML files."""

    reward_device: str | None = option(None, "Of rewards; unset: the renderer's.", changes="nothing", reads=device)
    reward_offload: bool = option(False, "Keep reward models in main memory between calls.", changes="nothing")
    reward_dtype: str = option(
        "float32",
        "Their arithmetic; a group's scores differ in the third digit, so not bfloat16.",
        changes="run",
        choices=DTYPES,
    )
    reward_batch_size: int = option(32, "Pictures or texts per forward pass of a reward.", changes="nothing", least=1)
    reward_formula: str = option(
        "faithful",
        "Of git and gdino: the published formula, or that of T2I-R1's released code with its bugs.",
        changes="run",
        choices=FORMULAS,
    )
    hps_path: str | None = option(None, "HPS .pt file or open_clip folder; unset: the published v2.1.", changes="run")
    git_path: str | None = option(None, "GIT folder; unset: microsoft/git-large-vqav2.", changes="run")
    gdino_path: str | None = option(None, "Its folder; unset: IDEA-Research/grounding-dino-tiny.", changes="run")
    orm_path: str | None = option(
        None, "ORM folder, made by scripts/convert_orm.py; unset: CaraJ/ORM-T2I-R1.", changes="run"
    )
    orm_dtype: str = option(
        "auto", "Weights and arithmetic of the ORM; auto: as --render_dtype.", changes="run", choices=["auto", *DTYPES]
    )
    orm_temperature: float = option(
        1.0, "Of the ORM's yes/no softmax; the released code's is about 0.3.", changes="run", above=0
    )
    imagereward_path: str | None = option(None, "ImageReward folder; unset: THUDM/ImageReward.", changes="run")
    pickscore_path: str | None = option(None, "PickScore folder; unset: yuvalkirstain/PickScore_v1.", changes="run")
    judge_url: str = option(
        "http://127.0.0.1:8080/v1", "OpenAI-compatible API; its key: environment JUDGE_API_KEY.", changes="nothing"
    )
    judge_model: str = option("UnifiedReward", "The judge's name there.", changes="run")
    judge_concurrency: int = option(16, "Calls of one process in flight at once.", changes="nothing", least=1)
    judge_timeout: float = option(120.0, "Seconds for one call, retries included.", changes="nothing", above=0)
    judge_batch_timeout: float = option(900.0, "Seconds for a batch; then it is absent.", changes="nothing", above=0)
    judge_cache: str | None = option(None, "SQLite file of verdicts; unset: in the run folder.", changes="nothing")
    preference_pairs: int | str = option(
        "all", "Pairs to compare: all, anchor (with the raw prompt's), or k.", changes="run", words=PAIRS, least=1
    )
    preference_both_orders: bool = option(
        False, "Ask each pair in both orders too; a disagreement is a tie.", changes="run"
    )
    length_low: int = option(15, "Renderer tokens below which a rewrite loses length score.", changes="run", least=1)
    length_high: int = option(77, "Renderer tokens above which it does; RePrompt's bound.", changes="run", least=1)

    def settle(self, default_device: str) -> None:
        """Choose what `orm_dtype` leaves open by the device that judges."""
        self.orm_dtype = pick_dtype(self.orm_dtype, self.reward_device or default_device, frozen=True)


@dataclass(frozen=True)
class RewardContext:
    """What a run gives its rewards beside the options.

    Attributes:
        device: where models compute ("cuda:3", "cpu").
        renderer: whose tokens `length` counts; None if no reward that counts them is named.
        prompts: the data, so that a reward can refuse at load what it does not know.
        seed: of what a judge draws at random (which picture it is shown first).
        judge_cache: where verdicts are kept if the options name no file; None keeps none.
    """

    device: str = "cpu"
    renderer: Renderer | None = None
    prompts: Sequence[Prompt] = ()
    seed: int = 0
    judge_cache: Path | None = None


def _computing(options: RewardOptions, context: RewardContext) -> dict[str, object]:
    """The keyword arguments that every model reward takes."""
    return {"device": context.device, "dtype": options.reward_dtype, "batch_size": options.reward_batch_size}


def _hps(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.hps import DEFAULT, HPS

    return HPS(options.hps_path or DEFAULT, **_computing(options, context))


def _git(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.git import GIT, PUBLISHED

    released = options.reward_formula == "released"
    return GIT(options.git_path or PUBLISHED.repo, released=released, **_computing(options, context))


def _gdino(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.gdino import PUBLISHED, GroundingDino

    path, released = options.gdino_path or PUBLISHED.repo, options.reward_formula == "released"
    return GroundingDino(path, released=released, prompts=context.prompts, **_computing(options, context))


def _orm(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.orm import ORM, PUBLISHED

    computing = {**_computing(options, context), "dtype": pick_dtype(options.orm_dtype, context.device, frozen=True)}
    return ORM(options.orm_path or PUBLISHED.repo, temperature=options.orm_temperature, **computing)


def _imagereward(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.imagereward import PUBLISHED, ImageReward

    return ImageReward(options.imagereward_path or PUBLISHED.repo, **_computing(options, context))


def _pickscore(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.pickscore import PUBLISHED, PickScore

    return PickScore(options.pickscore_path or PUBLISHED.repo, **_computing(options, context))


def _judge(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.judge import Judge

    client = judge_client(options, context.judge_cache)
    client.check()  # a run must not find out after an hour that nobody is there
    return Judge(client)


def _preference(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.preference import Preference

    client, both = judge_client(options, context.judge_cache), options.preference_both_orders
    preference = Preference(client, pairs=options.preference_pairs, both_orders=both, seed=context.seed)
    client.check()
    return preference


def judge_client(options: RewardOptions, cache: Path | None = None) -> VLMClient:
    """The judge's client; nothing is contacted yet.

    Args:
        cache: where verdicts are kept if the options name no file; None keeps none.
    """
    from clients.chat import VLMClient

    return VLMClient(
        options.judge_url,
        options.judge_model,
        concurrency=options.judge_concurrency,
        call_timeout=options.judge_timeout,
        batch_timeout=options.judge_batch_timeout,
        cache=options.judge_cache or cache,
    )


def _format(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.text import Format

    return Format()


def _length(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.text import Length

    renderer = context.renderer
    if renderer is None:
        raise UserError("reward 'length' counts the renderer's tokens, but RewardContext.renderer is None: set it")
    return Length(renderer.count_tokens, options.length_low, options.length_high, renderer.max_tokens)


def _ocr(options: RewardOptions, context: RewardContext) -> Reward:
    from rewards.ocr import OCR

    return OCR()


REWARDS: dict[str, Callable[[RewardOptions, RewardContext], Reward]] = {
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
    "ocr": _ocr,
}


# Reward -> the hub's repositories that it reads where no path of its own is given.
CHECKPOINTS = {
    "hps": ("xswu/HPSv2",),
    "git": ("microsoft/git-large-vqav2",),
    "gdino": ("IDEA-Research/grounding-dino-tiny",),
    "orm": ("CaraJ/ORM-T2I-R1",),
    "imagereward": ("THUDM/ImageReward", "google-bert/bert-base-uncased"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}


def reward_contents(names: Sequence[str | None], options: RewardOptions) -> Contents:
    """What the models of the named rewards hold, by their options; UserError if one is not on this disk."""
    models = [name for name in names if name in CHECKPOINTS]
    return contents_of({f"{n}_path": vars(options)[f"{n}_path"] or CHECKPOINTS[n][0] for n in models})


def check(names: Sequence[str], options: RewardOptions, ddp_timeout: float = math.inf) -> None:
    """Check what can be known before any model is loaded.

    Raises:
        UserError: a name that is unknown (with the nearest one) or comes twice; judges that together may hold a
            process for half of `ddp_timeout` seconds or more, while the others wait and take it for dead.
    """
    for name in names:
        if name not in REWARDS:
            nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown reward {name!r}, did you mean {nearest!r}? Valid: {', '.join(sorted(REWARDS))}")
    if len(set(names)) != len(names):
        raise UserError(f"a reward is named twice in {list(names)}: name each once and weight it instead")
    judges = sum(name in ("judge", "preference") for name in names)
    waiting = (judges + 1) * options.judge_batch_timeout if judges else 0  # + 1: calls begun while the last were drawn
    if waiting and waiting >= ddp_timeout / 2:
        raise UserError(
            f"judges may take {waiting:g} s of a batch (judge_batch_timeout {options.judge_batch_timeout:g} s each, "
            "and once for what was begun during drawing), "
            f"not below half of ddp_timeout {ddp_timeout:g} s: lower the first or raise the second"
        )


def build(names: Sequence[str], options: RewardOptions, context: RewardContext) -> list[Reward]:
    """Build the named rewards, in the order of `names`. All names are checked before the first model is loaded.

    Raises:
        UserError: an unknown or repeated name, or rewards that cannot be built (missing checkpoints, a judge that
            does not answer): all of them in one message.
    """
    check(names, options)
    pick_device(context.device)
    rewards, missing = [], []
    for name in names:
        try:
            rewards.append(REWARDS[name](options, context))
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; and ".join(missing))
    if not options.reward_offload:
        return rewards
    from rewards.offload import offloaded

    return [offloaded(reward) for reward in rewards]
