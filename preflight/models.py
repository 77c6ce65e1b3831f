"""Which models a run's options name, whether they are on this disk, and how each is fetched. Nothing is loaded.

The one place that the doctor asks for licences, sizes and commands; they are those of the loaders themselves.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from preflight.report import OK, PROBLEM, Check, readable
from rewards import RewardOptions
from rewards.frozen import Published
from training import shapes
from training.policy import SIZE_AND_LICENCE

if TYPE_CHECKING:
    from r1_prompter import Options


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
        except shapes.ShapeError as error:
            return Check(self.role, PROBLEM, str(error), self.command)
        if lacking:
            shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            return Check(self.role, PROBLEM, f"{self.path} lacks {shown}", self.command)
        return Check(self.role, OK, f"{self.path} is here, {readable(self.bytes)}{known}")


def named_models(options: Options) -> list[Model]:
    """Every model with weights that the options name, in the order in which a run loads them."""
    path, renderer = options.script.gpt_path, options.render.sdmodel_name
    names = list(dict.fromkeys(name for name in names_of(options) if name in shapes.SCORERS))
    policies = [Model("policy", path, shapes.folder_of(path), SIZE_AND_LICENCE.get(path, ""), _fetch(path))]
    base = shapes.base_of(path)
    if base:
        policies.append(
            Model("base model", base, shapes.folder_of(base), SIZE_AND_LICENCE.get(base, ""), _fetch(base))
        )
    return [*policies, _renderer(renderer), *[_reward(name, options.reward) for name in names]]


def names_of(options: Options) -> list[str]:
    return [*options.script.rewards, *options.script.held_out]


def _fetch(path: str) -> str:
    return f"hf download {path}" if path.count("/") == 1 and not Path(path).is_absolute() else "check the path"


def _renderer(path: str) -> Model:
    from rendering.local import KNOWN_CHECKPOINTS  # diffusers: seconds

    size, licence, exclude = KNOWN_CHECKPOINTS.get(path, (None, "", ""))
    command = _fetch(path) + (f" --exclude '{exclude}'" if exclude else "")
    known = f"about {size} GB, {licence}" if size else ""
    return Model("renderer", path, shapes.folder_of(path), known, command)


def _reward(name: str, options: RewardOptions) -> Model:
    published, path = _published(name), reward_path(name, options)
    place = shapes.folder_of(path)
    if Path(path).is_file():
        place = Path(path)
    if path == published.repo and name == "hps":
        cached = try_to_load_from_cache(published.repo, published.files[0])
        place = Path(cached) if isinstance(cached, str) else None
    own = path == published.repo
    known = f"{published.size}, {published.licence}" if own else ""
    return Model(f"reward {name}", path, place, known, published.command if own else "check the path")


def reward_path(name: str, options: RewardOptions) -> str:
    """The checkpoint of a reward with weights: its option, or else its published name."""
    return asdict(options)[f"{name}_path"] or _published(name).repo


def _published(name: str) -> Published:
    if name == "hps":
        from rewards.hps import DEFAULT_FILE, DEFAULT_REPO

        return Published(DEFAULT_REPO, "3.9 GB", "Apache-2.0", (DEFAULT_FILE,))
    module = importlib.import_module(f"rewards.{name}")
    return module.PUBLISHED
