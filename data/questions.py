"""Yes-no questions about pictures: does a model that learns to draw still see?

A file of JSON Lines, each row {"image": a path beside the file, "question": text, "answer": "yes" or "no"}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.text import json_rows
from errors import UserError


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        is_yes: whether "yes" is right.
    """

    text: str
    picture: Image.Image
    is_yes: bool


def load_questions(path: str | Path) -> list[Question]:
    """All questions of a file; UserError at a missing file or picture, or a bad row, with its number."""
    found, folder = [], Path(path).parent
    for place, row in json_rows(Path(path), "image", "question", "answer"):
        try:
            picture = Image.open(folder / row["image"]).convert("RGB")
            found.append(Question(row["question"], picture, {"yes": True, "no": False}[row["answer"]]))
        except (KeyError, OSError) as error:
            raise UserError(f"{place}: answer must be yes or no, image a picture's file ({error!r})") from error
    return found
