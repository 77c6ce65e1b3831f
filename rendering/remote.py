"""Draws on other machines: one or many servers that speak the OpenAI images API.

    --sdmodel_name http://127.0.0.1:8001/v1,http://127.0.0.1:8002/v1

Ours (`scripts/render_server.py`), vLLM-Omni and SGLang-Diffusion. One request a picture; the engine makes batches.
What can fail does so here and quietly: a picture that could not be had is None with its reason counted, nothing remote
raises out of a batch, and a batch ends in bounded time.

    one request   at most `timeout` seconds; connection, 408, 429, 5xx and damaged replies are tried again, anywhere
    one row       at most ATTEMPTS failures at each server; a refusal of the text (400, 413, 422) is final, and that a
                  server is busy or gone counts for nothing
    a dead one    after TRIP failures in a row it is left out; every PAUSE seconds a row is sent to see if it is back,
                  and taken away again after PATIENCE if it is the last and another server has room
    all dead      rows wait `timeout` seconds for one to come back
    one batch     at most `batch_timeout` seconds; what is unfinished then is None

Seeds: a server that says that it takes 63 bits (ours) gets our seeds as they are; any other gets their lowest 31 bits,
which every engine's generator and JSON reader takes. Pixels differ between engines in any case.

What ours says of its settings at the start, levers included, is asked of every picture, so that a server that comes
back with others refuses (409). vLLM-Omni does not know `max_sequence_length` and ignores it. Processes that train
together share what a server can use.

Left out: streaming, pictures by URL, `Retry-After`, redirects (which could carry prompts to another host).

Sources: vLLM-Omni `entrypoints/openai/protocol/images.py`, SGLang `multimodal_gen/runtime/entrypoints/openai/`
(`protocol.py`, `image_api.py`): prompt, model, n, size, response_format, output_format, seed, num_inference_steps,
guidance_scale.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import os
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field

import httpx
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from clients.http import ALIVE, CHECK_TIMEOUT, CONNECT_TIMEOUT, LISTEN, RETRIED, Circuit, back_off, checked_url
from errors import UserError, one_line
from interfaces import OnImage
from models.weights import locked
from rendering import notify_rows
from run.signals import leaving

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # of one row at one server
TRIP, PAUSE = 3, 5.0  # failures in a row that open a server's circuit, fewer than ATTEMPTS; seconds until a probe
PATIENCE = 10.0  # seconds that the last rows of a batch are left at a server whose circuit is open
CONCURRENCY = 16  # requests in flight at a server that does not say how many it can use
BATCHES = 3  # of a server that a picture may have to wait for: what it draws, what waits before, and its own
FOREIGN_SEED_BITS = 31
MOST_PIXELS = 4096 * 4096  # of a picture whose size nobody said
UNLIMITED = 10**6  # tokens: what transformers gives for a tokenizer without a limit is far above
MOST_BYTES = 64 * 2**20  # of a reply about which nothing is known, and of a tokenizer
GONE = {429, 502, 503, 504}  # statuses: nobody there, or nobody free
REFUSED = ALIVE - RETRIED  # statuses: this text cannot be drawn, there or elsewhere
SAYS_WHY = REFUSED | {409}  # statuses: the server's words are the reason
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, RecursionError)  # what reading foreign JSON may raise
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises on a broken PNG

HINTS = {401: "set RENDER_API_KEY", 403: "set RENDER_API_KEY", 404: "does its URL end in /v1?"}
START = "start one with scripts/render_server.py, or correct --sdmodel_name"

Row = tuple[str, int]  # text, seed


class _Failed(Exception):
    """A request gave no picture.

    Args:
        reason: as it is counted.
        status: of HTTP, 0 if it did not come to that.
        alive: whether the server is well all the same.
        final: whether no server could do better.
        here: whether this server could not do better.
        no_answer: whether the connection was lost before an answer; this does not count against the row.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int = 0,
        alive: bool = False,
        final: bool = False,
        here: bool = False,
        no_answer: bool = False,
    ):
        super().__init__(reason)
        self.reason, self.status = reason, status
        self.alive, self.final, self.here, self.no_answer = alive, final, here, no_answer


@dataclass(frozen=True)
class Settings:
    """What is asked of every picture; None leaves it to the server.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale.
        size: width and height in pixels.
        max_sequence_length: text tokens read.
        dtype: "bfloat16", "float16" or "float32"; no field of a request, only compared with what ours says.
    """

    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    dtype: str | None = None

    @property
    def asked(self) -> dict[str, object]:
        """As fields of a request."""
        fields = {
            "size": f"{self.size[0]}x{self.size[1]}" if self.size else None,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "max_sequence_length": self.max_sequence_length,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def told(cls, card: Mapping[str, object]) -> Settings:
        """What one of our servers says of itself; all None from others.

        Raises:
            ValueError, TypeError: it says nonsense.
        """
        size = card.get("size")
        return cls(
            steps=None if card.get("steps") is None else int(card["steps"]),
            guidance=None if card.get("guidance") is None else float(card["guidance"]),
            size=None if size is None else (int(size[0]), int(size[1])),
            max_sequence_length=None if card.get("max_sequence_length") is None else int(card["max_sequence_length"]),
            dtype=None if card.get("dtype") is None else str(card["dtype"]),
        )


@dataclass
class Server:
    """One server, what it says of itself, and how it does.

    Attributes:
        url: base of its API.
        loopback: whether it is on this machine.
        circuit: open while it is left out.
        model: name to ask for.
        card: what ours says beside the name (`scripts/render_server.py`, `Renderers.card`); {} from others.
        settings: those of the card.
        slots: requests in flight at most.
    """

    url: str
    loopback: bool
    circuit: Circuit
    model: str = ""
    card: Mapping[str, object] = field(default_factory=dict)
    settings: Settings = Settings()
    slots: int = CONCURRENCY

    def seed(self, seed: int) -> int:
        """What this server gets for one of our seeds."""
        return seed % 2 ** int(self.card.get("seed_bits", FOREIGN_SEED_BITS))


@dataclass
class _Job:
    """One row on its way: how often each server had it and failed, when it may go there again and since when it is out
    (of time.monotonic)."""

    row: Row
    since: float = 0.0
    tries: Counter[int] = field(default_factory=Counter)
    failures: Counter[int] = field(default_factory=Counter)
    wait: dict[int, float] = field(default_factory=dict)
    reason: str = ""

    def may_go(self, server: int, now: float) -> bool:
        return self.failures[server] < ATTEMPTS and self.wait.get(server, 0.0) <= now


class RemoteRenderer:
    """Pictures from servers with an OpenAI images API, as an `interfaces.Renderer`.

    The API key is read from the environment, RENDER_API_KEY, at each batch and is never kept; a server on this machine
    needs none. Proxies of the environment are used for other machines only. All servers must serve the same model with
    the same settings. `load` is what asks them; the constructor contacts nobody.

    Args:
        urls: bases of the APIs, separated by commas.
        model: the model's name there; None takes the only one that is served.
        tokenizer: folder or hub name of the renderer's longest tokenizer; None takes what the server gives.
        settings: of every picture.
        timeout: seconds for one request, and for which a batch waits for servers that are all gone.
        batch_timeout: seconds for all pictures of one call.
        concurrency: requests in flight at each server; None takes this process's share of what the server says, or of
            CONCURRENCY.
        processes: that draw with the same servers at the same time.

    Attributes:
        failures: why rows came back as None, one count per row.
        truncated: texts longer than `max_tokens` that were sent all the same, their ends unread.
        max_tokens: tokens of a text that are read.

    Raises:
        UserError: a URL that cannot work, or plain http to another machine.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        urls: str,
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        settings: Settings = Settings(),
        timeout: float = 120.0,
        batch_timeout: float = 900.0,
        concurrency: int | None = None,
        processes: int = 1,
    ):
        for name, seconds in (("render_timeout", timeout), ("render_batch_timeout", batch_timeout)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} is {seconds}, must be a positive number of seconds")
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"render_concurrency is {concurrency}, must be at least 1")
        named = [checked_url(url.strip(), "render") for url in urls.split(",") if url.strip()]
        if len(dict(named)) != len(named):
            raise UserError(f"a server is named twice in {urls!r}: name each once")
        self.model, self.settings, self.concurrency, self.processes = model, settings, concurrency, processes
        self.timeout, self.batch_timeout = timeout, batch_timeout
        self.servers = [Server(url, loopback, Circuit(TRIP, PAUSE)) for url, loopback in named]
        self.failures: Counter[str] = Counter()
        self.truncated = 0
        self._named_tokenizer = tokenizer
        self._tokenizer: Tokenizer | None = None
        self.max_tokens = 0

    def load(self) -> RemoteRenderer:
        """Ask every server what it serves, once; those that do not answer are left out until they do.

        Raises:
            UserError: nobody answers, access is denied, it is no such API, servers that differ, another model or
                other settings than asked for, or nothing is known of the tokenizer; with what to do.
        """
        asyncio.run(self._ask_all())
        return self

    def __call__(
        self, texts: Sequence[str], seeds: Sequence[int], on_image: OnImage | None = None
    ) -> list[Image.Image | None]:
        """Draw `texts[i]` from noise `seeds[i]`, once per distinct pair; equal rows share one picture object.

        Runs its own event loop, so it cannot be called from inside one.

        Args:
            texts: B texts of any length.
            seeds: B seeds in [0, 2**63).
            on_image: told index and picture of a row when it arrives.

        Returns:
            B RGB pictures; None where a row could not be drawn, with the reason counted in `failures`.

        Raises:
            ValueError: as many texts as seeds are needed.
        """
        if len(texts) != len(seeds):
            raise ValueError(f"renderer got {len(texts)} texts but {len(seeds)} seeds: give one seed per text")
        rows = list(zip(texts, seeds, strict=True))
        distinct = [row for row in dict.fromkeys(rows) if row[0].strip()]
        self.truncated += sum(self.count_tokens(text) > self.max_tokens for text in {text for text, _ in distinct})
        drawn = asyncio.run(self._draw_all(distinct, notify_rows(rows, on_image))) if distinct else {}
        outcomes = [drawn[row] if row[0].strip() else "blank text" for row in rows]
        reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
        self.failures.update(reasons)
        if reasons:
            logger.warning("%d of %d pictures could not be had, one: %s", len(reasons), len(rows), reasons[0])
        return [None if isinstance(outcome, str) else outcome for outcome in outcomes]

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, special ones included, in the renderer's longest tokenizer, before truncation.

        Counted in this process: neither slow nor missing when a server is.

        Raises:
            RuntimeError: `load` was not called.
        """
        if self._tokenizer is None:
            raise RuntimeError("no tokenizer yet: load() the renderer first")
        return len(self._tokenizer.encode(text).ids)

    # ----- before the first picture

    async def _ask_all(self) -> None:
        problems = await asyncio.gather(*(self._ask(server) for server in self.servers))
        if all(problems):
            raise UserError("; and ".join(problems))
        here = [server for server, problem in zip(self.servers, problems, strict=True) if not problem]
        for server, problem in zip(self.servers, problems, strict=True):
            if problem:  # it is asked for what the others draw, and joins them when it answers
                logger.warning("%s; the others draw without it", problem)
                server.model, server.card, server.slots = here[0].model, here[0].card, here[0].slots
        _check_alike(here)
        self._settle_settings(here[0])
        await self._read_tokenizer(here[0])

    async def _ask(self, server: Server) -> str:
        """Fill in what a server says of itself; "" or why it could not be asked.

        Raises:
            UserError: it answers, and must not be used as it is.
        """
        where = f"renderer at {server.url}"
        async with self._connect(server) as client:
            try:
                reply = await _fetched(client, "models", CHECK_TIMEOUT)
            except _Failed as error:
                return f"no {where} ({error.reason}): {HINTS.get(error.status, START)}"
        try:
            cards = {str(card["id"]): card.get("render", {}) for card in json.loads(reply)["data"]}
            name = self.model or (next(iter(cards)) if len(cards) == 1 else None)
            server.card = cards.get(name, {})
            server.settings = Settings.told(server.card)
            share = max(1, int(server.card.get("concurrency", CONCURRENCY)) // self.processes)
            server.slots = self.concurrency or share
            busy = float(server.card.get("batch_seconds", 0.0))
        except (*UNREADABLE, AttributeError) as error:
            raise UserError(f"the {where} is no OpenAI-compatible API: its URL must end in its /v1") from error
        if name not in cards:
            shown = ", ".join(map(repr, cards)) or "no model"
            given = "no name is given" if name is None else f"not {name!r}"
            raise UserError(f"the {where} serves {shown}, {given}: give one of them as --render_model")
        if self.timeout < BATCHES * busy:
            raise UserError(
                f"render_timeout {self.timeout:g} s is short for the {where}, whose batches take {busy:.1f} s each, "
                f"and a picture may wait for two before it: give --render_timeout {math.ceil(BATCHES * busy)} or more"
            )
        server.model = name
        return ""

    def _settle_settings(self, server: Server) -> None:
        """What was asked for, completed by what the server says.

        Raises:
            UserError: they differ.
        """
        told, asked = asdict(server.settings), asdict(self.settings)
        for name, value in asked.items():
            if None not in (value, told[name]) and told[name] != value:
                raise UserError(
                    f"the renderer at {server.url} draws with {name} {told[name]}, asked for is {value}: start the "
                    "server with the same options as the run, they are part of the reward"
                )
        if self.settings.dtype and told["dtype"] is None:
            raise UserError(
                f"render_dtype {self.settings.dtype} cannot be asked of the renderer at {server.url}: it is an option "
                "of that server, leave it out here"
            )
        self.settings = Settings(**{name: told[name] if value is None else value for name, value in asked.items()})

    async def _read_tokenizer(self, server: Server) -> None:
        """From --render_tokenizer, or else from the server.

        Raises:
            UserError: neither gives one.
        """
        if self._named_tokenizer is None and "max_tokens" not in server.card:
            raise UserError(
                f"the renderer at {server.url} does not say how it counts tokens: give --render_tokenizer, the folder "
                "or hub name of its longest text encoder's tokenizer (FLUX.1: google/t5-v1_1-xxl)"
            )
        if self._named_tokenizer is not None:
            self._tokenizer, limit = _named(self._named_tokenizer, self.settings.max_sequence_length)
        else:
            limit = int(server.card["max_tokens"])
            async with self._connect(server) as client:
                try:
                    self._tokenizer = Tokenizer.from_buffer(await _fetched(client, "tokenizer", self.timeout))
                except (_Failed, ValueError) as error:
                    raise UserError(
                        f"the renderer at {server.url} gives no tokenizer ({one_line(error)}): give --render_tokenizer"
                    ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = min(limit, self.settings.max_sequence_length or limit)

    def _connect(self, server: Server) -> httpx.AsyncClient:
        key = os.environ.get("RENDER_API_KEY", "").strip()
        return httpx.AsyncClient(
            base_url=server.url,
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(self.timeout, connect=min(CONNECT_TIMEOUT, self.timeout), pool=None),
            limits=httpx.Limits(max_connections=server.slots + 1),
            follow_redirects=False,
            trust_env=not server.loopback,
        )

    # ----- one batch

    async def _draw_all(
        self, rows: Sequence[Row], tell: Callable[[Row, Image.Image], None]
    ) -> dict[Row, Image.Image | str]:
        """The picture of every row, or why there is none."""
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._connect(server)) for server in self.servers]
            batch = _Batch(self.servers, clients, self._request, self.timeout, tell)
            return await batch.draw(rows, time.monotonic() + self.batch_timeout)

    async def _request(self, client: httpx.AsyncClient, server: Server, row: Row) -> Image.Image:
        """One picture from one server; raises _Failed."""
        text, seed = row
        fixed = {"model": server.model, "n": 1, "response_format": "b64_json", "output_format": "png"}
        own = {"drawing": server.card["drawing"]} if "drawing" in server.card else {}
        body = {**fixed, "prompt": text, "seed": server.seed(seed), **self.settings.asked, **own}
        reply = await _fetched(client, "images/generations", self.timeout, body, _most_bytes(self.settings.size))
        return picture(reply, self.settings.size)


class _Batch:
    """Rows on their way to servers: each goes to the one with the most room, a failed one to any that may do better.

    Args:
        servers: with how they did before.
        clients: one for each.
        request: one picture from one server; raises _Failed.
        timeout: seconds for which rows wait while every server that they could go to is left out.
        tell: of every picture that arrives.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        clients: Sequence[httpx.AsyncClient],
        request: Callable[[httpx.AsyncClient, Server, Row], Coroutine[None, None, Image.Image]],
        timeout: float,
        tell: Callable[[Row, Image.Image], None],
    ):
        self.servers, self.clients, self.request = servers, clients, request
        self.timeout, self.tell = timeout, tell
        self.waiting: list[_Job] = []
        self.calls: dict[asyncio.Task[Image.Image], tuple[_Job, int]] = {}
        self.recalled: list[asyncio.Task[Image.Image]] = []
        self.order = random.SystemRandom().sample(range(len(servers)), len(servers))  # or all processes begin with one
        self.outcomes: dict[Row, Image.Image | str] = {}
        self.down: dict[int, float] = {}  # server -> since when it has been left out in this batch

    async def draw(self, rows: Sequence[Row], deadline: float) -> dict[Row, Image.Image | str]:
        """The outcome of every row, at `deadline` (of time.monotonic) at the latest."""
        self.waiting = [_Job(row) for row in rows]
        try:
            while (self.waiting or self.calls) and not leaving() and (left := deadline - time.monotonic()) > 0:
                self._recall()
                self._send()
                self._give_up()
                await self._receive(min(left, LISTEN))
        finally:
            for call in self.calls:
                call.cancel()
            await asyncio.gather(*self.calls, *self.recalled, return_exceptions=True)
        for job in [*self.waiting, *(job for job, _ in self.calls.values())]:
            late = "told to leave" if leaving() else "unfinished at the batch's end"
            self.outcomes[job.row] = f"{late}: {job.reason}" if job.reason and not leaving() else late
        return self.outcomes

    def _send(self) -> None:
        """Start all requests that may start now."""
        now, held = time.monotonic(), []
        for number, job in enumerate(self.waiting):
            free = self._free()
            if not free:
                held += self.waiting[number:]
                break
            may = (one for one in free if job.may_go(one, now) and self.servers[one].circuit.lets_through())
            server = next(may, None)
            if server is None:
                held.append(job)
                continue
            call = asyncio.create_task(self.request(self.clients[server], self.servers[server], job.row))
            job.since = now
            self.calls[call] = (job, server)
        self.waiting = held

    def _recall(self) -> None:
        """Take back rows that alone keep the batch, from a server that is left out, if another could draw them now."""
        now = time.monotonic()
        for call, (job, server) in list(self.calls.items() if not self.waiting else ()):
            well = [one for one in self._free() if not self.servers[one].circuit.is_open and job.may_go(one, now)]
            if well and self.servers[server].circuit.is_open and now - job.since > PATIENCE:
                call.cancel()
                self.recalled.append(call)
                del self.calls[call]
                job.reason, job.wait[server] = self.servers[server].circuit.reason, now + PATIENCE
                self.waiting.append(job)

    def _free(self) -> list[int]:
        """Servers with room, the one with the most first."""
        busy = Counter(server for _, server in self.calls.values())
        room = {number: server.slots - busy[number] for number, server in enumerate(self.servers)}
        return sorted((one for one in self.order if room[one] > 0), key=lambda one: -room[one])

    async def _receive(self, seconds: float) -> None:
        """Wait for an answer, or until a row may be tried again; `seconds` at most."""
        now = time.monotonic()
        soon = [until - now for job in self.waiting for until in job.wait.values() if until > now]
        seconds = max(0.01, min([seconds, *soon]))
        if not self.calls:
            await asyncio.sleep(seconds)
            return
        done, _ = await asyncio.wait(self.calls, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            self._settle(call, *self.calls.pop(call))

    def _settle(self, call: asyncio.Task[Image.Image], job: _Job, server: int) -> None:
        """Note a picture, or where and why there was none; an error that is no failure of a request (a bug) raises."""
        circuit = self.servers[server].circuit
        try:
            self.outcomes[job.row] = call.result()
            self.tell(job.row, call.result())
        except _Failed as error:
            self._note(error, job, server)
            if not error.alive:
                circuit.failed(error.reason)
                return
        circuit.succeeded()

    def _note(self, error: _Failed, job: _Job, server: int) -> None:
        """A row failed at a server; that the server is busy or still gone is not held against the row."""
        job.reason = error.reason
        if error.final:
            self.outcomes[job.row] = error.reason
            return
        job.tries[server] += 1
        if error.here:
            job.failures[server] = ATTEMPTS
        elif not (error.no_answer and (error.alive or self.servers[server].circuit.is_open)):
            job.failures[server] += 1
        job.wait[server] = time.monotonic() + back_off(job.tries[server])
        self.waiting.append(job)

    def _give_up(self) -> None:
        """Rows that failed too often everywhere they could go, or whose servers have all been gone for too long."""
        now, there = time.monotonic(), range(len(self.servers))
        for number in there:
            if self.servers[number].circuit.is_open:
                self.down.setdefault(number, now)
            else:
                self.down.pop(number, None)
        gone = {number for number, since in self.down.items() if now - since >= self.timeout}
        kept = []
        for job in self.waiting:
            left = {number for number in there if job.failures[number] < ATTEMPTS}
            if left - gone:
                kept.append(job)
            else:
                reasons = [job.reason] if job.reason else [self.servers[number].circuit.reason for number in left]
                self.outcomes[job.row] = reasons[0]
        self.waiting = kept


# ----- what comes back


async def _fetched(
    client: httpx.AsyncClient,
    path: str,
    within: float,
    body: Mapping[str, object] | None = None,
    most: int = MOST_BYTES,
) -> bytes:
    """The reply to a GET, or to a POST of `body` as JSON, within so many seconds and `most` bytes; raises _Failed."""
    if body is None:
        request = client.build_request("GET", path)
    else:
        form = {"Content-Type": "application/json"}
        request = client.build_request("POST", path, content=json.dumps(body), headers=form)
    try:
        async with asyncio.timeout(within):
            reply = await client.send(request, stream=True)
            try:
                content = await _read(reply, most)
            finally:
                await reply.aclose()
    except TimeoutError as error:
        raise _Failed(f"no answer within {within:g} s") from error
    except httpx.HTTPError as error:
        raise _Failed(one_line(error), no_answer=True) from error
    status = reply.status_code
    if status != 200:
        again = status in RETRIED or status >= 500
        reason = _said(content) if status in SAYS_WHY else f"HTTP {status}"
        raise _Failed(
            reason,
            status=status,
            alive=status in ALIVE,
            final=status in REFUSED,
            here=not again,
            no_answer=status in GONE,
        )
    return content


async def _read(reply: httpx.Response, most: int) -> bytes:
    """The body of a reply, as long as it is not longer than `most` bytes; raises _Failed."""
    pieces, length = [], 0
    async for piece in reply.aiter_bytes():
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise _Failed(f"a reply of more than {most} bytes", here=True)
    return b"".join(pieces)


def _said(content: bytes) -> str:
    """Why a server refused: its own words, short and on one line."""
    try:
        message = json.loads(content)["error"]["message"]
    except UNREADABLE:
        message = content[:200].decode(errors="replace")
    return f"refused: {' '.join(str(message).split())[:200]}"


def picture(reply: bytes, size: tuple[int, int] | None) -> Image.Image:
    """The RGB picture in a reply of the images API.

    Args:
        reply: JSON with a base64 PNG.
        size: width and height that it must have; None: any up to MOST_PIXELS.

    Raises:
        _Failed: there is none, it is another picture than asked for, or a black one (a safety checker's).
    """
    try:
        content = base64.b64decode(json.loads(reply)["data"][0]["b64_json"], validate=True)
    except UNREADABLE as error:
        raise _Failed("a reply that is no images API's") from error
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        if size is not None and image.size != size:
            raise _Failed(f"a picture of {image.size[0]}x{image.size[1]}, not {size[0]}x{size[1]}", here=True)
        if image.width * image.height > MOST_PIXELS:
            raise _Failed(f"a picture of {image.size[0]}x{image.size[1]}", here=True)
        image = image.convert("RGB")
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise _Failed("a picture that is no whole PNG") from error
    if image.getbbox() is None:
        raise _Failed("black picture", alive=True, final=True)
    return image


def _most_bytes(size: tuple[int, int] | None) -> int:
    """Of a reply with a picture: RGBA as base64, and the JSON around it."""
    return MOST_BYTES if size is None else size[0] * size[1] * 4 * 4 // 3 + 2**20


def _named(path: str, read: int | None) -> tuple[Tokenizer, int]:
    """The tokenizer at a folder or hub name, and the tokens that it is made for.

    Args:
        path: of a tokenizer.json.
        read: tokens that are read of a text, None if nobody said.

    Raises:
        UserError: there is none, or neither it nor `read` says how much is read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=locked(path).revision)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"--render_tokenizer {path!r} cannot be read ({one_line(error)}): give a hub name or a folder with a "
            "tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"--render_tokenizer {path!r} has no tokenizer.json: give one that has")
    if tokenizer.model_max_length > UNLIMITED and not read:
        raise UserError(f"--render_tokenizer {path!r} has no limit: give --max_sequence_length, what is read")
    return tokenizer.backend_tokenizer, tokenizer.model_max_length


def _check_alike(servers: Iterable[Server]) -> None:
    """All servers draw the same model with the same settings, as far as they say.

    Raises:
        UserError: two differ.
    """
    first, *others = servers
    for other in others:
        mine = {"model": first.model, **first.card}
        theirs = {"model": other.model, **other.card}
        for name in sorted({*mine, *theirs} - {"concurrency", "fingerprint", "batch_seconds"}):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"the renderers at {first.url} and {other.url} differ in {name}, {mine.get(name)} and "
                    f"{theirs.get(name)}: all pictures of a run must be made alike"
                )
        if mine.get("fingerprint") != theirs.get("fingerprint"):
            logger.warning(
                "%s and %s draw different pictures from one text and seed: other machines?", first.url, other.url
            )
