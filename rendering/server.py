"""Our own renderer for other machines: an OpenAI images API on Ray Serve, one replica a GPU, each with its batches.

    python scripts/render_server.py --sdmodel_name black-forest-labs/FLUX.1-dev --resolution 512 --render_steps 20

then, on the machine that trains, with the same options: --sdmodel_name http://127.0.0.1:8001/v1

It draws what the trainer would draw itself (rendering/local.py): same texts, seeds and settings, same pictures, on the
same hardware. The settings are the server's; a request that asks for others is refused (409), since they are part of
the reward. A replica that dies, or whose renderer raises, is started anew; what it was drawing is answered with an
error and asked for again. Needs the extra `serve`.

    POST /v1/images/generations   prompt, model, n = 1, size, seed, num_inference_steps, guidance_scale,
                                  max_sequence_length, response_format = b64_json, output_format = png
    GET  /v1/models               the name, and under "render" what pictures depend on, and how many at once
    GET  /v1/tokenizer            the tokenizer.json with which texts are counted
    GET  /health                  200 once pictures can be drawn

Loopback by default. Off this machine it needs a key, in the environment (RENDER_API_KEY), and has no encryption: put
it behind a proxy that has, or into a network that you trust. Ray itself listens on loopback only, but for one port of
each replica that Ray Serve opens on every address and that answers only to this server's own random token.

Source: Ray 2.60, `serve.batch`, `serve.deployment`, `HTTPOptions`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError, one_line

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
    "0"  # its name apart: Ray's node is 127.0.0.1 and listens there alone
)
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # or replicas are killed when somebody else fills the memory
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # one of this server alone; else Ray keeps one in the home folder

import ray
import torch
from PIL import Image
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from clients.http import checked_key, is_loopback
from models.weights import locked
from prompting import well_formed
from rendering import AUTO, RenderOptions
from run.options import changed_by, option, parse

if TYPE_CHECKING:
    from rendering.local import LocalRenderer  # diffusers: for the replicas alone

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 2**20  # of a request: a text of 100,000 characters, however escaped, fits
SEED_BITS = 63
MOST_BATCHES = 64  # that Serve may hand over before the first of them is drawn
DRAWING = [  # options, beside those that a request may name, by which pictures differ
    one.name for one in fields(RenderOptions) if one.metadata["where"] == "drawer" and changed_by(one) == "pictures"
]
WARM_UP = ("a photo of a red circle", 0)  # what is drawn before the first request: it warms up, and is the fingerprint


@dataclass
class ServerOptions:
    """Where it serves, and with how much."""

    host: str = option("127.0.0.1", "Address to listen on; others than loopback need a key.", changes="nothing")
    port: int = option(8001, "Port to listen on.", changes="nothing")
    replicas: int | None = option(
        None, "Copies of the renderer, one a GPU; unset: as many as GPUs, or one on a CPU.", changes="nothing"
    )
    batch_wait: float = option(
        0.05, "Seconds that a batch waits for more pictures after its first.", changes="nothing"
    )
    temp_dir: str | None = option(
        None, "Folder of Ray's own files, a short path; unset: one that is removed at the end.", changes="nothing"
    )


class Refused(Exception):
    """A request that is answered with an error; `code` is for programs."""

    def __init__(self, status: int, message: str, code: str = "invalid_request"):
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def reply(self) -> JSONResponse:
        """In the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status)


@dataclass
class _Job:
    """A row that waits, and then its place in what is drawn at once."""

    row: tuple[str, int]
    drawing: asyncio.Task[list[Image.Image | str]] | None = None
    place: int = 0


class Renderers:
    """One replica: a renderer, its batches, and the HTTP in front of it.

    Args:
        options: the renderer's.
        name: under which it is served.
        device: "cuda" or "cpu".
        concurrency: requests that all replicas together can use at once.
        batch_wait: seconds.
    """

    def __init__(self, options: RenderOptions, name: str, device: str, concurrency: int, batch_wait: float):
        self.name = name
        self.renderer: LocalRenderer = options.load(device)
        self.key = os.environ.get("RENDER_API_KEY", "").strip()
        self._draw.set_max_batch_size(self.renderer.chunk_size)
        self._draw.set_batch_wait_timeout_s(batch_wait)
        self.waiting: list[_Job] = []
        self.free, self.broken = asyncio.Lock(), False
        (first,) = self.renderer([WARM_UP[0]], [WARM_UP[1]])
        if first is None:
            raise UserError(f"the renderer cannot draw {WARM_UP[0]!r}: {dict(self.renderer.failures)}")
        started = time.perf_counter()
        self.renderer([WARM_UP[0]], [WARM_UP[1] + 1])
        given = asdict(options)
        self.card = {
            **self.renderer.settings,
            "size": list(first.size),
            "dtype": options.render_dtype,
            "max_tokens": self.renderer.max_tokens,
            "revision": locked(options.sdmodel_name).revision,
            "drawing": ", ".join(f"{name} {given[name]}" for name in DRAWING),
            "seed_bits": SEED_BITS,
            "concurrency": concurrency,
            "batch_seconds": time.perf_counter() - started,
            "fingerprint": hashlib.sha256(first.tobytes()).hexdigest()[:16],
        }

    def check_health(self) -> None:
        """Asked by Ray Serve every few seconds.

        Raises:
            RuntimeError: the renderer did: what it raises (a device that fails) it goes on raising, and at once, so
                that most requests would come here.
        """
        if self.broken:
            raise RuntimeError("the last pictures could not be drawn: this replica must be started anew")

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        routes = {
            ("GET", "/health"): self.health,
            ("GET", "/v1/models"): self.models,
            ("GET", "/v1/tokenizer"): self.tokenizer,
            ("POST", "/v1/images/generations"): self.image,
        }
        try:
            route = routes.get((request.method, request.url.path))
            if request.url.path != "/health":
                self._admit(request)
            if route is None:
                raise Refused(404, f"no {request.method} {request.url.path}, only {[path for _, path in routes]}")
            return await route(request)
        except Refused as error:
            return error.reply

    def _admit(self, request: Request) -> None:
        """Raise unless the caller has the key, if there is one."""
        given = request.headers.get("authorization", "").encode()
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refused(401, "wrong or no key: send RENDER_API_KEY as a bearer token", "invalid_api_key")

    async def health(self, request: Request) -> Response:
        """It is there."""
        return PlainTextResponse("ok")

    async def models(self, request: Request) -> Response:
        """The one model, and what its pictures depend on."""
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "r1-prompter", "render": self.card}
        return JSONResponse({"object": "list", "data": [card]})

    async def tokenizer(self, request: Request) -> Response:
        """As its tokenizer.json."""
        text = self.renderer.tokenizer_json
        if text is None:
            raise Refused(404, "this renderer's tokenizer has no tokenizer.json", "no_tokenizer")
        return Response(text, media_type="application/json")

    async def image(self, request: Request) -> Response:
        """One picture."""
        text, seed = self._row(await _json_of(request))
        outcome = await self._draw((text, seed))
        if isinstance(outcome, str):
            gone = "out of memory" in outcome
            raise Refused(503 if gone else 422, f"could not be drawn: {outcome}", "not_drawn")
        content = await asyncio.to_thread(_png, outcome)  # 0.1 s at 1024 px, in which others are answered
        return JSONResponse({"created": int(time.time()), "output_format": "png", "data": [{"b64_json": content}]})

    def _row(self, body: dict) -> tuple[str, int]:
        """Text and seed of a request; raises Refused for what is not served here."""
        text, seed = body.get("prompt"), body.get("seed")
        if not isinstance(text, str) or not text.strip():
            raise Refused(400, "prompt must be a text that is not blank")
        if type(seed) is not int or not 0 <= seed < 2**SEED_BITS:
            raise Refused(400, f"seed is {seed!r}, must be a whole number from 0 to 2**{SEED_BITS} - 1")
        if body.get("model") not in (None, self.name):
            raise Refused(404, f"no model {body['model']!r} here, only {self.name!r}", "model_not_found")
        width, height = self.card["size"]
        fixed = {"n": 1, "response_format": "b64_json", "output_format": "png"}
        own = {
            "size": f"{width}x{height}",
            "num_inference_steps": self.card["steps"],
            "guidance_scale": self.card["guidance"],
            "max_sequence_length": self.card["max_sequence_length"],
            "drawing": self.card["drawing"],
        }
        for name, value in fixed.items():
            if body.get(name) not in (None, value):
                raise Refused(400, f"{name} is {body[name]!r}, here it can only be {value!r}")
        for name, value in own.items():
            if body.get(name) not in (None, value):
                message = f"{name} is {body[name]!r}, this server draws with {value!r}: start it with what you need"
                raise Refused(409, message, "other_settings")
        return well_formed(text), seed

    @serve.batch(max_concurrent_batches=MOST_BATCHES)
    async def _draw(self, rows: list[tuple[str, int]]) -> list[Image.Image | str]:
        """The picture of each row, or why there is none.

        Serve closes a batch `batch_wait` after its first row, whether or not the renderer is free, and the renderer
        fills each up to its full size. So what comes while a batch is drawn is put together here, when it is done.
        """
        jobs = [_Job(row) for row in rows]
        self.waiting += jobs
        async with self.free:
            while any(job.drawing is None for job in jobs):
                await self._draw_some()
        return [job.drawing.result()[job.place] for job in jobs]

    async def _draw_some(self) -> None:
        """Draw the rows that have waited the longest, in a thread, so that others arrive meanwhile."""
        size = self.renderer.chunk_size
        some, self.waiting = self.waiting[:size], self.waiting[size:]
        drawing = asyncio.create_task(asyncio.to_thread(self._outcomes, [job.row for job in some]))
        for place, job in enumerate(some):
            job.drawing, job.place = drawing, place
        await asyncio.wait([drawing])
        self.broken = drawing.exception() is not None

    def _outcomes(self, rows: Sequence[tuple[str, int]]) -> list[Image.Image | str]:
        before = self.renderer.failures.copy()
        pictures = self.renderer(*map(list, zip(*rows, strict=True)))
        why = ", ".join(self.renderer.failures - before)
        return [why if picture is None else picture for picture in pictures]


async def _json_of(request: Request) -> dict:
    """The object in a request's body; raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "send application/json")  # which a foreign web page may not
    pieces, length = [], 0
    async for piece in request.stream():
        length += len(piece)
        if length > MOST_BYTES:
            raise Refused(413, f"a request of more than {MOST_BYTES} bytes")
        pieces.append(piece)
    try:
        body = json.loads(b"".join(pieces))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"not JSON: {one_line(error)}") from error
    if not isinstance(body, dict):
        raise Refused(400, "not a JSON object")
    return body


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)  # of a photo: a seventh of the time for a fifth more bytes
    return base64.b64encode(buffer.getvalue()).decode()


# ----- the program


def deploy(server: ServerOptions, render: RenderOptions) -> None:
    """Start replicas on the Ray that is running here; returns when all can draw.

    Raises:
        RuntimeError: they did not start; the log says why.
    """
    gpus = torch.cuda.device_count() if render.render_device is None else 0
    replicas = server.replicas or gpus or 1
    batch = render.render_batch_size
    model = render.render_model or Path(render.sdmodel_name).name
    for name in ("sdmodel_name", "render_lora"):  # replicas may start in another folder
        given = asdict(render)[name]
        if given and Path(given.partition(":")[0]).is_dir():
            render = replace(render, **{name: str(Path(given).resolve())})
    deployment = serve.deployment(
        Renderers,
        name="Renderers",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpus else 0},
        max_ongoing_requests=MOST_BATCHES * batch,  # so that /health and /v1/models need not wait for pictures
        graceful_shutdown_timeout_s=2,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},
    )
    device = render.render_device or ("cuda" if gpus else "cpu")
    concurrency = 2 * batch * replicas  # one batch drawn, one filled
    application = deployment.bind(render, model, device, concurrency, server.batch_wait)
    serve.start(http_options=HTTPOptions(host=server.host, port=server.port, location="HeadOnly"))
    serve.run(application, name="renderers", route_prefix="/")


def check(server: ServerOptions, render: RenderOptions) -> None:
    """What can be known before anything is loaded.

    Raises:
        UserError: an option that cannot work.
    """
    if render.remote:
        raise UserError(f"--sdmodel_name {render.sdmodel_name} is a server: this one draws itself, name a pipeline")
    if AUTO in (render.render_batch_size, render.max_sequence_length):
        raise UserError(
            f"{AUTO} is settled by r1_prompter.py alone: give --render_batch_size and --max_sequence_length"
        )
    if server.replicas is not None and server.replicas < 1:
        raise UserError(f"--replicas is {server.replicas}, must be at least 1")
    if not 0 < server.port < 2**16:
        raise UserError(f"--port is {server.port}, must be from 1 to 65535")
    if not checked_key("render") and not is_loopback(server.host):
        raise UserError(
            f"--host {server.host} can be reached from other machines: set environment RENDER_API_KEY, or leave "
            "--host at 127.0.0.1"
        )
    gpus = torch.cuda.device_count()
    if gpus and render.render_device is None and (server.replicas or gpus) > gpus:
        raise UserError(f"--replicas is {server.replicas}, but there are {gpus} GPU(s), one for each")


def run(server: ServerOptions, render: RenderOptions, temp_dir: str) -> None:
    """Serve until told to stop."""
    told = threading.Event()
    ray.init(
        address="local",
        num_cpus=(server.replicas or torch.cuda.device_count() or 1) + 1,
        include_dashboard=False,
        log_to_driver=True,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=temp_dir,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # while weights are fetched or loaded, which may take an hour
    try:
        deploy(server, render)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: told.set())
        shown = f"[{server.host}]" if ":" in server.host else server.host
        print(f"rendering at http://{shown}:{server.port}/v1", flush=True)
        while not told.wait(0.5):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 told to stop, 1 it could not start, 2 wrong options."""
    try:
        server, render = parse((ServerOptions, RenderOptions), None, sys.argv[1:] if argv is None else list(argv))
        check(server, render)
    except UserError as error:
        print(f"render_server: {error}", file=sys.stderr)
        return 2
    try:
        if server.temp_dir is not None:
            run(server, render, server.temp_dir)
        else:
            with tempfile.TemporaryDirectory(prefix="render_", ignore_cleanup_errors=True) as folder:
                run(server, render, folder)
    except (RayError, RuntimeError, OSError, ValueError) as error:
        print(f"render_server: {one_line(error, 600)}", file=sys.stderr)
        return 1
    except SystemExit:  # told to stop before it served, by the handler of Ray's start or by ours
        return 0
    return 0
