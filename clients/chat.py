"""The one client for chat models behind an OpenAI-compatible API: `ChatClient` asks, `VLMClient` asks a judge.

A judge's question is a template with the user's ORIGINAL prompt in it, and pictures, at temperature 0. A verdict is
None where the call failed or the answer could not be read: none is ever made up. A batch ends in bounded time.

No torch here. Left out: streaming, tool calls, and redirects, which could carry pictures to another host.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from PIL import Image

from clients.http import (
    CHECK_TIMEOUT,
    CONNECT_TIMEOUT,
    CallFailed,
    Circuit,
    checked_key,
    checked_url,
    finished,
    repeat,
    run_async,
)
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
TRIP, PAUSE = 8, 30.0  # failures in a row that open the circuit, at least; seconds until a probe
LONGEST_WAIT = 60.0  # seconds of a Retry-After
NO_VERDICT = ("failed", "unparsable")  # what may come of a question
UNREADABLE = "no verdict in"  # how the reason of an unparsable one begins

# "[INST]" and the like: bracketed capitals. Angle brackets, of any kind, need no pattern.
_BRACKETED = re.compile(r"\[(/?[A-Z_]{2,})\]")
_LABEL = re.compile(r"\b(score|grade|rating|consistency|realism|quality)(s?\W{0,3})[:：]", re.IGNORECASE)
_SCALE = re.compile(r"(\d\s*)/(?=\s*\d)")
_ANGLES = str.maketrans("<>", "＜＞")
_SLOTS = re.compile(r"\{([a-z]+)\}")
_NO = r"(?:unsupported|(?:not|n't) (?:support|permit|allow)|only \S+ is|may only|unrecogni|unknown|unexpect|deprecat)"
_REFUSED = rf"\b{{0}}\b[^\n]{{{{0,80}}}}{_NO}|{_NO}[^\n]{{{{0,80}}}}\b{{0}}\b"  # of an option's name


class ChatClient:
    """A model behind an OpenAI-compatible API. Nothing is contacted before the first call.

    The key is read from the environment, WHOSE_API_KEY, for each connection and is never kept; proxies of the
    environment are used for other machines only. An option that the API refuses by name (HTTP 400 or 422) is left out,
    or sent under its newer name, from then on; one warning says so.

    Args:
        whose: "judge", "teacher" or "policy".
        url, model: base of the API ("http://127.0.0.1:8080/v1"), and the model's name there.
        concurrency: calls in flight at once.
        call_timeout: seconds for one call, repeats included, from the moment that it is its turn.
        attempts: at one call. When all calls in flight have failed half of theirs, others fail unasked, and one call
            per PAUSE seconds finds out whether the API is back.

    Raises:
        UserError: a value that cannot work, or plain http to another machine.
    """

    def __init__(
        self, whose: str, url: str, model: str, *, concurrency: int = 16, call_timeout: float = 120, attempts: int = 4
    ):
        self.url, self.loopback = checked_url(url, whose)
        self.whose, self.model = whose, model
        self.concurrency, self.call_timeout, self.attempts = concurrency, call_timeout, attempts
        self.circuit = Circuit(max(TRIP, attempts // 2 * concurrency), PAUSE)
        self._names: dict[str, str] = {}  # option that was refused -> its newer name, "" for none

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Callable[..., Awaitable[ChatCompletion]]]:
        """`async with client.connect() as complete: reply = await complete(messages, temperature=0)`.

        The reply has a first choice with a message. `complete` raises CallFailed.
        """
        turns = asyncio.Semaphore(self.concurrency)
        async with self._api() as api:

            async def complete(messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatCompletion:
                async def request() -> ChatCompletion:
                    sent = {option: self._names.get(option, option) for option in options}
                    given = {"model": self.model, "messages": messages}
                    given |= {name: options[option] for option, name in sent.items() if name}
                    try:
                        reply = await _answer(api.chat.completions.create(**given))
                    except CallFailed as error:
                        if self._can_do_without(error, sent):
                            return await request()
                        raise
                    try:  # the SDK does not check what it was sent
                        if isinstance(reply.choices[0].message, ChatCompletionMessage):
                            return reply
                    except (AttributeError, IndexError, TypeError):
                        pass
                    raise CallFailed(f"an answer that is no chat completion: {str(reply)[:80]!r}")

                async with turns:
                    return await repeat(request, self.circuit, self.attempts, self.call_timeout)

            yield complete

    def _can_do_without(self, error: CallFailed, sent: Mapping[str, str]) -> bool:
        """Whether the API refused options by the names under which they were `sent`; they are not sent so again."""
        refusal, named = error.__cause__, []
        for option, name in sent.items():
            if error.status in (400, 422) and name and name.endswith(refusal.param or ""):
                pattern = _REFUSED.format(name.replace("top_logprobs", "(?:top_)?logprobs"))  # needs the other
                named += [option] * bool(re.search(pattern, f"{refusal} {refusal.body}", re.IGNORECASE))
        for option in named:
            if self._names.get(option, option) == sent[option]:  # else another call was as quick
                self._names[option] = "max_completion_tokens" if sent[option] == "max_tokens" else ""
                how = f"as {self._names[option]}" if self._names[option] else "no more"
                logger.warning("%s %r refuses %s, which is sent %s: %s", self.whose, self.model, option, how, error)
        return bool(named)

    def check(self) -> None:
        """Ask the server once which models it has (GET /models).

        Raises:
            UserError: nobody answers, access is denied, it is no such API, or it lacks `model`.
        """

        async def names() -> list[str]:
            async with self._api() as api:
                models = await repeat(lambda: _answer(api.models.list()), Circuit(TRIP, PAUSE), 1, CHECK_TIMEOUT)
                return [model.id for model in models.data]

        try:
            known = run_async(names())
        except (AttributeError, TypeError):  # the SDK does not check what it was sent
            known = "no models"
        except CallFailed as error:
            raise self.unusable(error) from error
        if self.model not in known:
            raise UserError(
                f"{self.url} serves {str(known)[:200]}, not {self.model!r}: correct --{self.whose}_model, or "
                f"--{self.whose}_url, which must end in its /v1"
            )

    def unusable(self, error: CallFailed) -> UserError:
        """What the user can do about an API that denies access or is not there."""
        key, one = f"set environment {self.whose.upper()}_API_KEY", {"judge": "one with scripts/serve_judge.sh"}
        start = f"start {one.get(self.whose, 'it')}, or correct --{self.whose}_url"
        there = f"does --{self.whose}_url end in /v1, and is {self.model!r} a model there (--{self.whose}_model)?"
        hints = {401: key, 403: key, 400: there, 404: there}
        return UserError(f"{self.whose} at {self.url} cannot be asked ({error}): {hints.get(error.status, start)}")

    def _api(self) -> AsyncOpenAI:
        """The SDK without its own retries, redirects, and what the environment says about api.openai.com."""
        key = checked_key(self.whose) or "none"
        api = AsyncOpenAI(
            base_url=self.url,
            api_key=key,
            default_headers={"Authorization": f"Bearer {key}"},  # else OPENAI_CUSTOM_HEADERS could replace it
            max_retries=0,
            timeout=Timeout(self.call_timeout, connect=min(CONNECT_TIMEOUT, self.call_timeout)),
            http_client=DefaultAsyncHttpxClient(trust_env=not self.loopback, follow_redirects=False),
        )
        api.organization = api.project = None
        return api


async def _answer(request: Awaitable[Any]) -> Any:
    """What the SDK makes of the answer to one request; raises CallFailed in place of its own errors."""
    try:
        return await request
    except APIConnectionError as error:
        raise CallFailed(one_line(error.__cause__ or error)) from error
    except APIStatusError as error:
        wait = error.response.headers.get("Retry-After", "")  # may also be a date
        wait = min(float(wait), LONGEST_WAIT) if wait.isdecimal() else 0.0
        said = error if " - " in str(error) else CallFailed(f"{error} - {error.body}")  # some have words of their own
        raise CallFailed(one_line(said), status=error.status_code, code=error.code or "", retry_after=wait) from error
    except (ValueError, RecursionError) as error:
        raise CallFailed(f"an answer that is no JSON ({one_line(error)})") from error


# ----- what a judge is asked


@dataclass(frozen=True)
class Template:
    """What a judge is told, and how its answer is read.

    Attributes:
        text: the instructions, with SLOT where the user's prompt goes, and {slots} for what else a question brings.
        parse: answer -> verdict, None if the answer holds none.
        first_token: not words but the first token's probabilities are wanted: the answer that `parse` is given is what
            `first_tokens` says.
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
    """One thing to ask: a template, the user's own words, what goes into other slots, and the pictures in order."""

    template: Template
    prompt: str
    images: tuple[Image.Image, ...]
    slots: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is asked in words."""
        return self.template.fill(self.prompt, **self.slots)


class _Outcome(NamedTuple):
    """What came of a question. `kind` is "asked", "cached", "failed" or "unparsable"; the last two have a reason."""

    kind: str
    verdict: Verdict | None = None
    reason: str = ""


class VLMClient(ChatClient):
    """Asks a VLM about pictures; the key is JUDGE_API_KEY. Instances can be pickled.

    Args:
        url, model, limits: see `ChatClient`.
        batch_timeout: seconds for all calls of one `ask`; what is unfinished then has failed.
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
        self, url: str, model: str, *, batch_timeout: float = 900.0, cache: str | Path | None = None, **limits: float
    ):
        super().__init__("judge", url, model, **limits)
        self.batch_timeout, self.cache = batch_timeout, _Cache(Path(cache)) if cache is not None else None
        self.metrics: dict[str, float] = {}
        self.reasons: list[str] = []
        self._prefetched: dict[str, _Outcome] = {}

    def prefetch(self, questions: Sequence[Question]) -> None:
        """Ask now what a later `ask` will; what comes of it, failures too, waits for the next `ask`.

        May run beside anything but `ask`.
        """
        distinct = dict(zip(self._keys(questions), questions, strict=True))
        self._prefetched |= self._outcomes({key: q for key, q in distinct.items() if key not in self._prefetched})

    def ask(self, questions: Sequence[Question]) -> list[Verdict | None]:
        """One verdict per question, in order; None where the call failed or the answer could not be read.

        Equal questions (same template, prompt and pixels) are asked once. Only verdicts are cached, never failures.
        Runs its own event loop, so it cannot be called from inside one.
        """
        keys = self._keys(questions)
        distinct = dict(zip(keys, questions, strict=True))
        outcomes = {key: self._prefetched[key] for key in distinct if key in self._prefetched}
        self._prefetched = {}
        outcomes |= self._outcomes({key: question for key, question in distinct.items() if key not in outcomes})
        self._report(outcomes.values())
        self.reasons = [outcomes[key].reason for key in keys]
        return [outcomes[key].verdict for key in keys]

    def _outcomes(self, questions: Mapping[str, Question]) -> dict[str, _Outcome]:
        """What came of each question: a verdict that is cached, or that of a call."""
        deadline = time.monotonic() + self.batch_timeout
        known = self.cache.get(questions) if self.cache and questions else {}
        to_ask = {key: question for key, question in questions.items() if key not in known}
        asked = run_async(self._ask_all(to_ask, deadline)) if to_ask else {}
        new = {key: outcome.verdict for key, outcome in asked.items() if outcome.verdict is not None}
        if self.cache and new:
            self.cache.put(new)
        return {key: _Outcome("cached", verdict) for key, verdict in known.items()} | asked

    def _keys(self, questions: Sequence[Question]) -> list[str]:
        """For each question what tells it from all others, in any batch, process and run."""
        hashes = _of_each_image(questions, picture_hash)
        rows = [[q.template.version, self.model, q.text, *(hashes[id(one)] for one in q.images)] for q in questions]
        return [hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows]

    async def _ask_all(self, questions: Mapping[str, Question], deadline: float) -> dict[str, _Outcome]:
        """The outcome of every question; what is unfinished at `deadline` (of time.monotonic) has failed."""
        uris = _of_each_image(questions.values(), data_uri)
        outcomes, rows = {}, list(questions.items())
        probes = 1 if self.circuit.is_open else 0  # asked before the others: is the server back?
        async with self.connect() as complete:
            for some in (rows[:probes], rows[probes:]):
                calls = {key: asyncio.create_task(_ask(complete, question, uris)) for key, question in some}
                in_time = await finished(calls, deadline)
                late = "the run was told to leave" if leaving() else f"the batch's {self.batch_timeout:g} s"
                outcomes |= {key: _Outcome("failed", reason=f"unfinished after {late}") for key in calls} | in_time
        return outcomes

    def _report(self, outcomes: Collection[_Outcome]) -> None:
        counts = Counter(outcome.kind for outcome in outcomes)
        asked = len(outcomes) - counts["cached"]
        self.metrics = {"asked": float(asked), **{kind: float(counts[kind]) for kind in ("cached", *NO_VERDICT)}}
        for kind in NO_VERDICT:
            if counts[kind]:
                reason = next(outcome.reason for outcome in outcomes if outcome.kind == kind)
                logger.warning("%d of %d judge calls %s, one: %s", counts[kind], asked, kind, reason)


async def _ask(
    complete: Callable[..., Awaitable[ChatCompletion]], question: Question, uris: Mapping[int, str]
) -> _Outcome:
    pictures = [{"type": "image_url", "image_url": {"url": uris[id(image)]}} for image in question.images]
    content = [*pictures, {"type": "text", "text": question.text}]
    soft = question.template.first_token
    wanted = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_TOKENS} if soft else {"max_tokens": MAX_TOKENS}
    try:
        reply = await complete([{"role": "user", "content": content}], temperature=0, **wanted)
    except CallFailed as error:
        return _Outcome("failed", reason=str(error))
    answer = first_tokens(reply) if soft else reply.choices[0].message.content or ""
    verdict = question.template.parse(answer)
    if verdict is None:
        return _Outcome("unparsable", reason=f"{UNREADABLE} {answer[:200]!r}")
    return _Outcome("asked", verdict)


# ----- what is sent, what comes back


def neutralise(text: str) -> str:
    """`text` in which nothing can pass for a tag, a chat marker or a labelled score, readable to a model as before.

    All angle brackets become their full-width twins (`<score>`, `</prompt>`, `<|im_start|>` in any spelling), and so
    do the brackets around capitals (`[INST]`, `[/IMG]`). The colon of "Score: 1" becomes a ratio sign, the slash of
    "10/10" a division slash.
    """
    return _SCALE.sub(r"\1∕", _LABEL.sub(r"\1\2∶", _BRACKETED.sub(r"［\1］", text).translate(_ANGLES)))


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


def first_tokens(reply: ChatCompletion) -> str:
    """JSON of token -> probability for the likeliest first tokens of a reply, "" if it gives none."""
    chances: Counter[str] = Counter()
    try:
        for one in reply.choices[0].logprobs.content[0].top_logprobs:
            chances[str(one.token)] += math.exp(one.logprob)
    except (AttributeError, IndexError, TypeError, OverflowError):
        return ""
    return json.dumps(chances) if chances and chances.total() < 1.01 else ""


def _of_each_image(questions: Iterable[Question], made: Callable[[Image.Image], str]) -> dict[int, str]:
    """The id of each image -> what is made of it, once."""
    images = {id(image): image for question in questions for image in question.images}
    return {key: made(image) for key, image in images.items()}


class _Cache:
    """Verdicts in an SQLite file, made with the first batch; each call opens it anew, so processes may share it.

    A cache that fails in use (full disk, lock not had in time) costs the verdicts in it, with a warning, not the run.

    Raises:
        UserError: the file at `path` is no database.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if path.exists():
                self._open().close()
        except sqlite3.DatabaseError as error:
            raise UserError(f"judge_cache {path} holds no verdicts ({error}): name another file, or none") from error

    def get(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The verdicts of those keys that are known."""
        select = "SELECT * FROM verdicts WHERE key = ?"
        rows = self._use(lambda db: [db.execute(select, (key,)).fetchone() for key in keys])
        return {row[0]: json.loads(row[1]) for row in rows or () if row}

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Add what is new, in one transaction."""
        rows = [(key, json.dumps(verdict)) for key, verdict in verdicts.items()]
        self._use(lambda db: db.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", rows))

    def _use(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        try:
            with closing(self._open()) as db, db:
                return work(db)
        except (OSError, sqlite3.DatabaseError) as error:
            logger.warning("judge cache %s cannot be used: %s", self.path, one_line(error))

    def _open(self) -> sqlite3.Connection:
        """In rollback mode, because SQLite's write-ahead log fails on network folders."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=30)
        with db:
            db.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
        return db
