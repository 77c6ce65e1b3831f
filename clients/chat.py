"""The one client for every VLM judge: questions about pictures in, verdicts out, None where none could be had.

A question is a template with the user's ORIGINAL prompt in it, and pictures; it goes to an OpenAI-compatible chat API
at temperature 0. What can fail does so here and quietly: no verdict is ever made up, nothing remote raises out of a
batch, and a batch ends in bounded time.

    one call    at most `call_timeout` seconds, retries (connection, 408, 429, 5xx; back-off with jitter) included
    one batch   at most `batch_timeout` seconds; what is unfinished then is None
    a dead API  after as many failures in a row as two rounds of calls in flight, at least TRIP, calls fail at once;
                one probe per PAUSE seconds finds out that it is back

No torch here: a program that only asks starts at once. Left out: streaming, tool calls, logits beyond the first token,
`Retry-After`, and redirects, which could carry pictures to another host.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout
from PIL import Image

from clients.http import ALIVE, CHECK_TIMEOUT, CONNECT_TIMEOUT, RETRIED, Circuit, back_off, checked_url, finished
from errors import UserError, one_line
from prompting import MAX_PROMPT_CHARS, well_formed
from run.signals import leaving

logger = logging.getLogger(__name__)

Verdict = str | float

SLOT = "{prompt}"  # where a template takes the user's prompt
MAX_TOKENS = 4096  # of an answer: room to think aloud
TOP_TOKENS = 20  # whose probabilities are asked for, the most that the API allows
MAX_SLOT_CHARS = 16_000  # of what goes into a slot other than the prompt's
LOSSLESS_PIXELS = 512 * 512  # up to here a picture is sent as PNG, above as JPEG
ATTEMPTS = 4  # of one call
TRIP, PAUSE = 8, 30.0  # failures in a row that open the circuit, at least; seconds until a probe

# "[INST]" and the like: bracketed capitals. Angle brackets, of any kind, need no pattern.
_BRACKETED = re.compile(r"\[(/?[A-Z_]{2,})\]")
_ANGLES = str.maketrans("<>", "＜＞")
_SLOTS = re.compile(r"\{([a-z]+)\}")


@dataclass(frozen=True)
class Template:
    """What a judge is told, and how its answer is read.

    Attributes:
        text: the instructions, with SLOT where the user's prompt goes, and {slots} for what else a question brings.
        parse: answer -> verdict, None if the answer holds none.
        first_token: not words but the first token's probabilities are wanted: the answer that `parse` is given is what
            `first_tokens` says, "" from a server that gives none.
    """

    text: str
    parse: Callable[[str], Verdict | None]
    first_token: bool = False

    @property
    def version(self) -> str:
        """16 hex digits of the text's SHA-256: other words, other verdicts."""
        asked = self.text + "\nfirst token" * self.first_token
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def fill(self, prompt: str, **slots: str) -> str:
        """The text with `prompt` and what goes into its other slots: well-formed, cut to length, `neutralise`d.

        Raises:
            KeyError: nothing is given for a slot.
        """
        given = {key: well_formed(text)[:MAX_SLOT_CHARS] for key, text in slots.items()}
        given["prompt"] = well_formed(prompt)[:MAX_PROMPT_CHARS]
        return _SLOTS.sub(lambda slot: neutralise(given[slot[1]]), self.text)


@dataclass(frozen=True)
class Question:
    """One thing to ask: a template, the user's own words, and the pictures in the order in which they are shown.

    `slots` is for what else the template takes.
    """

    template: Template
    prompt: str
    images: tuple[Image.Image, ...]
    slots: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is asked in words."""
        return self.template.fill(self.prompt, **self.slots)


@dataclass(frozen=True)
class _Outcome:
    """What came of a question: a verdict (`cached`: of an earlier call), or why there is none: failed, or unread."""

    verdict: Verdict | None = None
    failure: str = ""
    unread: str = ""
    cached: bool = False

    @property
    def reason(self) -> str:
        """Why there is no verdict, "" if there is one."""
        return self.failure or (f"no verdict in {self.unread[:200]!r}" if self.unread else "")


class _CallFailed(Exception):
    """No answer could be had; the message says why."""


class VLMClient:
    """Asks a VLM behind an OpenAI-compatible API. Nothing is contacted before the first `ask` or `check`.

    The API key is read from the environment, JUDGE_API_KEY, at each call and is never kept; a server on this machine
    needs none. Proxies of the environment are used for other machines only. Instances can be pickled.

    Args:
        url: base of the API ("http://127.0.0.1:8080/v1").
        model: the model's name there.
        concurrency: calls in flight at once.
        call_timeout: seconds for one call, retries included, from the moment that it is its turn.
        batch_timeout: seconds for all calls of one `ask`.
        cache: SQLite file of verdicts, shared by any number of processes; None keeps none. A verdict is known by its
            pictures, filled template, template version and `model`: take a new file when another model gets that name.

    Attributes:
        metrics: of the last `ask`, distinct questions: "asked" of the server, "cached", and of those asked "failed"
            (no answer) and "unparsable" (an answer without a verdict).
        reasons: of the last `ask`, one per question: why there is no verdict, on one line; "" where there is one.

    Raises:
        UserError: a value that cannot work, plain http to another machine, or a cache that is no such file.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 16,
        call_timeout: float = 120.0,
        batch_timeout: float = 900.0,
        cache: str | Path | None = None,
    ):
        self.url, self.loopback = checked_url(url, "judge", UserError)
        if not model:
            raise UserError("the judge's model has no name: give --judge_model, see GET /v1/models of the server")
        if concurrency < 1:
            raise UserError(f"judge concurrency is {concurrency}, must be at least 1")
        for name, seconds in (("call_timeout", call_timeout), ("batch_timeout", batch_timeout)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise UserError(f"judge {name} is {seconds}, must be a positive number of seconds")
        self.model, self.concurrency = model, concurrency
        self.call_timeout, self.batch_timeout = call_timeout, batch_timeout
        self.cache = _Cache(cache) if cache is not None else None
        self.metrics: dict[str, float] = {}
        self.reasons: list[str] = []
        self._early: dict[str, _Outcome] = {}
        self._circuit = Circuit(max(TRIP, 2 * concurrency), PAUSE)

    def prefetch(self, questions: Sequence[Question]) -> None:
        """Ask already what a later `ask` will; what came of it, failures too, waits for the next `ask`.

        May run beside anything but `ask`; what is unfinished after `batch_timeout` has failed.
        """
        distinct = dict(zip(self._keys(questions), questions, strict=True))
        self._early |= self._outcomes({key: q for key, q in distinct.items() if key not in self._early})

    def ask(self, questions: Sequence[Question]) -> list[Verdict | None]:
        """One verdict per question, in order; None where the call failed or the answer could not be read.

        Equal questions (same template, prompt and pixels) are asked once. Only verdicts are cached, never failures.
        Runs its own event loop, so it cannot be called from inside one.
        """
        keys = self._keys(questions)
        distinct = dict(zip(keys, questions, strict=True))
        early = {key: self._early[key] for key in distinct if key in self._early}
        self._early = {}
        outcomes = early | self._outcomes({key: question for key, question in distinct.items() if key not in early})
        self._report(outcomes)
        self.reasons = [outcomes[key].reason for key in keys]
        return [outcomes[key].verdict for key in keys]

    def _outcomes(self, questions: Mapping[str, Question]) -> dict[str, _Outcome]:
        """What came of each question: a verdict that is cached, or that of a call."""
        deadline = time.monotonic() + self.batch_timeout
        known = self.cache.get(questions) if self.cache and questions else {}
        to_ask = {key: question for key, question in questions.items() if key not in known}
        asked = asyncio.run(self._ask_all(to_ask, deadline)) if to_ask else {}
        new = {key: outcome.verdict for key, outcome in asked.items() if outcome.verdict is not None}
        if self.cache and new:
            self.cache.put(new)
        return {key: _Outcome(verdict, cached=True) for key, verdict in known.items()} | asked

    def check(self) -> None:
        """Ask the server once which models it has (GET /models).

        Raises:
            UserError: nobody answers, access is denied, it is no such API, or it lacks `model`; with what to do.
        """
        names = asyncio.run(self._model_names())
        if self.model not in names:
            raise UserError(
                f"the judge at {self.url} serves {', '.join(map(repr, names)) or 'no model'}, not {self.model!r}: "
                "correct --judge_model"
            )

    def _keys(self, questions: Sequence[Question]) -> list[str]:
        """For each question what tells it from all others, in any batch, process and run."""
        hashes = {key: picture_hash(image) for key, image in _distinct_images(questions).items()}
        rows = [
            [q.template.version, self.model, q.text, *(hashes[id(image)] for image in q.images)] for q in questions
        ]
        return [hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows]

    async def _ask_all(self, questions: Mapping[str, Question], deadline: float) -> dict[str, _Outcome]:
        """The outcome of every question; what is unfinished at `deadline` (of time.monotonic) has failed."""
        uris = {key: data_uri(image) for key, image in _distinct_images(questions.values()).items()}
        turns, outcomes, rows = asyncio.Semaphore(self.concurrency), {}, list(questions.items())
        probes = 1 if self._circuit.is_open else 0  # asked before the others: is somebody there again?
        async with self._connect() as api:
            for some in (rows[:probes], rows[probes:]):
                calls = {key: asyncio.create_task(self._ask(api, turns, question, uris)) for key, question in some}
                outcomes |= await self._finished(calls, deadline)
        return outcomes

    async def _finished(self, calls: Mapping[str, asyncio.Task[_Outcome]], deadline: float) -> dict[str, _Outcome]:
        """Outcomes of calls that are under way; an error that is no failure of a call (a bug) is raised."""
        in_time = await finished(calls, deadline)
        reason = "the run was told to leave" if leaving() else f"the batch's {self.batch_timeout:g} s"
        too_late = _Outcome(failure=f"unfinished after {reason}")
        return {key: in_time.get(key, too_late) for key in calls}

    async def _ask(
        self, api: AsyncOpenAI, turns: asyncio.Semaphore, question: Question, uris: Mapping[int, str]
    ) -> _Outcome:
        async with turns:
            try:
                async with asyncio.timeout(self.call_timeout):
                    answer = await self._answer(api, question, uris)
            except TimeoutError:
                reason = f"no answer within {self.call_timeout:g} s"
                self._circuit.failed(reason)
                return _Outcome(failure=reason)
            except _CallFailed as error:
                return _Outcome(failure=str(error))
        verdict = question.template.parse(answer)
        return _Outcome(unread=answer or "an empty answer") if verdict is None else _Outcome(verdict)

    async def _answer(self, api: AsyncOpenAI, question: Question, uris: Mapping[int, str]) -> str:
        """The judge's words; raises _CallFailed once a failure is final or the circuit is open."""
        pictures = [{"type": "image_url", "image_url": {"url": uris[id(image)]}} for image in question.images]
        words = {"type": "text", "text": question.text}
        if question.template.first_token:
            wanted, read = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_TOKENS}, first_tokens
        else:
            wanted, read = {"max_tokens": MAX_TOKENS}, _content
        for attempt in itertools.count(1):
            if not self._circuit.lets_through():
                raise _CallFailed(f"not asked: {self._circuit.failures} failures in a row, {self._circuit.reason}")
            try:
                reply = await api.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=[{"role": "user", "content": [*pictures, words]}],
                    temperature=0,
                    **wanted,
                )
            except APIConnectionError as error:
                reason, again = one_line(error.__cause__ or error), True
                self._circuit.failed(reason)
            except APIStatusError as error:
                reason, status = one_line(error), error.status_code
                again = status in RETRIED or status >= 500
                if status in ALIVE:
                    self._circuit.succeeded()
                else:
                    self._circuit.failed(reason)
            else:
                self._circuit.succeeded()
                return read(reply.text)
            if not again or attempt == ATTEMPTS:
                raise _CallFailed(reason)
            await asyncio.sleep(back_off(attempt))

    async def _model_names(self) -> list[str]:
        where = f"judge at {self.url}"
        async with self._connect() as api:
            try:
                async with asyncio.timeout(CHECK_TIMEOUT):
                    reply = await api.models.with_raw_response.list()
            except (APIConnectionError, TimeoutError) as error:
                raise UserError(
                    f"no {where} ({one_line(error.__cause__ or error)}): start one with scripts/serve_judge.sh, or "
                    "name another with --judge_url"
                ) from error
            except APIStatusError as error:
                hint = {401: "set JUDGE_API_KEY", 403: "set JUDGE_API_KEY", 404: "does --judge_url end in /v1?"}
                what = hint.get(error.status_code, "start one with scripts/serve_judge.sh")
                raise UserError(f"{where} answers {one_line(error)}: {what}") from error
        try:
            return [str(model["id"]) for model in json.loads(reply.text)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where} is no OpenAI-compatible API: --judge_url must end in its /v1") from error

    def _connect(self) -> AsyncOpenAI:
        key = os.environ.get("JUDGE_API_KEY", "").strip()
        return open_api(self.url, key, self.call_timeout, proxies=not self.loopback)

    def _report(self, outcomes: Mapping[str, _Outcome]) -> None:
        failures = [outcome.failure for outcome in outcomes.values() if outcome.failure]
        unread = [outcome.unread for outcome in outcomes.values() if outcome.unread]
        cached = sum(outcome.cached for outcome in outcomes.values())
        asked = len(outcomes) - cached
        counts = {"asked": asked, "cached": cached, "failed": len(failures), "unparsable": len(unread)}
        self.metrics = {name: float(count) for name, count in counts.items()}
        if failures:
            logger.warning("%d of %d judge calls failed, one: %s", len(failures), asked, failures[0])
        if unread:
            logger.warning("%d of %d judge answers have no verdict, one: %.200r", len(unread), asked, unread[0])


# ----- what is sent, what comes back


def neutralise(text: str) -> str:
    """`text` in which nothing can pass for a tag or a chat marker, readable to a model as before.

    All angle brackets become their full-width twins (`<score>`, `</prompt>`, `<|im_start|>` in any spelling), and so
    do the brackets around capitals (`[INST]`, `[/IMG]`).
    """
    return _BRACKETED.sub(r"［\1］", text).translate(_ANGLES)


def after_thinking(answer: str) -> str:
    """What an answer says once its think blocks are closed; "" if one is left open: then nothing was decided."""
    final = answer.rpartition("</think>")[2]
    return "" if "<think>" in final else final


def picture_hash(image: Image.Image) -> str:
    """64 hex digits of the SHA-256 of size and RGB pixels: equal pictures, equal hashes, in every run."""
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()


def data_uri(image: Image.Image) -> str:
    """The RGB picture as a data URI: PNG up to LOSSLESS_PIXELS pixels, else JPEG of quality 95."""
    kind, options = ("png", {}) if image.width * image.height <= LOSSLESS_PIXELS else ("jpeg", {"quality": 95})
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _distinct_images(questions: Iterable[Question]) -> dict[int, Image.Image]:
    return {id(image): image for question in questions for image in question.images}


def _content(body: str) -> str:
    """The answer in a chat completion's JSON, "" if there is none: then it cannot be parsed either."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def first_tokens(body: str) -> str:
    """JSON of token -> probability for the likeliest first tokens of a chat completion's JSON, "" if it gives none."""
    try:
        likeliest = json.loads(body)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        weights = [(str(token["token"]), math.exp(token["logprob"])) for token in likeliest]
    except (ValueError, KeyError, IndexError, TypeError, OverflowError):
        return ""
    chances: dict[str, float] = {}
    for token, chance in weights:
        chances[token] = chances.get(token, 0.0) + chance
    return json.dumps(chances) if chances and sum(chances.values()) < 1.01 else ""


def open_api(url: str, key: str, timeout: float, *, proxies: bool) -> AsyncOpenAI:
    """The SDK without its own retries, redirects, and what the environment says about api.openai.com.

    Args:
        url: as `checked_url` returns it.
        key: "" for a server that needs none.
        timeout: seconds for one request.
        proxies: whether those of the environment are used.
    """
    api = AsyncOpenAI(
        base_url=url,
        api_key=key or "none",
        default_headers={"Authorization": f"Bearer {key or 'none'}"},  # else OPENAI_CUSTOM_HEADERS could replace it
        max_retries=0,
        timeout=Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout)),
        http_client=DefaultAsyncHttpxClient(trust_env=proxies, follow_redirects=False),
    )
    api.organization = api.project = None
    return api


# ----- what outlives a call


class _Cache:
    """Verdicts in an SQLite file: each call opens it anew, so threads and processes may share it.

    SQLite's rollback journal, not its write-ahead log, which needs shared memory and so fails on network folders. Once
    in use a cache that fails (full disk, lock not had in time) costs the verdicts in it, with a warning, not the run.

    The file is made with the first batch: a run that is refused before leaves nothing behind.

    Raises:
        UserError: what is at `path` is no such file, or `path` lies in something that is no folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            there = next(parent for parent in self.path.absolute().parents if parent.exists())
            if not there.is_dir():
                raise NotADirectoryError(f"{there} is no folder")
            if self.path.exists():
                self._open().close()
        except (OSError, sqlite3.DatabaseError) as error:
            raise UserError(
                f"{str(path)!r} cannot hold the judge's verdicts ({one_line(error)}): name another file, or none"
            ) from error

    def get(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The verdicts of those keys that are known."""
        found: dict[str, Verdict] = {}
        try:
            with closing(self._open()) as db:
                for key in keys:
                    row = db.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
                    found |= {key: json.loads(row[0])} if row else {}
        except (OSError, sqlite3.DatabaseError) as error:
            logger.warning("judge cache %s was not read: %s", self.path, one_line(error))
        return found

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Add what is new, in one transaction."""
        rows = [(key, json.dumps(verdict)) for key, verdict in verdicts.items()]
        try:
            with closing(self._open()) as db, db:
                db.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", rows)
        except (OSError, sqlite3.DatabaseError) as error:
            logger.warning("%d verdicts were not added to judge cache %s: %s", len(rows), self.path, one_line(error))

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=30)
        try:
            with db:
                db.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db
