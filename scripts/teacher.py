"""Who writes the answers that a cold start learns from: a model behind a chat API, or the miniature's own writer.

    async with ChatTeacher(url, model, ...) as teacher:
        draft = await teacher(prompt, seed)

One call is one draft: an answer that could be read, or why it could not be used. Failures of the API are neither: a
call is repeated (connection, 408, 429, 5xx, time out; back-off with jitter, Retry-After) and then raises CallFailed,
and an API that is not there, or wants another key, raises UserError, which ends the run.

The key comes from the environment, TEACHER_API_KEY, and is never kept. Left out: streaming, tool calls, batch APIs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from openai import APIConnectionError, APIStatusError

from clients.chat import open_api
from clients.http import RETRIED, back_off, checked_url
from errors import UserError, one_line
from interfaces import Prompt
from prompting import Answer, messages, parse

# What a teacher is told beside the policy's own instructions.
FOR_A_TEACHER = (
    " Your answer is an example from which a small model will learn. Think in two to six short lines. In the final "
    "prompt name every thing of the request with its own words, its number, its attributes beside it and its place in "
    "the picture; where the request says how things stand to each other, say so again. "
    "Begin with <think> and end with </answer>."
)
ATTEMPTS = 6  # at one call
MOST_WAITED = 60.0  # seconds of a Retry-After
TRIP = 8  # calls that failed for good, none between them answered, after which nobody is thought to be there
HINTS = {
    401: "set environment TEACHER_API_KEY",
    403: "set environment TEACHER_API_KEY",
    404: "does --teacher_url end in /v1, and is --teacher_model a model there?",
}

REFUSED, TRUNCATED, MALFORMED = "refused", "truncated", "malformed"
FOREIGN = "not of the miniature world"
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m |i am )?(?:(?:very|so|really|truly) )?sorry|i apologi[sz]e|my apologies|unfortunately,? i"
    r"|as an ai|i (?:cannot|can['’]t|(?:can|could|will|do|am) not|(?:could|do)n['’]t|won['’]t)"
    r"|(?:i['’]m|i am) (?:not|unable))\b",
    re.IGNORECASE,
)


class CallFailed(RuntimeError):
    """One call was not answered, its repeats included; the message says why."""


@dataclass(frozen=True)
class Draft:
    """One answer of a teacher.

    Attributes:
        answer: what could be read, None if it is of no use.
        drop: why it is of no use: REFUSED, TRUNCATED, MALFORMED or FOREIGN; "" if it is.
        text: the beginning of what was said, where it is of no use.
        tokens: (read, written), as the API counts them; None if it does not say.
    """

    answer: Answer | None
    drop: str = ""
    text: str = ""
    tokens: tuple[int, int] | None = None


class ChatTeacher:
    """A model behind an OpenAI-compatible chat API, told the policy's own format (`prompting.messages`).

    Args:
        url: base of the API ("https://api.example.com/v1"); http only to this machine, or with TEACHER_ALLOW_HTTP=1.
        model: its name there.
        timeout: seconds for one request.
        temperature, max_tokens: of sampling; an answer that is cut at `max_tokens` is dropped.

    Raises:
        UserError: a URL that cannot work.
    """

    def __init__(self, url: str, model: str, *, timeout: float, temperature: float, max_tokens: int):
        self.url, loopback = checked_url(url, "teacher", UserError)
        key = os.environ.get("TEACHER_API_KEY", "").strip()
        self._api = open_api(self.url, key, timeout, proxies=not loopback)
        self._timeout = timeout
        self._sampling = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._failures = 0  # calls in a row

    async def __aenter__(self) -> ChatTeacher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._api.close()

    async def __call__(self, prompt: Prompt, seed: int) -> Draft:
        """One draft for `prompt`; `seed` is the API's sampling seed, in [0, 2**31).

        Raises:
            CallFailed: no answer, ATTEMPTS times.
            UserError: wrong key, URL or model, or TRIP calls in a row failed.
        """
        try:
            reply = await self._reply(prompt, seed)
        except CallFailed as error:
            self._failures += 1
            if self._failures >= TRIP:
                raise UserError(
                    f"{self._failures} calls in a row failed at {self.url}, the last one: {error}; what was answered "
                    "is kept: repair the cause and run the same command again"
                ) from error
            raise
        self._failures = 0
        return read(reply)

    async def _reply(self, prompt: Prompt, seed: int) -> Mapping | None:
        """The chat completion that the API sent; None where its content filter stopped the question itself."""
        system, user = messages(prompt.text)
        asked = [{**system, "content": system["content"] + FOR_A_TEACHER}, user]
        for attempt in range(1, ATTEMPTS + 1):
            wait = 0.0
            try:
                async with asyncio.timeout(self._timeout):
                    raw = await self._api.chat.completions.with_raw_response.create(
                        messages=asked, seed=seed, **self._sampling
                    )
                reply = _completion(raw.text)
                if reply is not None:
                    return reply
                reason = f"{raw.text[:80]!r} is no chat completion"
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s"
            except APIConnectionError as error:
                reason = one_line(error.__cause__ or error)
            except APIStatusError as error:
                reason, status = one_line(error), error.status_code
                if status in HINTS:
                    raise UserError(f"teacher at {self.url} answers {reason}: {HINTS[status]}") from error
                if error.code == "content_filter":
                    return None
                if status not in RETRIED and status < 500:
                    raise CallFailed(reason) from error
                wait = _seconds(error.response.headers.get("Retry-After", ""))
            if attempt < ATTEMPTS:
                await asyncio.sleep(max(back_off(attempt), wait))
        raise CallFailed(reason)


def _completion(body: str) -> Mapping | None:
    """The chat completion in `body`, None if it holds none: then it does not come from a chat API."""
    try:
        reply = json.loads(body)
        return reply if isinstance(reply["choices"][0]["message"], dict) else None
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def read(reply: Mapping | None) -> Draft:
    """The draft in a chat completion; None is one that a content filter stopped."""
    if reply is None:
        return Draft(None, REFUSED)
    choice, tokens = reply["choices"][0], _tokens(reply.get("usage"))
    message, end = choice["message"], choice.get("finish_reason")
    text = message.get("content")
    text = text if isinstance(text, str) else ""
    # A model that always thinks may put a think block of its own before the one that it was asked for.
    answer = parse(text) or parse(text.partition("</think>")[2])
    if message.get("refusal") or end == "content_filter" or _REFUSAL.match(answer.rewrite if answer else text):
        return Draft(None, REFUSED, str(message.get("refusal") or text)[:200], tokens)
    if end == "length":
        return Draft(None, TRUNCATED, text[:200], tokens)
    return Draft(answer, tokens=tokens) if answer else Draft(None, MALFORMED, text[:200], tokens)


def _tokens(usage: object) -> tuple[int, int] | None:
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    return tuple(counts) if counts and all(type(count) is int for count in counts) else None


def _seconds(header: str) -> float:
    """Of a Retry-After that is a number, at most MOST_WAITED; 0 for a date."""
    return min(float(header), MOST_WAITED) if header.isdecimal() else 0.0


class MiniatureTeacher:
    """The miniature world's own writer: right in content `skill` of the time, careless otherwise; asks nobody."""

    def __init__(self, skill: float):
        from miniature import world  # here only: nothing else of a cold start knows the miniature

        self._world, self._skill = world, skill

    async def __aenter__(self) -> MiniatureTeacher:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def __call__(self, prompt: Prompt, seed: int) -> Draft:
        """One draft, a pure function of prompt and seed; FOREIGN for a prompt that is not of the world's grammar."""
        await asyncio.sleep(0)  # so that Ctrl-C is heard
        if not self._knows(prompt):
            return Draft(None, FOREIGN)
        return Draft(Answer(*self._world.lesson(prompt, random.Random(seed), self._skill)))

    def _knows(self, prompt: Prompt) -> bool:
        world = self._world
        looks = {f"{color} {shape}" for color in world.COLORS for shape in world.SHAPES}
        number = sum(number for _, number in prompt.counts) or len(prompt.nouns)
        return (
            0 < number <= world.MAX_THINGS
            and {*prompt.nouns} <= {*world.SHAPES}
            and {*prompt.attr_nouns} <= looks
            and (prompt.spatial is None or prompt.spatial[1] in world.RELATIONS)
        )
