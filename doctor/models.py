"""Which models a run's options name, whether they are on this disk, and how each is fetched. Nothing is loaded.

Licences, sizes, commands and hashes are those of checkpoints.lock, as the loaders themselves see them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from doctor import shapes
from doctor.report import OK, PROBLEM, Check, readable
from errors import UserError
from models.weights import locked, verify
from rewards import CHECKPOINTS, RewardOptions

if TYPE_CHECKING:
    from r1_prompter import Options

HPS = CHECKPOINTS["hps"][0]


@dataclass(frozen=True)
class Model:
    """A model that the options name: where it lies (None: not on this disk), and how it is fetched."""

    role: str
    path: str
    place: Path | None
    known: str
    command: str

    @property
    def bytes(self) -> int:
        return 0 if self.place is None else shapes.bytes_of(self.place)

    def check(self) -> Check:
        known = f", {self.known}" if self.known else ""
        if self.place is None:
            return Check(self.role, PROBLEM, f"{self.path} is not on this disk{known}", self.command)
        try:
            lacking = shapes.missing_files(self.place) if self.place.is_dir() else []
        except shapes.UserError as error:
            return Check(self.role, PROBLEM, str(error), self.command)
        if lacking:
            shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            return Check(self.role, PROBLEM, f"{self.path} lacks {shown}", self.command)
        try:
            verify(self.place)
        except UserError as error:
            return Check(self.role, PROBLEM, str(error))
        return Check(self.role, OK, f"{self.path} is here, {readable(self.bytes)}{known}")


def named_models(options: Options) -> list[Model]:
    """Every model with weights that the options name, in the order in which a run loads them."""
    path, render = options.script.gpt_path, options.render
    names = list(dict.fromkeys(name for name in names_of(options) if name in shapes.SCORERS))
    policies = [_model("policy", path)]
    if base := shapes.base_of(path):
        policies.append(_model("base model", base))
    renderers = [] if render.remote else [_model("renderer", render.sdmodel_name)]
    return [*policies, *renderers, *[_reward(name, options.reward) for name in names]]


def names_of(options: Options) -> list[str]:
    return [*options.script.rewards, *options.script.held_out]


def reward_path(name: str, options: RewardOptions) -> str:
    """The checkpoint of a reward with weights: its option, or else its published name."""
    return asdict(options)[f"{name}_path"] or CHECKPOINTS[name][0]


def _reward(name: str, options: RewardOptions) -> Model:
    path = reward_path(name, options)
    model = _model(f"reward {name}", path)
    if Path(path).is_file():
        return replace(model, place=Path(path))
    if path == HPS:  # a file by itself in a repository of several
        cached = try_to_load_from_cache(HPS, locked(HPS).include[0], revision=locked(HPS).revision)
        return replace(model, place=Path(cached) if isinstance(cached, str) else None)
    return model


def _model(role: str, path: str) -> Model:
    known = locked(path)
    facts = ", ".join(fact for fact in (known.size, known.licence) if fact)
    on_hub = path.count("/") == 1 and not Path(path).is_absolute()
    return Model(role, path, shapes.folder_of(path), facts, known.command if on_hub else "check the path")
