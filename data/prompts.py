"""Prompt files. `load_prompts(path)` reads all of them, `dump_prompt(prompt)` makes a row; nothing is downloaded.

    .txt            one prompt a line; the fields are what `data.grammar` recognises
    .jsonl, .json   JSON Lines in T2I-R1's field names (or GenEval's evaluation_metadata.jsonl)

T2I-R1's task types become the grammar's tasks where the two mean the same; "shape", "texture", "complex" and "non"
stay as they are, and so do "size", "spatial_3d", "negation" and "text", which are ours. A row that has nothing but a
`prompt` is read by the grammar, like a line of text.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.grammar import DEPTH_RELATIONS, RELATIONS, TASKS, read
from data.text import json_rows, normalize, text_lines
from errors import UserError
from interfaces import Prompt

log = logging.getLogger(__name__)

_METADATA = ("task_type", "nouns", "attr_nouns", "spatial_info", "numeracy_info")
_FIELDS = (*_METADATA, "include", "exclude", "tag", "prompt")
_OTHER_TASKS = (
    "shape",
    "texture",
    "complex",
    "non",
    "size",
    "spatial_3d",
    "negation",
    "text",
)  # the first four are T2I-R1's
_TASK_TYPES = {  # task -> T2I-R1's task_type; back again by the number of nouns
    "single_object": "object",
    "two_object": "object",
    "counting": "numeracy",
    "colors": "color",
    "position": "spatial",
    "color_attr": "color",
}


def load_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file in its order; of those with one normal form the first is kept, how many went is logged.

    Args:
        path: a `.txt`, `.jsonl` or `.json` file, in an encoding that `data.text.read_text` reads.

    Raises:
        UserError: missing, empty or unreadable file, unknown extension, or a bad row (with its line number).
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl", ".json"):
        raise UserError(f"{path}: unknown extension {path.suffix!r}; give a .txt, .jsonl or .json file of prompts")
    prompts = list(_prompts(path))
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(normalize(prompt.text), prompt)
    if len(unique) < len(prompts):
        log.warning("%s: %d duplicated prompts left out, %d kept", path, len(prompts) - len(unique), len(unique))
    return list(unique.values())


def hash_of_ids(prompts: Sequence[Prompt]) -> str:
    """16 hex digits: the same for the same prompts in the same order, wherever their file lies."""
    return hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]


def prompts_of_step(step: int, prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """The `count` distinct prompts of a step, from 1 on; each epoch has its own order, and leaves out the end."""
    epoch, place = divmod(step - 1, len(prompts) // count)
    order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
    return [prompts[index] for index in order[place * count :][:count]]


def dump_prompt(prompt: Prompt) -> dict:
    """The JSON Lines row that `load_prompts` reads back as an equal prompt; absent fields are left out.

    Holds for prompts of the grammar and of `load_prompts`: T2I-R1's names tell "single_object" from "two_object", and
    "colors" from "color_attr", only by the number of nouns.
    """
    row = {"prompt": prompt.text, "task_type": _TASK_TYPES.get(prompt.task, prompt.task), "nouns": list(prompt.nouns)}
    if prompt.attr_nouns:
        row["attr_nouns"] = list(prompt.attr_nouns)
    if prompt.spatial:
        row["spatial_info"] = dict(zip(("obj1", "locality", "obj2"), prompt.spatial, strict=True))
    if prompt.counts:
        row["numeracy_info"] = [{"obj_name": name, "num": number} for name, number in prompt.counts]
    return row


def _prompts(path: Path) -> Iterator[Prompt]:
    if path.suffix.lower() == ".txt":
        yield from (read(line) for _, line in text_lines(path))
        return
    unread: dict[str, str] = {}
    for place, row in json_rows(path, "prompt"):
        unread = {name: place for name in row if name not in _FIELDS} | unread
        try:
            yield _from_row(row["prompt"].strip(), row)
        except (UserError, KeyError, IndexError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}"
            raise UserError(f"{place}: {reason}; the row's format is in data/README.md") from error
    for name, place in unread.items():
        if near := difflib.get_close_matches(name.lower(), _FIELDS[:-2], cutoff=0.85):
            raise UserError(f"{place}: unknown field {name!r}, did you mean {near[0]!r}?")
        log.warning("%s: the field %r is not read, there and further on", place, name)


def _from_row(text: str, row: dict) -> Prompt:
    if "tag" in row and "include" in row:
        return read_geneval(text, row)
    if all(row.get(field) is None for field in _METADATA):
        return read(text)
    nouns = _names(row, "nouns")
    task, spatial, counts = _task(row, len(nouns)), _spatial(row, nouns), _counts(row, nouns)
    needs_spatial = spatial is None and "spatial_info"
    needs = {"position": needs_spatial, "spatial_3d": needs_spatial, "counting": not counts and "numeracy_info"}
    missing = needs.get(task)
    if missing or (task and not nouns):
        raise UserError(f"task_type {row['task_type']!r} without {missing or 'nouns'}")
    return Prompt(text, task, nouns, _names(row, "attr_nouns"), spatial, counts)


def read_geneval(text: str, row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row of GenEval's metadata: `include` lists the things, the subject of a position last."""
    items = row["include"]
    spatial = None
    if row["tag"] not in TASKS:
        raise UserError(f"tag is {row['tag']!r}, known are {', '.join(TASKS)}")
    if row["tag"] == "position":
        relation, target = items[-1]["position"]
        items = [items[-1], items[target]]
        spatial = (items[0]["class"], relation, items[1]["class"])
    colored = any("color" in item for item in items)
    return Prompt(
        text,
        row["tag"],
        tuple(item["class"] for item in items),
        tuple(f"{item.get('color', '')} {item['class']}".lstrip() for item in items) if colored else (),
        spatial,
        tuple((item["class"], item["count"]) for item in items) if row["tag"] == "counting" else (),
    )


def _task(row: dict, n_nouns: int) -> str:
    task_type = row.get("task_type") or ""
    if task_type in ("", *TASKS, *_OTHER_TASKS):
        return task_type
    tasks = [task for task, name in _TASK_TYPES.items() if name == task_type]
    if not tasks:
        known = ", ".join((*dict.fromkeys(_TASK_TYPES.values()), *_OTHER_TASKS, *TASKS))
        raise UserError(f"task_type is {task_type!r}, known are {known}")
    return tasks[0] if n_nouns <= 1 else tasks[-1]


def _names(row: dict, field: str) -> tuple[str, ...]:
    names = row.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{field} is {names!r}, not a list of non-empty strings")
    return tuple(map(normalize, names))


def _spatial(row: dict, nouns: tuple[str, ...]) -> tuple[str, str, str] | None:
    info = row.get("spatial_info")
    if info is None:
        return None
    locality = RELATIONS.get(info["locality"], info["locality"])
    if locality not in (*RELATIONS, *DEPTH_RELATIONS):
        raise UserError(f"locality is {locality!r}, known are {', '.join((*RELATIONS, *DEPTH_RELATIONS))}")
    return _known(info["obj1"], nouns), locality, _known(info["obj2"], nouns)


def _counts(row: dict, nouns: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    counts = tuple((_known(item["obj_name"], nouns), item["num"]) for item in row.get("numeracy_info") or ())
    for name, number in counts:
        if type(number) is not int or number < 1:
            raise UserError(f"num of {name!r} is {number!r}, not a whole number from 1")
    return counts


def _known(name: object, nouns: tuple[str, ...]) -> str:
    noun = normalize(str(name))
    if noun not in nouns:
        raise UserError(f"{name!r} is not among its nouns {list(nouns)}")
    return noun
