"""Draws on other machines: one or several servers that speak the OpenAI images API.

    --sdmodel_name http://127.0.0.1:8001/v1,http://127.0.0.1:8002/v1

Ours (`scripts/render_server.py`), vLLM-Omni and SGLang-Diffusion. One request is one picture; the engine makes
batches. A batch never raises because of a server: a picture that could not be had is None, and its reason is counted.

    one request   at most `render_timeout` seconds
    one row       tried again, elsewhere first; absent after ATTEMPTS failures at each server that works. A refusal of
                  the text (400, 413, 422) is final; a server that is gone or busy does not count
    one server    left out after TRIP failures in a row; then every PAUSE seconds a copy of a row probes it. The row
                  itself goes to other servers, so a probe that hangs delays nothing
    all servers   left out for `render_timeout` seconds: the waiting rows are absent
    one batch     at most `render_batch_timeout` seconds; what is unfinished then is absent

Ours gets our seeds as they are; any other gets their lowest 31 bits, which every engine takes. Pixels differ between
engines in any case. Ours says its settings, levers included. They are asked of every picture, so a server that was
started again with other settings refuses (409). vLLM-Omni does not know `max_sequence_length` and ignores it.

Left out: streaming, pictures by URL, `Retry-After`, redirects (which could carry prompts to another host).

Sources: vLLM-Omni `entrypoints/openai/protocol/images.py`, SGLang `multimodal_gen/runtime/entrypoints/openai/`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import logging
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from clients.http import (
    ALIVE,
    CHECK_TIMEOUT,
    CONNECT_TIMEOUT,
    CallFailed,
    Circuit,
    back_off,
    checked_key,
    checked_url,
    finished,
    run_async,
)
from errors import UserError, one_line
from interfaces import OnImage
from models.weights import locked
from rendering.options import AUTO, RenderOptions
from rendering.rows import OnRow, Outcome, Row, draw_distinct
from run.signals import leaving

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of one row at one server
TRIP, PAUSE = 3, 5.0  # failures in a row that open a server's circuit; seconds between probes
TICK = 0.05  # seconds between looks at clock and circuits of a row that finds no room
CONCURRENCY = 16  # requests in flight at a server that does not say how many it can use
FOREIGN_SEED_BITS = 31
UNLIMITED = 10**6  # tokens; transformers gives far more for a tokenizer without a limit
GONE = {0, 429, 502, 503, 504}  # statuses: no answer, nobody there, or nobody free
BROKEN = (  # what a broken reply makes JSON, base64 or Pillow raise
    OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@dataclass(eq=False)
class Server:
    """One server, at the base `url` of its API."""

    url: str
    loopback: bool  # whether it is on this machine
    slots: int  # requests in flight at most
    in_flight: int = 0
    circuit: Circuit = field(default_factory=lambda: Circuit(TRIP, PAUSE))  # open while it is left out


class RemoteRenderer:
    """Pictures from servers with an OpenAI images API, as an `interfaces.Renderer`.

    The constructor asks every server what it serves. All must serve the same model with the same settings; those that
    do not answer are left out until they do. The API key is read from the environment, RENDER_API_KEY. Proxies of the
    environment are used for other machines only.

    Args:
        options: `sdmodel_name` holds the URLs, separated by commas.
        processes: number of processes that share the servers.

    Attributes:
        failures: why rows came back as None, one count per row.
        max_tokens: tokens of a text that are read.
        card_hash: of what the servers say of themselves: model, settings, and ours its weights.

    Raises:
        UserError: no server answers; they differ, or do not draw as asked; an option is out of range or the server's.
    """

    def __init__(self, options: RenderOptions, processes: int = 1):
        _check(options)
        self.options, self.processes = options, processes
        urls = [checked_url(url.strip(), "render") for url in options.sdmodel_name.split(",") if url.strip()]
        if len(set(urls)) < len(urls):
            raise UserError(f"--sdmodel_name {options.sdmodel_name} names a server twice: name each once")
        slots = options.render_concurrency or max(1, CONCURRENCY // processes)
        self.servers = [Server(url, loopback, slots) for url, loopback in urls]
        self.failures: Counter[str] = Counter()
        first, self.card = self._ask_all()
        self.card_hash = hashlib.sha256(json.dumps(self.card, sort_keys=True).encode()).hexdigest()[:16]
        self.request = {**_asked(options), **self.card.get("request", {})}
        self._tokenizer, limit = self._load_tokenizer(first)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = min(limit, self.request.get("max_sequence_length", limit))

    def __call__(
        self, texts: Sequence[str], seeds: Sequence[int], on_image: OnImage | None = None
    ) -> list[Image.Image | None]:
        """Draw `texts[i]` from noise `seeds[i]`, once per distinct pair; equal rows share one picture object.

        Runs its own event loop, so it cannot be called from inside one. A seed is in [0, 2**63). None is a row that
        could not be drawn; the reason is counted in `failures`.
        """
        return draw_distinct(texts, seeds, on_image, self.failures, self._draw)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, special ones included, in the renderer's longest tokenizer, before truncation."""
        return len(self._tokenizer.encode(text).ids)

    # ----- before the first picture

    def _ask_all(self) -> tuple[Server, dict[str, Any]]:
        """A server that answers, and what all say of themselves, with their model's name as "model".

        Raises:
            UserError: nobody answers, or they differ from each other or from what is asked for.
        """
        cards, problem = {}, ""
        for server in self.servers:
            try:
                cards[server] = self._ask(server)
            except httpx.HTTPError as error:
                problem = f"no renderer at {server.url} ({one_line(error)})"
                logger.warning("%s: left out until it answers", problem)
                for _ in range(TRIP):
                    server.circuit.failed(problem)
        if not cards:
            raise UserError(
                f"{problem}: start one with scripts/render_server.py, end its URL in /v1, and set RENDER_API_KEY if "
                "it needs a key"
            )
        first, card = next(iter(cards.items()))
        for other, its_card in cards.items():
            if its_card != card:
                raise UserError(
                    f"all pictures of a run must be made alike, but the renderer at {first.url} says {card} and the "
                    f"one at {other.url} says {its_card}"
                )
        return first, card

    def _ask(self, server: Server) -> dict[str, Any]:
        """What one server says of itself; sets its slots.

        Raises:
            UserError: it must not be used as it is.
            httpx.HTTPError: it does not answer, or refuses.
        """
        options, where = self.options, f"the renderer at {server.url}"
        reply = _get(server, "models", CHECK_TIMEOUT)
        try:
            cards = {card["id"]: card.get("render", {}) for card in reply.json()["data"]}
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{where} is no OpenAI-compatible API: its URL must end in its /v1") from error
        name = options.render_model or (next(iter(cards)) if len(cards) == 1 else None)
        if name not in cards:
            raise UserError(f"{where} serves {', '.join(cards)}, not {name}: name one of them as --render_model")
        most = cards[name].pop("concurrency", CONCURRENCY)
        server.slots = options.render_concurrency or max(1, most // self.processes)
        theirs = cards[name].get("request", {})
        for key, value in _asked(options).items():
            if theirs and theirs.get(key) != value:
                raise UserError(f"{where} draws with {key} {theirs.get(key)}, not {value}: start both with the same")
        dtype = theirs.get("drawing", {}).get("render_dtype", "its own")
        if options.render_dtype not in (AUTO, dtype):
            raise UserError(f"{where} draws in {dtype}, not in --render_dtype {options.render_dtype}")
        return {"model": name, **cards[name]}

    def _load_tokenizer(self, server: Server) -> tuple[Tokenizer, int]:
        """The tokenizer of --render_tokenizer, or else of a server, and the tokens that it is made for.

        Raises:
            UserError: there is none.
        """
        named = self.options.render_tokenizer
        try:
            if named is None:
                reply = _get(server, "tokenizer", self.options.render_timeout)
                return Tokenizer.from_buffer(reply.content), self.card["max_tokens"]
            tokenizer = AutoTokenizer.from_pretrained(named, revision=locked(named).revision)
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise UserError(
                f"no tokenizer at {named or server.url} ({one_line(error)}): give --render_tokenizer, folder or hub "
                "name of that of the renderer's longest text encoder (FLUX.1: google/t5-v1_1-xxl)"
            ) from error
        if tokenizer.model_max_length > UNLIMITED and "max_sequence_length" not in self.request:
            raise UserError(f"--render_tokenizer {named} has no limit: give --max_sequence_length")
        return tokenizer.backend_tokenizer, tokenizer.model_max_length

    # ----- one batch

    def _draw(self, rows: list[Row], on_row: OnRow) -> dict[Row, Outcome]:
        outcomes = run_async(self._draw_all(rows, on_row))
        reasons = [outcome for outcome in outcomes.values() if isinstance(outcome, str)]
        if reasons:
            logger.warning("%d of %d pictures could not be had, one: %s", len(reasons), len(rows), reasons[0])
        return outcomes

    async def _draw_all(self, rows: list[Row], on_row: OnRow) -> dict[Row, Outcome]:
        deadline = time.monotonic() + self.options.render_batch_timeout
        async with httpx.AsyncClient(
            headers=_headers(),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),  # `_request` has its own
            limits=httpx.Limits(max_connections=None),
            mounts={server.url: None for server in self.servers if server.loopback},  # without a proxy
        ) as client:
            batch = _Batch(self, client, on_row)
            calls = {row: asyncio.create_task(batch.outcome(row)) for row in rows}
            outcomes = await finished(calls, deadline)
            await finished(dict(enumerate(batch.probes)), deadline=0.0)  # cancels those that hang
        late = "told to leave" if leaving() else "unfinished at the batch's end"
        return {row: outcomes.get(row, late) for row in rows}


class _Batch:
    """The rows of one call, each on its way to a server with room; the servers' circuits outlive it."""

    def __init__(self, renderer: RemoteRenderer, client: httpx.AsyncClient, on_row: OnRow):
        self.renderer, self.client, self.on_row = renderer, client, on_row
        self.servers = renderer.servers
        self.room = asyncio.Semaphore(sum(server.slots for server in self.servers))
        self.worked = time.monotonic()  # when a server was last not left out
        self.probes: list[asyncio.Task] = []

    async def outcome(self, row: Row) -> Outcome:
        """A picture, or why no server is left for this row."""
        failures: Counter[Server] = Counter()  # those that count
        reason = ""
        for attempt in itertools.count(1):
            async with self.room:
                server = await self._server_for(row, failures)
                if server is None:
                    return reason or self.servers[0].circuit.reason
                answer = await self._ask(server, row)
            if not isinstance(answer, CallFailed):
                self.on_row(row, answer)
                return answer
            reason = str(answer)
            if answer.status in ALIVE - GONE:
                return reason
            failures[server] += answer.status not in GONE
            await asyncio.sleep(back_off(attempt))

    async def _server_for(self, row: Row, failures: Counter[Server]) -> Server | None:
        """The emptiest server among those where the row failed least, as soon as it has room; None if none is left."""
        while True:
            for server in self.servers:
                if server.circuit.is_open and not server.in_flight and server.circuit.lets_through():
                    self.probes.append(asyncio.create_task(self._ask(server, row)))  # its picture is not used
            working = [server for server in self.servers if not server.circuit.is_open]
            if working:
                self.worked = time.monotonic()
            left = [server for server in working if failures[server] < ATTEMPTS]
            failed = any(count >= ATTEMPTS for count in failures.values())
            if not left and (failed or time.monotonic() - self.worked >= self.renderer.options.render_timeout):
                return None
            least = min((failures[server] for server in left), default=0)
            free = [server for server in left if failures[server] == least and server.in_flight < server.slots]
            if free:  # by chance, or all processes would begin with the same one
                return min(free, key=lambda server: (server.in_flight, random.SystemRandom().random()))
            await asyncio.sleep(TICK)

    async def _ask(self, server: Server, row: Row) -> Image.Image | CallFailed:
        """What a server answers, noted in its circuit."""
        server.in_flight += 1
        try:
            answer = await self._request(server, row)
        except CallFailed as error:
            answer = error
        finally:
            server.in_flight -= 1
        if isinstance(answer, CallFailed) and answer.status not in ALIVE:
            server.circuit.failed(str(answer))
        else:
            server.circuit.succeeded()
        return answer

    async def _request(self, server: Server, row: Row) -> Image.Image:
        """One picture; raises CallFailed, with a status that says whose fault it is."""
        text, seed = row
        seed %= 2 ** self.renderer.card.get("seed_bits", FOREIGN_SEED_BITS)
        fixed = {"model": self.renderer.card["model"], "n": 1, "response_format": "b64_json", "output_format": "png"}
        body = {**fixed, "prompt": text, "seed": seed, **self.renderer.request}
        timeout = self.renderer.options.render_timeout
        try:
            async with asyncio.timeout(timeout):
                reply = await self.client.post(f"{server.url}/images/generations", json=body)
        except TimeoutError as error:
            raise CallFailed(f"no answer within {timeout:g} s", status=408) from error
        except httpx.HTTPError as error:
            raise CallFailed(one_line(error)) from error
        if reply.status_code != 200:
            words = f": {' '.join(reply.text.split())[:300]}" if reply.status_code < 500 else ""
            raise CallFailed(f"HTTP {reply.status_code}{words}", status=reply.status_code)
        return _picture(reply.content, self.renderer.request.get("size"))


# ----- requests and replies


def _check(options: RenderOptions) -> None:
    """Raise UserError for an option that the server has."""
    for one in fields(options):
        value = vars(options)[one.name]
        if one.metadata["where"] == "drawer" and value != one.default:
            raise UserError(f"--{one.name} {value} is an option of the server that draws: leave it out here")


def _asked(options: RenderOptions) -> dict[str, Any]:
    """The given options as fields of a request; the server chooses the others."""
    side = options.resolution
    asked = {
        "size": side and f"{side}x{side}",
        "num_inference_steps": options.render_steps,
        "guidance_scale": options.guidance,
        "max_sequence_length": options.max_sequence_length,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _headers() -> dict[str, str]:
    key = checked_key("render")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _get(server: Server, path: str, timeout: float) -> httpx.Response:
    reply = httpx.get(f"{server.url}/{path}", headers=_headers(), timeout=timeout, trust_env=not server.loopback)
    return reply.raise_for_status()


def _picture(reply: bytes, size: str | None) -> Image.Image:
    """The RGB picture in a JSON reply with a base64 PNG, of that "WIDTHxHEIGHT" if given; raises CallFailed."""
    try:
        content = base64.b64decode(json.loads(reply)["data"][0]["b64_json"], validate=True)
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        found = f"{image.width}x{image.height}"
        if size not in (None, found):
            raise CallFailed(f"a picture of {found}, not {size}", status=200)
        image = image.convert("RGB")
    except BROKEN as error:
        raise CallFailed("a reply without a whole PNG picture", status=200) from error
    if image.getbbox() is None:
        raise CallFailed("black picture", status=422)  # a safety checker's
    return image
