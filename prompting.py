"""What the policy is told and how its answer is read: one template, one parser, for train, eval, infer and serve.

An answer is one think block, then one answer block, and nothing else:

    <think>free text, any number of lines</think> <answer>the prompt that the image model is given</answer>

With `reasoning=False` a policy is told to write the answer block alone, and that is what its answer is read as.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

logger = logging.getLogger(__name__)

MAX_PROMPT_CHARS = 2_000  # of the user's text: about 500 tokens, as many as the longest-reading image models read

_ASK = "You rewrite a request for a picture into a better prompt for an image model. "
_THINK = (
    "First think inside <think></think>: which subjects, with which attributes, how many of each, "
    "where each one is in the layout, and which light and style suit them. Then write"
)
_ANSWER = (
    " the final prompt inside <answer></answer>: at most 120 words, so that the image model reads all of it. "
    "Keep everything the user asked for and add nothing that contradicts it. "
)
SYSTEM_PROMPT = _ASK + _THINK + _ANSWER + "Write nothing outside the two blocks."
DIRECT_PROMPT = _ASK + "Write" + _ANSWER + "Write nothing outside the block."

# Possessive repeats: a failed match gives nothing back, so the scan is linear in the length of the text.
_TAG = re.compile(r"<\s*+(/?)\s*+(think|answer)\s*+>")
_MARKER = re.compile(r"<\|(?=[^<>|]*\|>)")  # the opening of one; linear, since it cannot cross a bracket or bar
_UNTHOUGHT = re.compile(r"\A(?:<think>)?\s*</think>\s*")  # how templates say that there is nothing to think
_ORDER = {True: ["think", "/think", "answer", "/answer"], False: ["answer", "/answer"]}  # with reasoning, without


@dataclass(frozen=True)
class Answer:
    """A completion that could be read.

    Attributes:
        reasoning: text of the think block, stripped, with its line breaks; never blank. None where none is asked for.
        rewrite: text of the answer block on one line, single spaces; never blank.
    """

    reasoning: str | None
    rewrite: str


def messages(text: str, reasoning: bool = True) -> list[dict[str, str]]:
    """The conversation for one request: system, then user, ready for `tokenizer.apply_chat_template`.

    The user's text is passed as it is, but for three repairs: lone surrogates, which tokenizers refuse, become U+FFFD;
    chat markers (`<|im_end|>`), which would end the user's turn, get a full-width bracket; and what is beyond
    MAX_PROMPT_CHARS characters is cut (logged as a warning).
    """
    text = _MARKER.sub("＜|", well_formed(text))
    if len(text) > MAX_PROMPT_CHARS:
        logger.warning(
            "prompt of %d characters cut to %d: %r...; shorten it to have all of it read",
            len(text),
            MAX_PROMPT_CHARS,
            text[:40],
        )
        text = text[:MAX_PROMPT_CHARS]
    system = SYSTEM_PROMPT if reasoning else DIRECT_PROMPT
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def revision(text: str, completion: str, missing: Sequence[str], reasoning: bool = True) -> list[dict[str, str]]:
    """The conversation that asks for a better rewrite, once the picture of the first has been looked at.

    Args:
        text: the user's request.
        completion: what the policy had answered.
        missing: what the picture lacks of the request, in words ("a red cup"); none means that it is wrong elsewhere.
        reasoning: as in `messages`.
    """
    lacks = f"does not show {', '.join(missing)}" if missing else "does not keep the numbers and places asked for"
    again = f"The picture drawn from this {lacks}. Answer once more, in the same form, so that it does."
    return [
        *messages(text, reasoning),
        {"role": "assistant", "content": completion},
        {"role": "user", "content": again},
    ]


def opening(rendered: str) -> str:
    """What a chat template writes of the answer itself ("<think>\\n") at its end; "" for a blank think block."""
    tag = _TAG.search(rendered)
    return _UNTHOUGHT.sub("", rendered[tag.start() :]) if tag else ""


def well_formed(text: str) -> str:
    """`text` with each lone surrogate, which no tokenizer or UTF-8 file takes, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse(completion: str, reasoning: bool = True) -> Answer | None:
    """Read a completion; None unless it is exactly one non-blank think block, then one non-blank answer block.

    White space may stand around and inside tags (`< think >`). A repeated, nested or missing tag, or any text
    outside the blocks, is None; without `reasoning`, so is a think block. Never raises; time is linear in the length
    of the completion.
    """
    order = _ORDER[reasoning]
    tags = list(islice(_TAG.finditer(completion), len(order) + 1))
    if [tag[1] + tag[2] for tag in tags] != order:
        return None
    opened, closed = tags[0::2], tags[1::2]
    blocks = [well_formed(completion[a.end() : b.start()]) for a, b in zip(opened, closed, strict=True)]
    starts, ends = [*(tag.start() for tag in opened), None], [0, *(tag.end() for tag in closed)]
    outside = "".join(completion[end:start] for end, start in zip(ends, starts, strict=True))
    if outside.strip() or not all(map(_visible, blocks)):
        return None
    return Answer(blocks[0].strip() if reasoning else None, " ".join(blocks[-1].split()))


def unreadable_because(completion: str, reasoning: bool = True) -> str:
    """Why `parse` cannot read a completion, in a few words."""
    order = _ORDER[reasoning]
    tags = [tag[1] + tag[2] for tag in _TAG.finditer(completion)]
    if missing := [tag for tag in order if tag not in tags]:
        return f"no <{missing[0]}>"
    return "blank, or with text outside of its blocks" if tags == order else "with more tags than one answer has"


def completion(reasoning: str | None, rewrite: str) -> str:
    """The text that `parse` reads back as (reasoning, rewrite): used to write cold-start examples.

    Without reasoning (None) it is the answer block alone, which `parse(..., reasoning=False)` reads.

    Raises:
        ValueError: a part is blank or has a tag in it, so that the text could not be read back.
    """
    text = f"<answer>{' '.join(rewrite.split())}</answer>"
    if reasoning is not None:
        text = f"<think>{reasoning.strip()}</think>\n{text}"
    if parse(text, reasoning is not None) is None:
        raise ValueError(
            f"cannot be read back: reasoning {(reasoning or '')[:80]!r}, rewrite {rewrite[:80]!r}; "
            "give two non-blank texts without <think> or <answer> tags"
        )
    return text


def _visible(text: str) -> bool:
    return any(char.isprintable() and not char.isspace() for char in text)
