"""Text that people and other programs wrote: one way to read it, and one normal form to compare it by.

What cannot be seen is taken out of every text. A line ends with \\n, \\r\\n or \\r, and not with U+2028 or its like.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, one_line

_BLANK = re.compile(r"[^\S\t\n ]|[\u2800\u3164\uffa0]")  # every blank and break but tab, line feed and space
# Unicode's Default_Ignorable_Code_Point without what is in _SHAPING; control characters; annotations.
_UNSEEN = re.compile(
    "[\x01-\x08\x0e-\x1b\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff0-\ufffc\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e001f\U000e0080-\U000e00ff]"
)
# Joiners and selectors shape a letter without case or a symbol (Persian, Hindi, emoji) or a keycap, tags a black flag.
_JOINERS, _TAGS = "[\u180b-\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]", "\U000e0020-\U000e007f"
_SHAPING = re.compile(f"{_JOINERS}|[{_TAGS}]")
_LOOSE = re.compile(
    rf"(?<![\xa9\xae\u0590-\u1dff\u203c\u2049\u2100-\ufe0f\ufe70-\U000dffff]){_JOINERS}+(?!\u20e3)"
    rf"|(?<![\U0001f3f4{_TAGS}])[{_TAGS}]+"
)
_MARKS = {"'": "‘’‚‛‹›`´ʹʻʼ′‵", '"': "“”„‟«»″‶〝〞〟「」『』｢｣", "-": "‐‑‒–—―−"}
_PLAIN = str.maketrans({mark: plain for plain, marks in _MARKS.items() for mark in marks})
_ENDS = ' .,;:!?"。、।؟۔'


def visible(text: str) -> str:
    """`text` without what cannot be seen or shapes nothing; blanks and breaks but tab and line feed are spaces."""
    return _LOOSE.sub("", _UNSEEN.sub("", _BLANK.sub(" ", text)))


def plain(text: str) -> str:
    """`text` in NFKC with straight quotes and plain hyphens, without what cannot be seen, joiners included."""
    return unicodedata.normalize("NFKC", _SHAPING.sub("", visible(text)).translate(_PLAIN)).replace("''", '"')


def fold(text: str) -> str:
    """`text`, plain and without case."""
    return unicodedata.normalize("NFKC", plain(text).casefold())


def normalize(text: str) -> str:
    """The normal form, which two equal prompts share: folded, single spaces, no punctuation at the end."""
    text = " ".join(fold(text).split())
    return text.rstrip(_ENDS).lstrip('"¿¡') or text


def read_text(path: Path) -> str:
    """The visible text of a file, "\\n" at its line ends; UserError if it is not UTF-8 or UTF-16, or holds a NUL."""
    try:
        content = path.read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        without = {content[1:4:2]: "utf-16-le", content[0:3:2]: "utf-16-be"}.get(b"\0\0", "utf-8-sig")
        text = content.decode("utf-16" if marked else without).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        line = 1 + len(re.findall(rb"\r\n?|\n", content[: error.start]))
        raise UserError(f"{path}, line {line}, byte {error.start}: no {error.encoding}: save it as UTF-8") from error
    if found := re.search("[\0\ufffe]", text):  # U+FFFE is a BOM in the other byte order
        line = 1 + text.count("\n", 0, found.start())
        raise UserError(f"{path}, line {line}: holds {found[0]!a}, which is no text: save all of it as UTF-8")
    return visible(text)


def text_lines(path: Path) -> list[tuple[int, str]]:
    """(line number from 1, line without outer blanks) of each line that is not blank; UserError if there is none."""
    lines = enumerate(map(str.strip, read_text(path).split("\n")), 1)
    if not (found := [(number, line) for number, line in lines if line]):
        raise UserError(f"{path}: nothing in it: give a file with one item a line")
    return found


def json_rows(path: Path, *texts: str) -> Iterator[tuple[str, Any]]:
    """(its place, the value) of each line that is not blank; UserError for one that is no object with all `texts`."""
    for number, line in text_lines(path):
        row = json_value(line, place := f"{path}, line {number}")
        for name in texts:
            if not isinstance(row, dict) or not isinstance(text := row.get(name), str) or not text.strip():
                raise UserError(f"{place}: {row!r:.80} is no object whose {name!r} is a text that is not blank")
        yield place, row


def json_value(text: str, place: str) -> Any:
    """The value of a JSON text, visible in all its texts; UserError also for a key that comes twice or a NUL."""
    try:
        return _seen(json.loads(text, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({one_line(error)}): correct it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = {visible(key): _seen(value) for key, value in pairs}
    if len(row) < len(pairs):
        raise ValueError(f"a key comes twice: {', '.join(key for key, _ in pairs)}")
    return row


def _seen(value: Any) -> Any:
    if isinstance(value, str):
        if found := re.search("[\0\ud800-\udfff]", value):
            raise ValueError(f"{found[0]!a} in {value[:40]!a}: a NUL or half a surrogate pair is no text")
        return visible(value)
    return [_seen(one) for one in value] if isinstance(value, list) else value


def read_yaml(path: str | Path, flag: str = "--config") -> dict[str, Any]:
    """The options in the YAML file that `flag` names; UserError if it holds anything else."""
    try:
        options = yaml.safe_load(read_text(Path(path))) or {}
    except (UserError, yaml.YAMLError) as error:
        raise UserError(f"{flag} {path} cannot be read or is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"{flag} {path} holds a {type(options).__name__}, not `option: value` lines")
    return options
