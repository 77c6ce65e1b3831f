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

Source: Ray 2.60, `serve.deployment`, `HTTPOptions`.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import Stopped, UserError, one_line

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's node is 127.0.0.1 and listens only there
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # or replicas are killed when somebody else fills the memory
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this server alone; else Ray keeps one in the home folder

import ray
import torch
from PIL import Image
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from clients.http import checked_key, is_loopback
from prompting import well_formed
from rendering import AUTO, RenderOptions, load_renderer, renderer_contents
from rendering.rows import Outcome, Row
from run.options import changed_by, option, parse, run_main

if TYPE_CHECKING:
    from rendering.local import LocalRenderer  # diffusers: for the replicas alone

logger = logging.getLogger(__name__)

SEED_BITS = 63
SETTINGS = ("size", "num_inference_steps", "guidance_scale", "max_sequence_length", "drawing")  # of a request
MOST_BATCHES = 64  # that Serve may hand to a replica, so that /health and /v1/models need not wait for pictures
WARM_UP = "a photo of a red circle"  # drawn before the first request


@dataclass
class ServerOptions:
    """Where it serves, and with how much."""

    host: str = option("127.0.0.1", "Address to listen on; others than loopback need a key.", changes="nothing")
    port: int = option(8001, "Port to listen on.", changes="nothing", least=1, most=65535)
    replicas: int | None = option(
        None, "Copies of the renderer, one a GPU; unset: as many as GPUs, or one on a CPU.", changes="nothing", least=1
    )
    batch_wait: float = option(
        0.05, "Seconds that a batch waits for more pictures after its first.", changes="nothing", least=0
    )


class Renderers:
    """One replica: a renderer, its batches, and the HTTP in front of it.

    Args:
        options: of the renderer.
        name: under which it is served.
        device: "cuda" or "cpu".
        concurrency: requests that all replicas together can use at once.
        batch_wait: seconds for which a batch waits for more rows.
    """

    def __init__(self, options: RenderOptions, name: str, device: str, concurrency: int, batch_wait: float):
        self.name, self.batch_wait = name, batch_wait
        options.settle(device)
        self.renderer: LocalRenderer = load_renderer(options, device)
        self.key = checked_key("render")
        self.waiting: asyncio.Queue[tuple[Row, asyncio.Future[Outcome]]] = asyncio.Queue()
        self.drawing: asyncio.Task | None = None
        self.is_broken = False
        (first,) = self.renderer([WARM_UP], [0])
        if first is None:
            raise UserError(f"the renderer cannot draw {WARM_UP!r}: {dict(self.renderer.failures)}")
        settings = {"size": f"{first.width}x{first.height}", **self.renderer.settings, "drawing": _drawing(options)}
        self.card = {
            "request": {name: value for name, value in settings.items() if value is not None},
            "max_tokens": self.renderer.max_tokens,
            "seed_bits": SEED_BITS,
            "concurrency": concurrency,
        }

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds; raises RuntimeError once the renderer raised.

        A device that failed goes on failing, and at once, so that most requests would come to this replica.
        """
        if self.is_broken:
            raise RuntimeError("the last pictures could not be drawn: this replica must be started anew")

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        route = f"{request.method} {request.url.path}"
        try:
            if route == "GET /health":
                return PlainTextResponse("ok")
            given = request.headers.get("authorization", "").encode()
            if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise HTTPException(401, "wrong or no key: send RENDER_API_KEY as a bearer token")
            if route == "GET /v1/models":
                card = {"id": self.name, "object": "model", "created": 0, "owned_by": "r1-prompter"}
                return JSONResponse({"object": "list", "data": [{**card, "render": self.card}]})
            if route == "GET /v1/tokenizer" and self.renderer.tokenizer_json is not None:
                return Response(self.renderer.tokenizer_json, media_type="application/json")
            if route == "POST /v1/images/generations":
                return await self.image(request)
            raise HTTPException(404, f"there is no {route}")
        except HTTPException as error:  # in the shape of OpenAI's errors
            kind = "invalid_request_error" if error.status_code < 500 else "server_error"
            said = {"message": error.detail, "type": kind, "param": None, "code": None}
            return JSONResponse({"error": said}, error.status_code)

    async def image(self, request: Request) -> Response:
        """One picture."""
        outcome = await self.draw(self._row(await _json_of(request)))
        if isinstance(outcome, str):
            gone = self.is_broken or "out of memory" in outcome  # not the text's fault: to be asked for again
            raise HTTPException(503 if gone else 422, f"could not be drawn: {outcome}")
        content = await asyncio.to_thread(_png, outcome)  # 0.1 s at 1024 px, in which others are answered
        return JSONResponse({"created": int(time.time()), "output_format": "png", "data": [{"b64_json": content}]})

    def _row(self, body: dict) -> Row:
        """Text and seed of a request; raises HTTPException for what is not served here."""
        text, seed = body.get("prompt"), body.get("seed")
        if not isinstance(text, str) or not text.strip():
            raise HTTPException(400, "prompt must be a text that is not blank")
        if type(seed) is not int or not 0 <= seed < 2**SEED_BITS:
            raise HTTPException(400, f"seed is {seed!r}, must be a whole number from 0 to 2**{SEED_BITS} - 1")
        fixed = {"model": self.name, "n": 1, "response_format": "b64_json", "output_format": "png"}
        for name, value in (fixed | dict.fromkeys(SETTINGS) | self.card["request"]).items():
            if body.get(name) not in (None, value):
                raise HTTPException(
                    409, f"{name} is {body[name]!r}, this server draws with {value!r}: start it with yours"
                )
        return well_formed(text), seed

    async def draw(self, row: Row) -> Outcome:
        """The outcome of one row, which is drawn in a batch with others."""
        if self.drawing is None:
            self.drawing = asyncio.create_task(self._draw_batches())
        future = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((row, future))
        return await future

    async def _draw_batches(self) -> None:
        """Draw what waits, in batches, in a thread, so that more rows arrive meanwhile."""
        while True:
            jobs = [await self.waiting.get()]
            if self.waiting.qsize() < self.renderer.chunk_size - 1:
                await asyncio.sleep(self.batch_wait)
            while len(jobs) < self.renderer.chunk_size and not self.waiting.empty():
                jobs.append(self.waiting.get_nowait())
            jobs = [job for job in jobs if not job[1].cancelled()]  # the client has left
            if not jobs:
                continue
            try:
                outcomes = await asyncio.to_thread(self._outcomes, [row for row, _ in jobs])
            except Exception as error:  # of any kind: Ray Serve starts this replica anew
                logger.exception("the renderer raised")
                self.is_broken = True
                outcomes = [f"the renderer raised: {one_line(error)}"] * len(jobs)
            for (_, future), outcome in zip(jobs, outcomes, strict=True):
                if not future.cancelled():
                    future.set_result(outcome)

    def _outcomes(self, rows: list[Row]) -> list[Outcome]:
        before = self.renderer.failures.copy()
        pictures = self.renderer(*map(list, zip(*rows, strict=True)))
        why = ", ".join(self.renderer.failures - before)
        return [why if picture is None else picture for picture in pictures]


def _drawing(options: RenderOptions) -> dict[str, Any]:
    """By which pictures differ, beside the settings that the images API has fields for; models by their contents."""
    own = [one.name for one in fields(options) if one.metadata["where"] == "drawer" and changed_by(one) == "pictures"]
    models = {name: fingerprint for name, (_, fingerprint) in renderer_contents(options).items()}
    return {name: vars(options)[name] for name in ("render_dtype", *own)} | models


async def _json_of(request: Request) -> dict:
    """The object in a request's body; raises HTTPException."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json")  # which a foreign web page may not
    try:
        return dict(await request.json())
    except (ValueError, TypeError) as error:
        raise HTTPException(400, f"not a JSON object: {one_line(error)}") from error


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)  # of a photo: a seventh of the time for a fifth more bytes
    return base64.b64encode(buffer.getvalue()).decode()


# ----- the program


def check(server: ServerOptions, render: RenderOptions) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        UserError: with the option.
    """
    gpus = torch.cuda.device_count()
    if render.remote:
        raise UserError(f"--sdmodel_name {render.sdmodel_name} is a server: this one draws itself, name a pipeline")
    if AUTO in (render.render_batch_size, render.max_sequence_length):
        raise UserError(f"give numbers for --render_batch_size and --max_sequence_length, not {AUTO}")
    if gpus and render.render_device is None and (server.replicas or gpus) > gpus:
        raise UserError(f"--replicas is {server.replicas}, but there are {gpus} GPU(s), one for each")
    if not checked_key("render") and not is_loopback(server.host):
        raise UserError(
            f"--host {server.host} can be reached from other machines: set environment RENDER_API_KEY, or leave "
            "--host at 127.0.0.1"
        )


def run(server: ServerOptions, render: RenderOptions, temp_dir: str) -> None:
    """Serve until a signal says to stop; raises RuntimeError if replicas did not start, the log says why."""
    gpus = torch.cuda.device_count() if render.render_device is None else 0
    replicas, batch = server.replicas or gpus or 1, render.render_batch_size
    deployment = serve.deployment(
        Renderers,
        name="Renderers",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpus else 0},
        max_ongoing_requests=MOST_BATCHES * batch,
        graceful_shutdown_timeout_s=2,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},
    )
    application = deployment.bind(
        render,
        render.render_model or Path(render.sdmodel_name).name,
        "cuda" if gpus else "cpu",
        2 * batch * replicas,  # one batch drawn, one filled
        server.batch_wait,
    )
    ray.init(
        address="local",
        num_cpus=replicas + 1,
        include_dashboard=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=temp_dir,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        serve.start(http_options=HTTPOptions(host=server.host, port=server.port, location="HeadOnly"))
        serve.run(application, name="renderers", route_prefix="/")
        shown = f"[{server.host}]" if ":" in server.host else server.host
        print(f"rendering at http://{shown}:{server.port}/v1", flush=True)
        while True:
            signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


def start(argv: Sequence[str]) -> None:
    """Parse, check, serve.

    Raises:
        UserError: wrong options.
        Stopped: it could not start.
    """
    server, render = parse((ServerOptions, RenderOptions), None, argv)
    check(server, render)
    try:
        with tempfile.TemporaryDirectory(prefix="render_", ignore_cleanup_errors=True) as folder:
            run(server, render, folder)
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise Stopped(one_line(error, 600)) from error
    except SystemExit:  # a signal; while Ray starts, by Ray's own handler
        return


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 stopped by a signal, 1 it could not start, 2 wrong options."""
    return run_main("render_server", lambda: start(sys.argv[1:] if argv is None else argv))
