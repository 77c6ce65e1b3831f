"""Who writes the answers that a cold start learns from: a model behind a chat API, or the miniature's own writer.

Both are a function (prompt, sampling seed) -> one `Draft`: an answer, or why it is of no use.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from openai.types.chat import ChatCompletion

from clients.chat import ChatClient
from clients.http import CallFailed
from errors import Stopped
from interfaces import Prompt
from prompting import Answer, messages, parse

# Added to what the policy itself is told.
FOR_A_TEACHER = (
    " Your answer is an example from which a small model will learn. Think in two to six short lines. In the final "
    "prompt name every thing of the request with its own words, its number, its attributes beside it and its place in "
    "the picture; where the request says how things stand to each other, say so again. "
    "Begin with <think> and end with </answer>."
)
REFUSED, TRUNCATED, MALFORMED, FOREIGN = "refused", "truncated", "malformed", "not of the miniature world"
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m |i am )?(?:(?:very|so|really|truly) )?sorry|i apologi[sz]e|my apologies|unfortunately,? i"
    r"|as an ai|i (?:cannot|can['’]t|(?:can|could|will|do|am) not|(?:could|do)n['’]t|won['’]t)"
    r"|(?:i['’]m|i am) (?:not|unable))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Draft:
    """One answer of a teacher.

    Attributes:
        answer: None if it is of no use.
        drop: why it is of no use: REFUSED, TRUNCATED, MALFORMED or FOREIGN; "" if it is of use.
        text: the beginning of an answer that is of no use.
        tokens: (read, written) as the API counts them, None if it does not say.
    """

    answer: Answer | None
    drop: str = ""
    text: str = ""
    tokens: tuple[int, int] | None = None


Teacher = Callable[[Prompt, int], Awaitable[Draft]]


@asynccontextmanager
async def chat_teacher(client: ChatClient, **sampling: float) -> AsyncIterator[Teacher]:
    """A teacher behind a chat API. A call raises

    UserError: access is denied, or there is no such model.
    Stopped: the API does not answer any more.
    CallFailed: this call was not answered.
    """
    async with client.connect() as complete:

        async def draft(prompt: Prompt, seed: int) -> Draft:
            system, user = messages(prompt.text)
            asked = [{**system, "content": system["content"] + FOR_A_TEACHER}, user]
            try:
                return read(await complete(asked, seed=seed, **sampling))
            except CallFailed as error:
                if error.code == "content_filter":
                    return Draft(None, REFUSED)
                if error.status in (401, 403, 404):
                    raise client.unusable(error) from error
                if client.circuit.is_open:
                    raise Stopped(
                        f"{client.url} does not answer ({error}): run the same command again later"
                    ) from error
                raise

        yield draft


def read(reply: ChatCompletion) -> Draft:
    """The draft in a chat completion."""
    choice, usage = reply.choices[0], reply.usage
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None,)
    tokens, text = None if None in counts else counts, choice.message.content or ""
    # A model that always thinks may put a think block of its own before the one that it was asked for.
    answer = parse(text) or parse(text.partition("</think>")[2])
    said = answer.rewrite if answer else text
    if choice.message.refusal or choice.finish_reason == "content_filter" or _REFUSAL.match(said):
        return Draft(None, REFUSED, (choice.message.refusal or text)[:200], tokens)
    if choice.finish_reason == "length":
        return Draft(None, TRUNCATED, text[:200], tokens)
    return Draft(answer, tokens=tokens) if answer else Draft(None, MALFORMED, text[:200], tokens)


@asynccontextmanager
async def miniature_teacher(skill: float) -> AsyncIterator[Teacher]:
    """The miniature's own writer, right in content `skill` of the time; a draft is a function of prompt and seed."""
    from miniature import world

    looks = {f"{color} {shape}" for color in world.COLORS for shape in world.SHAPES}

    def can_be_drawn(prompt: Prompt) -> bool:
        number = sum(number for _, number in prompt.counts) or len(prompt.nouns)
        known = {*prompt.nouns} <= {*world.SHAPES} and {*prompt.attr_nouns} <= looks
        return (
            0 < number <= world.MAX_THINGS and known and (not prompt.spatial or prompt.spatial[1] in world.RELATIONS)
        )

    async def draft(prompt: Prompt, seed: int) -> Draft:
        await asyncio.sleep(0)  # so that Ctrl-C is heard
        if not can_be_drawn(prompt):
            return Draft(None, FOREIGN)
        return Draft(Answer(*world.lesson(prompt, random.Random(seed), skill)))

    yield draft
