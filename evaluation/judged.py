"""What the benchmarks that ask a VLM share: files whose errors are told all at once, and what a result file must say.

UniGenBench, WISE, GenEval 2 and DPG-graph: one file each beside this one.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.chat import MAX_TOKENS, Question, Template, VLMClient, after_thinking
from clients.chat import Verdict as Answer
from errors import UserError, one_line

_BLANK = re.compile(r"\s*")
_AROUND = ".,;:!?*_`\"'()"


class RowErrors:
    """What is wrong in a benchmark's files, row by row."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, path: Path, line: int, what: str) -> None:
        self.found.append(f"{path}, line {line}: {what}")

    def check(self) -> None:
        """Raise UserError, with all that was found, if anything was."""
        if self.found:
            raise UserError(f"{len(self.found)} malformed rows: {'; '.join(self.found)}; correct or remove them")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without BOM.

    Raises:
        UserError: it is missing, unreadable, empty, or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({one_line(error)}): correct the path") from error
    if not text.strip():
        raise UserError(f"{path}: nothing in it: fetch it again")
    return text


def csv_rows(path: Path, errors: RowErrors, *choices: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, column -> cell) of each row; rows of another width go to `errors`.

    Raises:
        UserError: the file cannot be read, has none of the `choices` of columns, or a quote that is not closed.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        header = next(reader)
        if not any(set(columns) <= set(header) for columns in choices):
            wanted = " or ".join(", ".join(columns) for columns in choices)
            there = ", ".join(header)[:200]
            raise UserError(f"{path}: its columns are {there}, not {wanted}: give the original file")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                errors.add(path, line, f"{len(cells)} cells, not {len(header)}")
            elif cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV ({one_line(error)}): correct the row") from error


def json_list(path: Path) -> Iterator[tuple[int, object]]:
    """(number of its first line, element) of the JSON list in a file.

    Raises:
        UserError: the file cannot be read, or holds no list with something in it; with the line that is at fault.
    """
    text, decoder = read_text(path), json.JSONDecoder()
    at, before = _BLANK.match(text).end(), "["
    try:
        while text[at : at + 1] == before:
            at, before = _BLANK.match(text, at + 1).end(), ","
            line = text.count("\n", 0, at) + 1
            element, at = decoder.raw_decode(text, at)
            yield line, element
            at = _BLANK.match(text, at).end()
        if text[at : at + 1] != "]":
            raise ValueError(f"{before!r} or ']' expected, not {text[at : at + 20]!r}")
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, at) + 1
        raise UserError(f"{path}, line {line}: not a list in JSON ({one_line(error)}): correct it") from error


def json_lines(path: Path, errors: RowErrors) -> Iterator[tuple[int, object]]:
    """(line number, what it holds) of each line that is not blank; lines that are no JSON go to `errors`."""
    for line, text in enumerate(read_text(path).split("\n"), 1):
        try:
            if text.strip():
                yield line, json.loads(text)
        except (ValueError, RecursionError) as error:
            errors.add(path, line, f"not JSON ({one_line(error)})")


def required_texts(row: Mapping[str, object], *names: str) -> list[str]:
    """The text of each field of a row, without outer blanks.

    Raises:
        ValueError: one is missing, is no text, or is blank.
    """
    texts = [row.get(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} is {text!r}, not a text")
    return [text.strip() for text in texts]


def ask(client: VLMClient, questions: Sequence[Question]) -> list[tuple[Answer | None, str]]:
    """(verdict, or None; why it is None) of each question, however many there are.

    The client gives a batch `batch_timeout` seconds; it is given no more at once than it must be able to do in that.
    """
    rounds = max(1, int(client.batch_timeout // client.call_timeout))
    size, answers = rounds * client.concurrency, []
    for start in range(0, len(questions), size):
        verdicts = client.ask(questions[start : start + size])
        answers += zip(verdicts, client.reasons, strict=True)
    return answers


def settings_of(client: VLMClient, revision: str, **templates: Template) -> dict[str, Any]:
    """What a verdict through `client` depends on; `templates` by their use."""
    return {
        "judge": client.model,
        "judge_revision": revision or "not given",
        "judge_server": client.url,
        "temperature": 0,
        "max_tokens": {use: 1 if template.first_token else MAX_TOKENS for use, template in templates.items()},
        "answers_per_question": 1,
        "template_words": "our own",
        "template_versions": {use: template.version for use, template in templates.items()},
    }


def one_word(answer: str) -> str | None:
    """An answer of one word in lower case, without what stands around it ("Yes." -> "yes"); None if there are more."""
    words = after_thinking(answer).split()
    return words[0].strip(_AROUND).lower() or None if len(words) == 1 else None
