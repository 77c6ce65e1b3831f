"""Draws on other machines: one or several servers that speak the OpenAI images API.

    --sdmodel_name http://127.0.0.1:8001/v1,http://127.0.0.1:8002/v1

Ours (`scripts/render_server.py`), vLLM-Omni and SGLang-Diffusion. One request is one picture; the engine makes
batches. A batch never raises because of a server: a picture that could not be had is None, and its reason is counted.

    one request   at most `render_timeout` seconds
    one row       tried again, elsewhere first; absent after ATTEMPTS failures at each server that works. A refusal of
                  the text (400, 413, 422) is final; a server that is gone or busy does not count
    one server    left out after TRIP failures in a row; then every PAUSE seconds a copy of a waiting row probes it.
                  The row itself waits for other servers, so a probe that hangs delays nothing
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
import json
import logging
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from clients.http import CHECK_TIMEOUT, CONNECT_TIMEOUT, Circuit, back_off, checked_key, checked_url
from errors import UserError, one_line
from interfaces import OnImage
from models.weights import locked
from rendering.options import AUTO, RenderOptions
from rendering.rows import OnRow, Outcome, Row, draw_distinct
from run.signals import leaving

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of one row at one server
TRIP, PAUSE = 3, 5.0  # failures in a row that open a server's circuit; seconds between probes
TICK = 0.05  # seconds between looks at clock, signals and circuits
CONCURRENCY = 16  # requests in flight at a server that does not say how many it can use
FOREIGN_SEED_BITS = 31
UNLIMITED = 10**6  # tokens; transformers gives far more for a tokenizer without a limit
REFUSED = {400, 413, 422}  # statuses: this text cannot be drawn, there or elsewhere
GONE = {429, 502, 503, 504}  # statuses: nobody there, or nobody free
BROKEN = (  # what a broken reply makes JSON, base64 or Pillow raise
    OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class _Failed(Exception):
    """A request gave no picture.

    Args:
        reason: as it is counted.
        final: no server can draw this row.
        server_works: it says nothing against the server.
        counts: it counts against the row.
    """

    def __init__(self, reason: str, *, final: bool = False, server_works: bool = False, counts: bool = True):
        super().__init__(reason)
        self.final, self.server_works, self.counts = final, server_works, counts


@dataclass(eq=False)
class Server:
    """One server, at the base `url` of its API."""

    url: str
    loopback: bool  # whether it is on this machine
    slots: int  # requests in flight at most
    circuit: Circuit = field(default_factory=lambda: Circuit(TRIP, PAUSE))  # open while it is left out


Request = Callable[[Server, Row], Awaitable[Image.Image]]  # one picture from one server; raises _Failed


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
        truncated: texts longer than `max_tokens` that were sent all the same, their ends unread.
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
        self.truncated = 0
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
        self.truncated += sum(self.count_tokens(text) > self.max_tokens for text in {text for text, _ in rows})
        outcomes = asyncio.run(self._draw_all(rows, on_row))
        reasons = [outcome for outcome in outcomes.values() if isinstance(outcome, str)]
        if reasons:
            logger.warning("%d of %d pictures could not be had, one: %s", len(reasons), len(rows), reasons[0])
        return outcomes

    async def _draw_all(self, rows: list[Row], on_row: OnRow) -> dict[Row, Outcome]:
        common = {
            "headers": _headers(),
            "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT),  # `_request` has its own
            "limits": httpx.Limits(max_connections=None),
        }
        async with httpx.AsyncClient(**common, trust_env=False) as direct, httpx.AsyncClient(**common) as proxied:

            def request(server: Server, row: Row) -> Awaitable[Image.Image]:
                return self._request(direct if server.loopback else proxied, server.url, row)

            deadline = time.monotonic() + self.options.render_batch_timeout
            return await _Batch(self.servers, rows, request, on_row).draw(self.options.render_timeout, deadline)

    async def _request(self, client: httpx.AsyncClient, url: str, row: Row) -> Image.Image:
        """One picture from one server; raises _Failed."""
        text, seed = row
        seed %= 2 ** self.card.get("seed_bits", FOREIGN_SEED_BITS)
        fixed = {"model": self.card["model"], "n": 1, "response_format": "b64_json", "output_format": "png"}
        body = {**fixed, "prompt": text, "seed": seed, **self.request}
        timeout = self.options.render_timeout
        try:
            async with asyncio.timeout(timeout):
                reply = await client.post(f"{url}/images/generations", json=body)
        except TimeoutError as error:
            raise _Failed(f"no answer within {timeout:g} s") from error
        except httpx.HTTPError as error:
            raise _Failed(one_line(error), counts=False) from error
        if reply.status_code != 200:
            words = f": {' '.join(reply.text.split())[:300]}" if reply.status_code < 500 else ""
            raise _Failed(
                f"HTTP {reply.status_code}{words}",
                final=reply.status_code in REFUSED,
                server_works=reply.status_code in REFUSED or reply.status_code == 429,
                counts=reply.status_code not in GONE,
            )
        return _picture(reply.content, self.request.get("size"))


@dataclass(eq=False)
class _Job:
    """One row on its way, or a copy of it that probes a server."""

    row: Row
    is_probe: bool = False
    failures: Counter[Server] = field(default_factory=Counter)  # those that count
    tries: int = 0  # that failed, for whatever reason
    after: float = 0.0  # it may be sent again, of time.monotonic
    reason: str = ""  # of the last failure


class _Batch:
    """Servers take rows as they have room, until every row has an outcome; their circuits outlive the batch."""

    def __init__(self, servers: Sequence[Server], rows: Sequence[Row], request: Request, on_row: OnRow):
        self.servers = random.SystemRandom().sample(servers, len(servers))  # or all processes begin with the same one
        self.rows, self.request, self.on_row = rows, request, on_row
        self.waiting = [_Job(row) for row in rows]
        self.probed: set[Server] = set()
        self.outcomes: dict[Row, Outcome] = {}

    @property
    def is_finished(self) -> bool:
        return len(self.outcomes) == len(self.rows)

    async def draw(self, patience: float, deadline: float) -> dict[Row, Outcome]:
        """The outcome of every row.

        Args:
            patience: seconds for which rows wait while no server works.
            deadline: of time.monotonic.
        """
        slots = [(slot, server) for server in self.servers for slot in range(server.slots)]
        in_turn = sorted(slots, key=lambda one: one[0])  # so that few rows are spread over all servers
        workers = [asyncio.create_task(self._work(server)) for _, server in in_turn]
        worked = time.monotonic()
        try:
            while not self.is_finished and not leaving() and (now := time.monotonic()) < deadline:
                if any(not server.circuit.is_open for server in self.servers):
                    worked = now
                self._give_up(no_server=now - worked >= patience)
                ended, _ = await asyncio.wait(workers, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                for worker in ended:
                    worker.result()  # raises what is no failure of a request, a bug
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        late = "told to leave" if leaving() else "unfinished at the batch's end"
        return {row: self.outcomes.get(row, late) for row in self.rows}

    async def _work(self, server: Server) -> None:
        """Fill one slot of a server."""
        while not self.is_finished:
            job = self._next(server)
            if job is None:
                await asyncio.sleep(TICK)
                continue
            try:
                picture = await self.request(server, job.row)
            except _Failed as error:
                self._note_failure(error, job, server)
            else:
                server.circuit.succeeded()
                self._finish(job.row, picture)
            if job.is_probe:
                self.probed.remove(server)

    def _next(self, server: Server) -> _Job | None:
        """A row to send to this server now; to one that is left out a copy, as a probe."""
        if server.circuit.is_open:
            if not self.waiting or server in self.probed or not server.circuit.lets_through():
                return None
            self.probed.add(server)
            return _Job(self.waiting[0].row, is_probe=True)
        now, working = time.monotonic(), [one for one in self.servers if not one.circuit.is_open]
        for job in self.waiting:
            if job.after <= now and job.failures[server] == min(job.failures[one] for one in working):
                self.waiting.remove(job)
                return job
        return None

    def _note_failure(self, error: _Failed, job: _Job, server: Server) -> None:
        if error.server_works:
            server.circuit.succeeded()
        else:
            server.circuit.failed(str(error))
        if error.final:
            self._finish(job.row, str(error))
        elif not job.is_probe and job.row not in self.outcomes:
            job.reason = str(error)
            job.failures[server] += error.counts
            job.tries += 1
            job.after = time.monotonic() + back_off(job.tries)
            self.waiting.append(job)

    def _give_up(self, no_server: bool) -> None:
        """Finish the waiting rows that no server is left for."""
        for job in list(self.waiting):
            failed = {server for server in self.servers if job.failures[server] >= ATTEMPTS}
            left = [server for server in self.servers if server not in failed and not server.circuit.is_open]
            if no_server or (failed and not left):
                self._finish(job.row, job.reason or self.servers[0].circuit.reason)

    def _finish(self, row: Row, outcome: Outcome) -> None:
        """Note the first outcome of a row; a probe and the row itself may both have one."""
        if row not in self.outcomes:
            self.outcomes[row] = outcome
            self.waiting = [job for job in self.waiting if job.row != row]
            if not isinstance(outcome, str):
                self.on_row(row, outcome)


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
    """The RGB picture in a reply of the images API, JSON with a base64 PNG.

    Args:
        reply: of the server.
        size: "WIDTHxHEIGHT" that it must have, None for any.

    Raises:
        _Failed: there is none, it has another size, or it is black (a safety checker's).
    """
    try:
        content = base64.b64decode(json.loads(reply)["data"][0]["b64_json"], validate=True)
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        found = f"{image.width}x{image.height}"
        if size not in (None, found):
            raise _Failed(f"a picture of {found}, not {size}")
        image = image.convert("RGB")
    except BROKEN as error:
        raise _Failed("a reply without a whole PNG picture") from error
    if image.getbbox() is None:
        raise _Failed("black picture", final=True, server_works=True)
    return image
