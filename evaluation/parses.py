"""What T2I-CompBench's rules need to know of a prompt's grammar, from one of three named sources.

    a JSON file     frozen parses, the way to publish numbers: noun chunks move between versions of a parser
    "spacy"         spaCy's en_core_web_sm, as officially, where the user has both installed (not in the lock)
    "grammar"       `data.grammar.read`, for prompts of one or two things ("a red car and a green bench"): not the
                    official parser, and a noun of two words stays whole

The file is {"source": who parsed, "prompts": {prompt: {"chunks": [...], "nouns": [...], "pair": [...], "clip_text":
"..."}}}: all noun chunks of the prompt as they stand in it, its NOUN tokens, and for complex prompts the nouns around
the relation ([] if there are not just two) and the text without ADJ tokens. `freeze` writes it by spaCy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from data.grammar import read
from data.text import json_value, read_text, text_lines
from errors import UserError, one_line

SPACY_MODEL = "en_core_web_sm"
HOW_TO_FREEZE = (
    "write one where spaCy is installed: python -c \"from evaluation.parses import freeze; freeze('complex_val.txt', "
    "'parses.json')\""
)
_PLACES = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")


@dataclass(frozen=True)
class Parse:
    """One prompt.

    Attributes:
        chunks: noun chunks as they stand in the prompt, in order.
        nouns: its nouns in order.
        pair: the two things of its relation, () if there are not just two; None if the source does not say.
        clip_text: the prompt without adjectives; None if the source does not say.
    """

    chunks: tuple[str, ...]
    nouns: tuple[str, ...]
    pair: tuple[str, ...] | None = None
    clip_text: str | None = None


class Source(NamedTuple):
    """A source's name, with versions where it has some, and its parse of a prompt, None if it has none."""

    name: str
    parse: Callable[[str], Parse | None]


def parser(source: str | Path) -> Source:
    """The source "spacy", "grammar", or the JSON file at a path."""
    if source == "spacy":
        nlp = _spacy()
        name = f"spacy {nlp.meta['spacy_version']}, {SPACY_MODEL} {nlp.meta['version']}"
        return Source(name, lambda prompt: tagged(nlp(prompt)))
    if source == "grammar":
        return Source("grammar", by_grammar)
    name, frozen = _load(Path(source))
    return Source(f"{Path(source).name} by {name}", frozen.get)


# ----- from tokens


def around_the_place(tokens: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The nouns before and after the place word of (text, part of speech) tokens; () if there are not just two.

    Before it, the nearest noun or name; after it, the first noun, or if there is none the last word of the first name
    that something follows.
    """
    words, found = [text for text, _ in tokens], []
    for start in range(len(words)):
        length = next((n for n in (3, 2, 1) if " ".join(words[start : start + n]) in _PLACES), 0)
        if length:
            found += islice((text for text, tag in reversed(tokens[:start]) if tag in ("NOUN", "PROPN")), 1)
            after = tokens[start + length :]
            nouns = [text for text, tag in after if tag == "NOUN"]
            names = [text for (text, tag), (_, beyond) in pairwise(after) if tag == "PROPN" and beyond != "PROPN"]
            found += (nouns or names)[:1]
    return tuple(found) if len(found) == 2 else ()


def tagged(document) -> Parse:
    """The parse of a spaCy document."""
    tokens = [(token.text, token.pos_) for token in document]
    return Parse(
        tuple(chunk.text for chunk in document.noun_chunks),
        tuple(text for text, tag in tokens if tag == "NOUN"),
        around_the_place(tokens),
        " ".join(text for text, tag in tokens if tag != "ADJ"),
    )


# ----- sources


def by_grammar(prompt: str) -> Parse | None:
    """The parse of a prompt of `data.grammar` whose things have articles; None for any other."""
    fields = read(prompt)
    lowered = prompt.lower().replace("grey", "gray")
    chunks, start = [], 0
    for name in fields.attr_nouns or fields.nouns:
        found = re.compile(rf"\b(?:an?|the) {re.escape(name)}\b").search(lowered, start)
        if not found:
            return None
        chunks.append(prompt[found.start() : found.end()])
        start = found.end()
    return Parse(tuple(chunks), fields.nouns) if chunks else None


def freeze(prompts: str | Path, out: str | Path) -> None:
    """Write the frozen file `out` for each line of the text file `prompts`; parses that `out` has already stay."""
    (name, parse), out = parser("spacy"), Path(out)
    stored, known = _load(out) if out.exists() else (name, {})
    if stored != name:
        raise UserError(f"{out} was written by {stored!r}, this is {name!r}: give another file")
    known |= {line: parse(line) for _, line in text_lines(Path(prompts)) if line not in known}
    rows = {prompt: asdict(one) for prompt, one in known.items()}
    out.write_text(json.dumps({"source": name, "prompts": rows}, indent=1, ensure_ascii=False), encoding="utf-8")


def _spacy():
    try:
        import spacy

        return spacy.load(SPACY_MODEL)
    except (ModuleNotFoundError, OSError) as error:
        raise UserError(
            f"--parses spacy needs spaCy and its model: pip install spacy; python -m spacy download {SPACY_MODEL}; or "
            "give a frozen file of parses"
        ) from error


def _load(path: Path) -> tuple[str, dict[str, Parse]]:
    """(who parsed, parses by prompt) of a frozen file."""
    try:
        content = json_value(read_text(path), str(path))
        return content["source"], {prompt: _parse(row) for prompt, row in content["prompts"].items()}
    except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of parses ({one_line(error)}): {HOW_TO_FREEZE}") from error


def _parse(row: dict[str, Any]) -> Parse:
    chunks, nouns, pair = row["chunks"], row["nouns"], row.get("pair")
    if not all(isinstance(words, list) for words in (chunks, nouns, pair or [])) or len(pair or []) not in (0, 2):
        raise ValueError(f"{row} needs lists 'chunks' and 'nouns', and a 'pair' of two things or none")
    return Parse(tuple(chunks), tuple(nouns), None if pair is None else tuple(pair), row.get("clip_text"))
