"""What the policy is told and how its answer is read: one template, one parser, for train, eval, infer and serve.

An answer is one think block, then one answer block, and nothing else:

    <think>free text, any number of lines</think> <answer>the prompt that the image model is given</answer>
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from itertools import islice

logger = logging.getLogger(__name__)

MAX_PROMPT_CHARS = 2_000  # of the user's text: about 500 tokens, as many as the longest-reading image models read

SYSTEM_PROMPT = (
    "You rewrite a request for a picture into a better prompt for an image model. "
    "First think inside <think></think>: which subjects, with which attributes, how many of each, "
    "where each one is in the layout, and which light and style suit them. "
    "Then write the final prompt inside <answer></answer>: "
    "at most 120 words, so that the image model reads all of it. "
    "Keep everything the user asked for and add nothing that contradicts it. "
    "Write nothing outside the two blocks."
)

# Possessive repeats: a failed match gives nothing back, so the scan is linear in the length of the text.
_TAG = re.compile(r"<\s*+(/?)\s*+(think|answer)\s*+>")
_ORDER = ["think", "/think", "answer", "/answer"]


@dataclass(frozen=True)
class Answer:
    """A completion that could be read.

    Attributes:
        reasoning: text of the think block, stripped, with its line breaks; never blank.
        rewrite: text of the answer block on one line, single spaces; never blank.
    """

    reasoning: str
    rewrite: str


def messages(text: str) -> list[dict[str, str]]:
    """The conversation for one request: system, then user, ready for `tokenizer.apply_chat_template`.

    The user's text is passed as it is, but for two repairs: lone surrogates, which tokenizers refuse, become U+FFFD,
    and what is beyond MAX_PROMPT_CHARS characters is cut (logged as a warning).
    """
    text = well_formed(text)
    if len(text) > MAX_PROMPT_CHARS:
        logger.warning(
            "prompt of %d characters cut to %d: %r...; shorten it to have all of it read",
            len(text),
            MAX_PROMPT_CHARS,
            text[:40],
        )
        text = text[:MAX_PROMPT_CHARS]
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


def well_formed(text: str) -> str:
    """`text` with each lone surrogate, which no tokenizer or UTF-8 file takes, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse(completion: str) -> Answer | None:
    """Read a completion; None unless it is exactly one non-blank think block, then one non-blank answer block.

    White space may stand around and inside tags (`< think >`). A repeated, nested or missing tag, or any text
    outside the blocks, is None. Never raises; time is linear in the length of the completion.
    """
    tags = list(islice(_TAG.finditer(completion), len(_ORDER) + 1))
    if [tag[1] + tag[2] for tag in tags] != _ORDER:
        return None
    think, end_think, answer, end_answer = tags
    before, between = completion[: think.start()], completion[end_think.end() : answer.start()]
    after = completion[end_answer.end() :]
    reasoning = well_formed(completion[think.end() : end_think.start()]).strip()
    rewrite = " ".join(well_formed(completion[answer.end() : end_answer.start()]).split())
    if (before + between + after).strip() or not _visible(reasoning) or not _visible(rewrite):
        return None
    return Answer(reasoning, rewrite)


def completion(reasoning: str, rewrite: str) -> str:
    """The text that `parse` reads back as (reasoning, rewrite): used to write cold-start examples.

    Raises:
        ValueError: a part is blank or has a tag in it, so that the text could not be read back.
    """
    text = f"<think>{reasoning.strip()}</think>\n<answer>{' '.join(rewrite.split())}</answer>"
    if parse(text) is None:
        raise ValueError(
            f"cannot be read back: reasoning {reasoning[:80]!r}, rewrite {rewrite[:80]!r}; "
            "give two non-blank texts without <think> or <answer> tags"
        )
    return text


def _visible(text: str) -> bool:
    return any(char.isprintable() and not char.isspace() for char in text)
