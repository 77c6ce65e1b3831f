"""What several benchmarks share: reading their files, with the malformed rows in one message, and asking a VLM.

The benchmarks that ask a VLM are UniGenBench, WISE, GenEval 2 and DPG-graph: one file each beside this one.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.chat import Question, Template, VLMClient
from clients.chat import Verdict as Answer
from data.text import json_value, read_text
from errors import UserError, listed, one_line
from evaluation.benchmark import Item

log = logging.getLogger(__name__)


def check_rows(errors: Sequence[str]) -> None:
    """Raise UserError with the number of malformed rows and the problems of the first, if there are any."""
    if errors:
        raise UserError(f"{len(errors)} malformed rows: {listed(errors)}; correct or remove them")


def csv_rows(path: Path, errors: list[str], *choices: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, column -> cell) of each row; rows of another width go to `errors`.

    UserError if the file has none of the `choices` of columns, or a quote that is not closed.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if not any(set(columns) <= set(header) for columns in choices):
            wanted = " or ".join(", ".join(columns) for columns in choices)
            there = ", ".join(header)[:200]
            raise UserError(f"{path}: its columns are {there}, not {wanted}: give the original file")
        line = reader.line_num + 1
        for cells in reader:
            if any(cells) and len(cells) != len(header):
                errors.append(f"{path}, line {line}: {len(cells)} cells, not {len(header)}")
            elif any(cells):
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV ({one_line(error)}): correct the row") from error


def json_list(path: Path) -> list[tuple[str, Any]]:
    """(its place, element) of each element of the JSON list in a file; UserError if it is not JSON."""
    rows = json_value(read_text(path), str(path))
    return [(f"{path}, element {number}", row) for number, row in enumerate(rows, 1)]


def items_of(
    rows: Iterable[tuple[str, Any]], make: Callable[[Any, int], Item], errors: list[str] | None = None
) -> list[Item]:
    """`make(row, its number from 0)` of each (place, row); a row that repeats an earlier one has no item.

    Raises:
        UserError: rows that are no objects, that `make` cannot read (ValueError, TypeError or KeyError), or whose id
            another row has; in one message, after what is in `errors` already.
    """
    errors = [] if errors is None else errors
    items: dict[str, Item] = {}
    texts: Counter[str] = Counter()
    for number, (place, row) in enumerate(rows):
        texts[text := json.dumps(row, sort_keys=True)] += 1
        if texts[text] > 1:
            continue
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
            item = make(row, number)
            if items.setdefault(item.id, item) is not item:
                raise ValueError(f"the number {item.id} comes twice")
        except KeyError as error:
            errors.append(f"{place}: {error} is missing")
        except (ValueError, TypeError) as error:
            errors.append(f"{place}: {one_line(error)}")
    check_rows(errors)
    if repeated := texts.total() - len(texts):
        log.warning("%d rows repeat an earlier one word for word, so they are left out", repeated)
    return list(items.values())


def required_texts(row: Mapping[str, object], *names: str) -> list[str]:
    """The text of each field of a row, without outer blanks; ValueError if one is no text, or blank."""
    texts = [row.get(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} is {text!r}, not a text")
    return [text.strip() for text in texts]


def ask(client: VLMClient, questions: Sequence[Question]) -> list[tuple[Answer | None, str]]:
    """(verdict, or None; why it is None) of each question, however many there are.

    A batch has `batch_timeout` seconds, so it gets no more questions than have time for their calls.
    """
    rounds = max(1, int(client.batch_timeout // client.call_timeout))
    size, answers = rounds * client.concurrency, []
    for start in range(0, len(questions), size):
        verdicts = client.ask(questions[start : start + size])
        answers += zip(verdicts, client.reasons, strict=True)
    return answers


def settings_of(client: VLMClient, template: Template) -> dict[str, Any]:
    """What a verdict through `client` depends on beside the options; its template is of our own words."""
    return {"judge": client.model, "judge_server": client.url, "template_version": template.version}
