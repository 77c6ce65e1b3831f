"""Claims about pictures from other machines: the client against real HTTP servers with faults, and our own server, two
replicas of the miniature on Ray Serve, against the renderer in this process.

pytest tests/test_remote.py
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import r1_prompter
from clients import http
from doctor.probes import probe_renderer
from doctor.report import OK, PROBLEM, WARNING
from errors import UserError
from interfaces import Prompt
from miniature.build import renderer as miniature_renderer
from rendering import RenderOptions, remote
from rendering.remote import RemoteRenderer, Settings
from run import signals
from tests.processes import ENVIRONMENT, ROOT

SIZE = 16
TOKENIZER = str(ROOT / "miniature/weights/flux/tokenizer_2")
FIRST = 2**62 + 12345  # a seed of 63 bits
TEXTS = [f"a photo of thing {number}" for number in range(12)]
SEEDS = list(range(FIRST, FIRST + len(TEXTS)))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    monkeypatch.setattr(remote, "LISTEN", 0.05)
    for name in ("RENDER_API_KEY", "RENDER_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)


# ----- a server with faults


def words() -> str:
    """A tokenizer.json that counts words."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def colour(text: str, seed: int) -> tuple[int, int, int]:
    """Of the picture of a row: no two are alike, none is black."""
    first, second, third, *_ = hashlib.sha256(f"{text}/{seed}".encode()).digest()
    return first | 1, second, third


def png(text: str, seed: int, size: int = SIZE, kind: str = "png", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour(text, seed)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says that it has `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


class Painter(ThreadingHTTPServer):
    """An images API whose pictures are of one colour; `fault(body, count)` names what goes wrong with a request.

    Args:
        card: what ours says of itself; None: as other engines, nothing.
        delay: seconds before each answer.
        fault: is told the request's body and how many came for that prompt before.
        port: 0 takes a free one.
        ids: names of the models.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(
        self,
        card: dict | None = None,
        *,
        delay: float = 0.0,
        fault: Callable[[dict, int], str] = lambda body, count: "",
        port: int = 0,
        ids: tuple[str, ...] = ("tiny",),
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.card, self.delay, self.fault, self.ids = card, delay, fault, ids
        self.location = ""  # of what is answered with a redirect
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.counts: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.counting, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Painter:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Painter

    def do_GET(self) -> None:
        cards = [{"id": name} for name in self.server.ids]
        if self.server.card is not None:
            cards = [{**card, "render": self.server.card} for card in cards]
        if self.path == "/v1/models":
            self.reply(200, json.dumps({"object": "list", "data": cards}).encode())
        elif self.path == "/v1/tokenizer" and self.server.card is not None:
            self.reply(200, words().encode())
        else:
            self.reply(404, b"{}")

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.counting:
            count = server.counts[body["prompt"]]
            server.counts[body["prompt"]] += 1
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            server.closing.wait(server.delay)
            self.answer(server.fault(body, count), body)
        finally:
            with server.counting:
                server.in_flight -= 1

    def answer(self, fault: str, body: dict) -> None:
        text, seed = body["prompt"], body["seed"]
        good = json.dumps({"data": [{"b64_json": base64.b64encode(png(text, seed)).decode()}]}).encode()
        pictures = {
            "wrong size": lambda: png(text, seed, 2 * SIZE),
            "jpeg": lambda: png(text, seed, kind="jpeg"),
            "no image": lambda: b"GIF89a, or so it says",
            "half a png": lambda: png(text, seed)[:-30],
            "black": _black,
            "bomb": lambda: bomb(60_000),
        }
        if fault in ("drop", "hang"):
            self.close_connection = True
            if fault == "hang":
                self.server.closing.wait(30)
        elif fault.isdecimal():
            self.reply(int(fault), json.dumps({"error": {"message": "a fault\nthat was asked for"}}).encode())
        elif fault in pictures:
            self.reply(
                200, json.dumps({"data": [{"b64_json": base64.b64encode(pictures[fault]()).decode()}]}).encode()
            )
        elif fault == "cut json":
            self.reply(200, good[:-40])
        elif fault == "cut base64":
            self.reply(
                200, json.dumps({"data": [{"b64_json": base64.b64encode(png(text, seed)).decode()[:-9]}]}).encode()
            )
        elif fault == "html":
            self.reply(200, b"<html>Welcome</html>")
        elif fault == "huge":
            self.reply(200, b'{"data": [{"b64_json": "' + b"A" * 2**22)
        else:
            self.reply(200, good)

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if 300 <= status < 400:
            self.send_header("Location", self.server.location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _black() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(buffer, "png")
    return buffer.getvalue()


CARD = {
    "steps": 4, "guidance": 3.5, "size": [SIZE, SIZE], "max_sequence_length": 32, "dtype": "bfloat16", "max_tokens": 5,
    "revision": None, "seed_bits": 63, "concurrency": 6, "fingerprint": "0123",
}  # fmt: skip


def load(*servers: Painter | str, **options: object) -> RemoteRenderer:
    urls = ",".join(server if isinstance(server, str) else server.url for server in servers)
    return RemoteRenderer(urls, **{"timeout": 5.0, **options}).load()


def colours(pictures: list[Image.Image | None]) -> list[tuple | None]:
    return [picture and picture.getpixel((0, 0)) for picture in pictures]


def expected(texts=TEXTS, seeds=SEEDS) -> list[tuple]:
    return [colour(text, seed) for text, seed in zip(texts, seeds, strict=True)]


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def bad_row(fault: str) -> Callable[[dict, int], str]:
    """Something wrong with one row, always."""
    return lambda body, count: fault if body["prompt"] == TEXTS[3] else ""


# ----- what is sent


def test_each_row_arrives_with_its_own_text_seed_and_settings_and_order_is_kept():
    with Painter(CARD) as server:
        draw = load(server, settings=Settings(steps=4, size=(SIZE, SIZE)))
        pictures = draw(TEXTS, SEEDS)
        assert colours(pictures) == expected() and not draw.failures
        assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 12 and pictures[0].mode == "RGB"
        assert {(body["prompt"], body["seed"]) for body in server.bodies} == set(zip(TEXTS, SEEDS, strict=True))
        for body in server.bodies:
            assert {key: body[key] for key in body if key not in ("prompt", "seed")} == {
                "model": "tiny", "n": 1, "size": "16x16", "num_inference_steps": 4, "guidance_scale": 3.5,
                "max_sequence_length": 32, "response_format": "b64_json", "output_format": "png",
            }  # fmt: skip


def test_equal_rows_are_drawn_once_and_blank_ones_are_not_sent():
    with Painter(CARD) as server:
        draw = load(server)
        first, blank, again, other = draw(["a cat", " \n", "a cat", "a cat"], [1, 1, 1, 2])
        assert first is again and other is not first and blank is None
        assert len(server.bodies) == 2 and draw.failures == {"blank text": 1}
        assert draw([], []) == []
        with pytest.raises(ValueError, match="2 texts but 1 seeds"):
            draw(["a", "b"], [1])


def test_each_picture_is_told_of_when_it_arrives_and_a_failed_one_is_not():
    with Painter() as server:
        draw, told = load(server, tokenizer=TOKENIZER, settings=Settings(size=(SIZE, SIZE))), {}
        pictures = draw([*TEXTS, " ", TEXTS[0]], [*SEEDS, 1, SEEDS[0]], told.__setitem__)
        assert sorted(told) == [i for i in range(len(pictures)) if i != len(TEXTS)]
        assert all(told[i] is pictures[i] for i in told)


def test_a_server_that_says_nothing_gets_what_was_asked_for_and_31_bits_of_each_seed():
    with Painter() as server:
        draw = load(server, tokenizer=TOKENIZER, settings=Settings(guidance=2.0, size=(SIZE, SIZE)))
        small = [seed % 2**31 for seed in SEEDS]
        assert colours(draw(TEXTS, SEEDS)) == expected(seeds=small)
        assert {body["seed"] for body in server.bodies} == set(small)
        assert "num_inference_steps" not in server.bodies[0] and server.bodies[0]["guidance_scale"] == 2.0
        assert (draw.max_tokens, draw.count_tokens("a red circle")) == (32, 4)  # three words and the end


def test_tokens_are_counted_here_with_the_servers_tokenizer_even_when_it_is_gone():
    with Painter(CARD) as server:
        draw = load(server)
    assert (draw.count_tokens("one two three"), draw.max_tokens) == (3, 5)
    assert pickle.loads(pickle.dumps(draw)).count_tokens("one two") == 2


def test_texts_longer_than_what_is_read_are_counted():
    with Painter(CARD) as server:
        draw = load(server)
        draw(["one two three four five six", "one"], [1, 2])
        assert draw.truncated == 1


def test_the_key_comes_from_the_environment_and_goes_into_a_header_alone(monkeypatch):
    monkeypatch.setenv("RENDER_API_KEY", "secret")
    with Painter(CARD) as server:
        draw = load(server)
        draw(["a cat"], [1])
        assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in repr(vars(draw))


def test_no_more_are_in_flight_than_the_server_can_use_and_as_many_as_that():
    with Painter(CARD, delay=0.05) as server:
        assert None not in load(server)(TEXTS * 2, list(range(24)))
        assert server.most_in_flight == 6
    with Painter(CARD, delay=0.05) as server:
        load(server, concurrency=2)(TEXTS, SEEDS)
        assert server.most_in_flight == 2
    with Painter(CARD, delay=0.05) as server:
        load(server, processes=3)(TEXTS, SEEDS)
        assert server.most_in_flight == 2, "a third of 6"


def test_what_a_server_says_of_its_levers_is_asked_of_every_picture():
    with Painter({**CARD, "drawing": "render_quantization int8"}) as server:
        load(server)(TEXTS, SEEDS)
        assert {body["drawing"] for body in server.bodies} == {"render_quantization int8"}


# ----- what fails


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "408", "drop", "cut json", "cut base64", "no image", "half a png", "html"]
)
def test_what_may_pass_is_asked_again_and_nothing_is_lost(fault):
    with Painter(CARD, fault=lambda body, count: fault if count == 0 else "") as server:
        draw = load(server)
        assert colours(draw(TEXTS, SEEDS)) == expected() and not draw.failures


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("400", "refused: a fault that was asked for", 1),
        ("422", "refused: a fault that was asked for", 1),
        ("409", "refused: a fault that was asked for", 1),
        ("500", "HTTP 500", 4),
        ("wrong size", "a picture of 32x32, not 16x16", 1),
        ("jpeg", "a picture that is no whole PNG", 4),
        ("half a png", "a picture that is no whole PNG", 4),
        ("bomb", "a picture that is no whole PNG", 4),
        ("black", "black picture", 1),
        ("huge", "a reply of more than 1049941 bytes", 1),
        ("cut json", "a reply that is no images API's", 4),
    ],
)
def test_one_rows_failure_is_absent_with_its_reason_and_leaves_the_others(fault, reason, requests):
    with Painter(CARD, fault=bad_row(fault)) as server:
        draw = load(server)
        pictures = draw(TEXTS, SEEDS)
        assert pictures[3] is None and draw.failures == {reason: 1}
        assert colours(pictures[:3] + pictures[4:]) == expected(TEXTS[:3] + TEXTS[4:], SEEDS[:3] + SEEDS[4:])
        assert server.counts[TEXTS[3]] == requests


def test_a_picture_of_unknown_size_is_bounded_all_the_same():
    with Painter(fault=bad_row("bomb")) as server:
        draw = load(server, tokenizer=TOKENIZER)
        assert colours(draw(TEXTS, [1] * 12)).count(None) == 1
        assert draw.failures == {"a picture that is no whole PNG": 1}


def test_a_row_that_hangs_is_asked_for_again_then_absent_and_leaves_the_others():
    with Painter(CARD, fault=bad_row("hang")) as server:
        draw = load(server, timeout=0.4)
        assert colours(draw(TEXTS, SEEDS)).count(None) == 1
        assert 2 <= server.counts[TEXTS[3]] <= 4 and draw.failures == {"no answer within 0.4 s": 1}


def test_a_server_that_sends_a_byte_at_a_time_hits_the_deadline_too():
    with Painter(CARD) as server, dripping() as url:
        draw = load(server, timeout=0.4)
        draw.servers[0].url = url
        assert draw(["a cat"], [1]) == [None] and draw.failures == {"no answer within 0.4 s": 1}


@contextmanager
def dripping():
    """A server that sends a byte at a time, whatever was asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip(caller: socket.socket) -> None:
            with caller:
                try:
                    caller.recv(1 << 16)
                    caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
                    for _ in range(100):
                        caller.sendall(b"x")
                        time.sleep(0.05)
                except OSError:
                    return

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=drip, args=(caller,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_batch_ends_at_its_deadline_with_what_it_has():
    with Painter(CARD, fault=lambda body, count: "" if body["prompt"] in TEXTS[:2] else "hang") as server:
        draw = load(server, concurrency=1, batch_timeout=1.0)
        assert colours(draw(TEXTS, SEEDS)) == expected()[:2] + [None] * 10
        assert draw.failures == {"unfinished at the batch's end": 10} and len(server.bodies) == 3


def test_a_redirect_is_not_followed():
    with Painter(CARD) as target, Painter(CARD, fault=lambda body, count: "307") as server:
        server.location = f"{target.url}/images/generations"
        assert httpx.post(f"{server.url}/images/generations", json={"prompt": "a", "seed": 1}).has_redirect_location
        assert load(server)(["a cat"], [1]) == [None]
        assert not target.bodies


# ----- several servers


def test_rows_are_spread_by_who_has_room():
    with Painter(CARD, delay=0.02) as quick, Painter(CARD, delay=0.4) as slow:
        draw = load(slow, quick)
        assert colours(draw(TEXTS * 4, list(range(48)))) == expected(TEXTS * 4, range(48))
        assert len(quick.bodies) + len(slow.bodies) == 48 and 6 <= len(slow.bodies) < len(quick.bodies)


def test_one_dead_server_of_two_is_left_out_and_its_rows_go_to_the_other(caplog):
    with Painter(CARD) as server:
        with Painter(CARD) as dies:
            draw = load(server, dies)
        assert colours(draw(TEXTS * 4, list(range(48)))) == expected(TEXTS * 4, range(48))
        assert len(server.bodies) == 48 and not draw.failures


def test_a_server_that_fails_every_row_costs_none_while_another_is_well():
    with Painter(CARD) as well, Painter(CARD, fault=lambda body, count: "wrong size") as ill:
        draw = load(ill, well)
        assert colours(draw(TEXTS * 2, list(range(24)))) == expected(TEXTS * 2, range(24))


def test_a_server_that_accepts_and_never_answers_holds_no_batch_up_for_its_timeout(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    hangs = False
    with Painter(CARD) as well, Painter(CARD, fault=lambda body, count: "hang" if hangs else "") as ill:
        draw = load(ill, well, timeout=3.0)
        hangs = True
        assert colours(draw(TEXTS, SEEDS)) == expected()  # its circuit opens when they time out
        time.sleep(0.1)  # until its next probe
        asked, draw.timeout, draw.batch_timeout = len(ill.bodies), 25.0, 20.0  # a batch held up would end incomplete
        assert colours(draw(TEXTS, SEEDS)) == expected() and len(ill.bodies) > asked


def test_a_server_that_was_gone_at_the_start_joins_when_it_answers(caplog):
    port = closed_port()
    with Painter(CARD, delay=0.05) as server:
        with caplog.at_level(logging.WARNING):
            draw = load(server, f"http://127.0.0.1:{port}/v1")
        assert "the others draw without it" in caplog.text
        assert None not in draw(TEXTS, SEEDS)
        with Painter(CARD, port=port, delay=0.05) as late:
            time.sleep(0.3)  # until its next probe
            assert None not in draw(TEXTS * 2, list(range(24)))
            assert late.bodies


def test_all_dead_is_absent_and_never_raises():
    with Painter(CARD) as one, Painter(CARD) as two:
        draw = load(one, two, timeout=1.0)
    assert draw(TEXTS, SEEDS) == [None] * 12
    assert draw.failures == {"All connection attempts failed": 12}


def test_an_outage_shorter_than_the_patience_loses_nothing_and_is_not_hammered(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.2)
    well = threading.Event()
    with Painter(CARD, fault=lambda body, count: "" if well.is_set() else "503") as server:
        draw = load(server, timeout=20.0)
        threading.Timer(1.5, well.set).start()
        assert colours(draw(TEXTS, SEEDS)) == expected() and not draw.failures
        assert len(server.bodies) < 12 + 6 + 12, "in flight when it went down, then one probe a pause"


def test_a_run_that_is_told_to_leave_does_not_wait_for_pictures(monkeypatch):
    told: set = set()
    monkeypatch.setattr(signals, "_received", told)

    def fault(body: dict, count: int) -> str:
        if len(server.bodies) == 7:  # six are in flight at once, so the first picture has come
            told.add(signal.SIGTERM)
        return "" if body["prompt"] == TEXTS[0] else "hang"

    with Painter(CARD, fault=fault) as server:
        draw = load(server, timeout=60.0)
        pictures = draw(TEXTS, SEEDS)
        assert server.in_flight >= 6, "those that hang still do"
        assert pictures[0] is not None and pictures[1:] == [None] * 11 and draw.failures == {"told to leave": 11}


# ----- before the first picture


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://pictures.example.com/v1", "unencrypted .* RENDER_ALLOW_HTTP=1"),
        ("https://me:secret@pictures.example.com/v1", "RENDER_API_KEY"),
        ("http://127.0.0.1:99999/v1", "99999"),
        ("http://127.0.0.1:8001/v1,http://127.0.0.1:8001/v1/", "named twice"),
    ],
)
def test_a_url_that_cannot_work_is_refused_before_anything_is_sent(url, what):
    with pytest.raises(UserError, match=what):
        RenderOptions(sdmodel_name=url).load("cpu")


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch):
    for key in ("s3cret\nsecond line", "s3crét"):
        monkeypatch.setenv("RENDER_API_KEY", key)
        with pytest.raises(UserError, match="RENDER_API_KEY must be one line") as refused:
            load("http://127.0.0.1:9/v1")
        assert "s3cr" not in str(refused.value)


@pytest.mark.parametrize(
    ("card", "options", "what"),
    [
        (CARD, {"model": "other"}, "serves 'tiny', not 'other': give one of them as --render_model"),
        (CARD, {"settings": Settings(steps=20)}, "draws with steps 4, asked for is 20: start the server with"),
        (CARD, {"settings": Settings(size=(32, 32))}, "draws with size"),
        (CARD, {"settings": Settings(dtype="float32")}, "draws with dtype bfloat16, asked for is float32"),
        (None, {"settings": Settings(dtype="float32")}, "render_dtype float32 cannot be asked"),
        (None, {}, "does not say how it counts tokens: give --render_tokenizer"),
        (None, {"tokenizer": "/nowhere"}, "--render_tokenizer '/nowhere' cannot be read"),
        ({**CARD, "steps": "many"}, {}, "is no OpenAI-compatible API"),
        ({**CARD, "batch_seconds": 2.5}, {}, "render_timeout 5 s is short .* take 2.5 s .*--render_timeout 8 or more"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_with_what_to_do(card, options, what):
    with Painter(card) as server, pytest.raises(UserError, match=what):
        load(server, **options)


def test_servers_that_differ_serve_several_models_or_are_not_there_are_named():
    for name, value in (("revision", "abc"), ("drawing", "render_quantization int8")):
        with Painter(CARD) as one, Painter({**CARD, name: value}) as two:
            with pytest.raises(UserError, match=f"differ in {name}, None and {value}"):
                load(one, two)
    with Painter(CARD, ids=("a", "b")) as server:
        with pytest.raises(UserError, match="serves 'a', 'b', no name is given"):
            load(server)
        assert load(server, model="b").servers[0].model == "b"
    with pytest.raises(UserError, match="no renderer at .*scripts/render_server.py"):
        load(f"http://127.0.0.1:{closed_port()}/v1")
    with Painter(CARD) as server, pytest.raises(UserError, match="HTTP 404.*does its URL end in /v1"):
        load(server.url.removesuffix("/v1"))


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("render_timeout", 0.0, "render_timeout is 0.0"),
        ("render_batch_timeout", float("inf"), "render_batch_timeout is inf"),
        ("render_concurrency", 0, "render_concurrency is 0"),
        ("render_device", "cuda:1", "--render_device cuda:1 is an option of the server"),
        ("render_compile", True, "--render_compile True is an option of the server"),
        ("render_batch_size", "auto", "tries a renderer of this process"),
    ],
)
def test_options_out_of_range_or_without_meaning_are_refused(option, value, what):
    with pytest.raises(ValueError, match=what):
        RenderOptions(sdmodel_name="http://127.0.0.1:9/v1", **{option: value}).load("cpu")


def test_the_doctor_draws_one_real_picture_and_says_whether_a_seed_means_one(tmp_path):
    def found(url: str):
        flags = ["--config", str(ROOT / "configs/miniature.yaml"), "--outdir", str(tmp_path), "--sdmodel_name", url]
        options = r1_prompter.parse_options([*flags, "--resolution", str(SIZE), "--render_steps", "4"])
        return probe_renderer(options, {}, Prompt("a red circle"))[0][0]

    with Painter(CARD) as server:
        seen = found(server.url)
        assert seen.state == OK and "16 x 16 px in" in seen.text and server.url in seen.text
    assert found(server.url).state == PROBLEM
    with Painter(CARD, fault=lambda body, count: body.update(seed=count) or "") as server:
        assert found(server.url).state == WARNING


# ----- our own server: two replicas of the miniature

DRAWN = {"render_steps": 8, "resolution": 48, "max_sequence_length": 32, "render_batch_size": 8}
LAYOUTS = [
    f"a {color} {shape} on a {ground} ground"
    for color in ("red", "blue", "green", "yellow")
    for shape in ("circle", "square", "triangle")
    for ground in ("white", "gray")
]
KEY = "a key of the tests"

ray_test = pytest.mark.xdist_group("ray")


def below(pid: int) -> dict[int, str]:
    """Processes that `pid` started, and those that they did: pid -> command line."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            commands[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    found, layer = {}, {pid}
    while layer:
        layer = {child for child, parent in parents.items() if parent in layer}
        found |= {child: commands[child] for child in layer}
    return found


def running(pid: int) -> str:
    """Command line of a process, "" if there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(URL, process) of scripts/render_server.py with two CPU replicas and a key."""
    port, log = closed_port(), tmp_path_factory.mktemp("server") / "log"
    flags = [word for name, value in DRAWN.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts/render_server.py"), "--sdmodel_name", "miniature/weights/flux"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--replicas", "2", "--port", str(port), *flags],
            env={**ENVIRONMENT, "RENDER_API_KEY": KEY}, cwd=ROOT, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while "rendering at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
        children = {pid: command for pid, command in below(process.pid).items() if command}
        assert [command for command in children.values() if command.startswith("ray::ServeReplica")]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()[-3000:]
        assert not {pid: command for pid, command in children.items() if running(pid) == command}
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def here():
    """The same renderer in this process."""
    return miniature_renderer(**DRAWN)


@pytest.fixture
def there(served, monkeypatch):
    """The client of the served one."""
    monkeypatch.setenv("RENDER_API_KEY", KEY)
    return load(served[0], timeout=60.0, settings=Settings(steps=8, size=(48, 48), max_sequence_length=32))


def same(ours: list[Image.Image | None], theirs: list[Image.Image | None]) -> bool:
    return [one.tobytes() for one in ours] == [one.tobytes() for one in theirs]


@ray_test
def test_our_server_draws_the_very_pixels_that_this_process_draws(there, here):
    seeds = list(range(FIRST, FIRST + len(LAYOUTS)))
    assert same(there(LAYOUTS, seeds), here(LAYOUTS, seeds))
    assert not there.failures
    assert there.max_tokens == here.max_tokens
    assert [there.count_tokens(text) for text in LAYOUTS] == [here.count_tokens(text) for text in LAYOUTS]


@ray_test
@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        ({"num_inference_steps": 20}, {}, 409, "num_inference_steps is 20, this server draws with 8"),
        ({"size": "512x512"}, {}, 409, "size is '512x512'"),
        ({"guidance_scale": 9.0}, {}, 409, "guidance_scale is 9.0"),
        ({"drawing": "as you like"}, {}, 409, "this server draws with 'render_batch_size 8, render_compile False"),
        ({"seed": -1}, {}, 400, "seed is -1"),
        ({"seed": None}, {}, 400, "seed is None"),
        ({"prompt": " "}, {}, 400, "prompt must be"),
        ({"n": 2}, {}, 400, "n is 2"),
        ({"response_format": "url"}, {}, 400, "response_format"),
        ({"model": "dall-e"}, {}, 404, "no model 'dall-e'"),
        ({"prompt": "x" * 2**20}, {}, 413, "more than 1048576 bytes"),
        ({}, {"Authorization": "Bearer wrong"}, 401, "wrong or no key"),
        ({}, {"Content-Type": "text/plain"}, 415, "application/json"),
    ],
)
def test_our_server_refuses_what_it_does_not_do_in_the_shape_of_openais_errors(served, body, headers, status, said):
    sent = {"prompt": "a red circle", "seed": 1, **body}
    given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    reply = httpx.post(f"{served[0]}/images/generations", content=json.dumps(sent), headers=given, timeout=30)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}


@ray_test
def test_our_server_says_that_it_is_well_without_a_key_and_nothing_else(served):
    root = served[0].removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    assert httpx.get(f"{root}/v1/models").status_code == httpx.get(f"{root}/v1/tokenizer").status_code == 401
    assert httpx.get(f"{root}/etc/passwd", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


@ray_test
def test_our_server_listens_on_this_machine_alone_but_for_ports_of_replicas_that_ask_for_its_token(served):
    owners = {}
    for pid, command in {served[1].pid: "", **below(served[1].pid)}.items():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                owners[os.readlink(link)] = command
            except OSError:
                continue
    here, beyond = [], []
    for table, loopback in (("tcp", ("0100007F",)), ("tcp6", ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"))):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            address, port = words[1].split(":")
            if words[3] == "0A" and f"socket:[{words[9]}]" in owners:
                found = (int(port, 16), owners[f"socket:[{words[9]}]"])
                (here if address in loopback else beyond).append(found)
    assert here and len(beyond) <= 2 and all(owner.startswith("ray::ServeReplica") for _, owner in beyond), beyond
    for port, _ in beyond:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@ray_test
def test_a_replica_killed_while_it_draws_loses_nothing(served, there, here):
    texts = LAYOUTS * 4
    seeds = list(range(len(texts)))
    drawn: list = []
    drawing = threading.Thread(target=lambda: drawn.extend(there(texts, seeds)))
    drawing.start()
    time.sleep(0.8)
    replicas = [pid for pid, command in below(served[1].pid).items() if command.startswith("ray::ServeReplica")]
    assert len(replicas) == 2 and drawing.is_alive()
    os.kill(replicas[0], signal.SIGKILL)
    time.sleep(0.2)
    assert drawing.is_alive(), "killed while it drew"
    drawing.join(120)
    assert not drawing.is_alive() and not there.failures
    assert same(drawn, here(texts, seeds))


@ray_test
def test_training_with_servers_gives_the_rollouts_and_rewards_of_training_without(served, tmp_path):
    def rollouts(name: str, *more: str) -> list[list[dict]]:
        flags = [word for option, value in DRAWN.items() for word in (f"--{option}", str(value))]
        small = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--save_images_every", "1"]
        rewards = ["--rewards", "hps", "format", "--reward_weights", "1", "0.3", "--save_strategy", "no"]
        command = [sys.executable, str(ROOT / "r1_prompter.py"), "--config", "configs/miniature.yaml", *flags, *small]
        done = subprocess.run(
            [*command, *rewards, "--outdir", str(tmp_path / name), *more],
            env={**ENVIRONMENT, "RENDER_API_KEY": KEY}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        files = sorted((tmp_path / name / "rollouts").glob("*.jsonl"))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    local, served_rows = rollouts("local"), rollouts("remote", "--sdmodel_name", served[0])
    assert len(local) == 2 and len(local[0]) == 16
    numbers = ("parts", "total", "advantage")  # HPS of a group at once, or of the batch at once: another order of sums
    for mine, theirs in zip(chain(*local), chain(*served_rows), strict=True):
        assert {k: v for k, v in mine.items() if k not in numbers} == {
            k: v for k, v in theirs.items() if k not in numbers
        }
        assert mine["parts"] == pytest.approx(theirs["parts"], abs=1e-5)
        assert mine["advantage"] == pytest.approx(theirs["advantage"], abs=1e-3)


class Slow:
    """Stands in for `LocalRenderer`: 4 pictures at once in 0.1 s, however few are asked for."""

    chunk_size, max_tokens = 4, 32
    settings = {"steps": 1, "guidance": 1.0, "max_sequence_length": 32}

    def __init__(self):
        self.failures, self.drawn, self.fails = Counter(), [], False

    def __call__(self, texts, seeds):
        time.sleep(0.1)
        if self.fails:
            raise RuntimeError("an illegal memory access was encountered")
        self.drawn.append(list(texts))
        return [Image.new("RGB", (SIZE, SIZE), colour(*row)) for row in zip(texts, seeds, strict=True)]


@pytest.mark.filterwarnings("ignore:Using extra keyword")  # of ray.serve, when it is imported
def test_rows_that_come_one_by_one_are_drawn_together_and_a_renderer_that_raises_makes_its_replica_ill(monkeypatch):
    from rendering import server as render_server

    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=10**6))
    monkeypatch.setattr(render_server.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(RenderOptions, "load", lambda self, device: Slow())
    replica = render_server.Renderers(RenderOptions(), "tiny", "cpu", 8, 0.01)
    replica.renderer.drawn.clear()

    async def row(number: int, pause: float):
        await asyncio.sleep(pause * number)
        return await replica._draw((f"thing {number}", number))

    async def rows(count: int, pause: float):
        return await asyncio.gather(*(row(number, pause) for number in range(count)), return_exceptions=True)

    async def whole():  # one loop for all: Serve's queue belongs to the first that it sees
        drawn = await rows(40, 0.025)  # as fast as they can be drawn, if four at once are
        assert colours(drawn) == [colour(f"thing {number}", number) for number in range(40)]
        assert len(replica.renderer.drawn) <= 16, "10 are needed; each alone, 40"
        replica.check_health()
        replica.renderer.fails = True
        assert [str(outcome) for outcome in await rows(6, 0)] == ["an illegal memory access was encountered"] * 6

    asyncio.run(asyncio.wait_for(whole(), 60))
    with pytest.raises(RuntimeError, match="must be started anew"):
        replica.check_health()


@ray_test
def test_our_server_can_be_told_to_stop_while_it_loads():
    command = [sys.executable, str(ROOT / "scripts/render_server.py"), "--sdmodel_name", "miniature/weights/flux"]
    process = subprocess.Popen(
        [*command, "--port", str(closed_port())], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        while not [command for command in below(process.pid).values() if command.startswith("ray::")]:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert "rendering at" not in process.communicate(timeout=60)[0] and process.returncode == 0
    finally:
        process.kill()


@pytest.mark.filterwarnings("ignore:Using extra keyword")  # of ray.serve, when it is imported
def test_our_server_does_not_start_with_what_cannot_work(capsys, monkeypatch):
    from rendering import server as render_server

    for flags, said in [
        (["--host", "0.0.0.0"], "set environment RENDER_API_KEY"),
        (["--replicas", "0"], "--replicas is 0"),
        (["--render_batch_size", "auto"], "settled by r1_prompter.py alone"),
        (["--port", "99999"], "--port is 99999"),
        (["--sdmodel_name", "http://127.0.0.1:8001/v1"], "is a server"),
        (["--render_stepz", "1"], "did you mean '--render_steps'"),
    ]:
        assert render_server.main(flags) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
