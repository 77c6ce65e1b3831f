"""Did the policy train on the benchmark? Looked up before a score is printed.

Two prompts are the same if their texts are, case and blanks aside, or if they ask for the same: the canonical tuple of
task, things, attributes, numbers and relation (`data.grammar.canonical`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.grammar import canonical, normalize, read
from data.prompts import load_prompts
from evaluation.benchmark import Item
from interfaces import Prompt


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


def training_file(policy: str) -> Path | None:
    """The prompts that the policy in a run folder of this project was trained on, as its `run.json` says, if it is
    there; None of any other policy."""
    record = Path(policy, "run.json")
    if not record.is_file():
        return None
    path = Path(json.loads(record.read_text(encoding="utf-8"))["config"]["data"])
    return path if path.is_file() else None


def of_policy(items: Sequence[Item], files: Sequence[Path]) -> Leak:
    """`leaks` against the prompts of all files.

    Raises:
        UserError: a file that cannot be read.
    """
    return leaks(items, [prompt for path in files for prompt in load_prompts(path)])


def _requests(prompt: Prompt) -> set[tuple]:
    """What is asked for, by the metadata and by the words."""
    return {canonical(prompt), canonical(read(prompt.text))}
