"""Did the policy or the tuned renderer train on the benchmark? Looked up before a score is printed.

Two prompts are the same if their texts have one normal form (`data.text.normalize`), or if they ask for the same: the
canonical tuple of task, things, attributes, numbers and relation (`data.grammar.canonical`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.grammar import canonical, read
from data.text import normalize
from evaluation.benchmark import Item
from interfaces import Prompt
from run.folder import config_of


@dataclass(frozen=True)
class Leak:
    """Ids of benchmark items that were trained on: the same words, or the same request in other words."""

    training_prompts: int
    exact: tuple[str, ...]
    same_request: tuple[str, ...]


def leaks(items: Sequence[Item], training: Sequence[Prompt]) -> Leak:
    """Which items are among the training prompts."""
    texts = {normalize(prompt.text) for prompt in training}
    requests = {key for prompt in training for key in _requests(prompt)}
    exact = tuple(item.id for item in items if normalize(item.prompt.text) in texts)
    same = tuple(item.id for item in items if item.id not in set(exact) and requests & _requests(item.prompt))
    return Leak(len(training), exact, same)


def training_files(*models: str | None) -> list[Path]:
    """The files of prompts that the runs which left these models were trained on, as far as they are known."""
    paths = [Path(config_of(Path(model)).get("data", "")) for model in models if model]
    return [path for path in paths if path.is_file()]


def summary(found: Leak | None) -> str:
    """One line; None: what the policy was trained on is not known."""
    if found is None:
        return "leak check: NOT DONE, because no training prompts are known: give --training_prompts"
    line = f"leak check: {len(found.exact)} prompts are among the {found.training_prompts} trained on, "
    line += f"{len(found.same_request)} more ask for the same in other words"
    named = ", ".join([*found.exact, *found.same_request][:10])
    return f"{line}: {named}" if named else line


def _requests(prompt: Prompt) -> set[tuple]:
    """What is asked for, by the metadata and by the words."""
    return {canonical(prompt), canonical(read(prompt.text))}
