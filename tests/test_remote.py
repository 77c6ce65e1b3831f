"""Claims about pictures from other machines: the client against real HTTP servers with faults, and our own server, two
replicas of the miniature on Ray Serve, against the renderer in this process."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx
import psutil
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
from rendering import RenderOptions, load_renderer, remote, renderer_contents
from rendering.remote import RemoteRenderer
from run import signals
from run.files import differences
from tests.processes import ENVIRONMENT, ROOT, closed_port, run_forked

SIZE = 16
TOKENIZER = str(ROOT / "miniature/weights/flux/tokenizer_2")
FIRST = 2**62 + 12345  # a seed of 63 bits
TEXTS = [f"a photo of thing {number}" for number in range(12)]
SEEDS = list(range(FIRST, FIRST + len(TEXTS)))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setattr(remote, "PAUSE", 0.05)
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


def png(text: str, seed: int, size: int = SIZE, kind: str = "png", black: bool = False) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), "black" if black else colour(text, seed)).save(buffer, kind)
    return buffer.getvalue()


class Painter(ThreadingHTTPServer):
    """An images API whose pictures are of one colour. `card` is what our own server says of itself, other engines say
    nothing. `fault(body, count)` names what goes wrong with a request that `count` of the same prompt preceded.
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
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.card, self.delay, self.fault = card, delay, fault
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Painter

    def do_GET(self) -> None:
        card = {"id": "tiny"} | ({} if self.server.card is None else {"render": self.server.card})
        if self.path == "/v1/models":
            self.reply(200, json.dumps({"object": "list", "data": [card]}).encode())
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
        content = {
            "wrong size": lambda: png(text, seed, 2 * SIZE),
            "jpeg": lambda: png(text, seed, kind="jpeg"),
            "half a png": lambda: png(text, seed)[:-30],
            "black": lambda: png(text, seed, black=True),
        }.get(fault, lambda: png(text, seed))()
        reply = json.dumps({"data": [{"b64_json": base64.b64encode(content).decode()}]}).encode()
        if fault in ("drop", "hang"):
            self.close_connection = True
            if fault == "hang":
                self.server.closing.wait(60)
        elif fault == "drip":  # a byte at a time, for longer than any deadline
            self.send_response(200)
            self.end_headers()
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        elif fault.isdecimal():
            self.reply(int(fault), json.dumps({"error": {"message": "a fault\nthat was asked for"}}).encode())
        else:
            self.reply(200, reply[:-40] if fault == "cut json" else reply)

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


REQUEST = {
    "size": f"{SIZE}x{SIZE}", "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 32,
    "drawing": {"render_dtype": "bfloat16"},
}  # fmt: skip
CARD = {"request": REQUEST, "max_tokens": 5, "seed_bits": 63, "concurrency": 6}


def load(*servers: Painter | str, processes: int = 1, **options: object) -> RemoteRenderer:
    urls = ",".join(server if isinstance(server, str) else server.url for server in servers)
    return RemoteRenderer(RenderOptions(urls, **{"render_timeout": 5.0, **options}), processes)


def colours(pictures: list[Image.Image | None]) -> list[tuple | None]:
    return [picture and picture.getpixel((0, 0)) for picture in pictures]


def expected(texts=TEXTS, seeds=SEEDS) -> list[tuple]:
    return [colour(text, seed) for text, seed in zip(texts, seeds, strict=True)]


# ----- what is sent


def test_each_row_arrives_with_its_own_text_seed_and_settings_and_order_is_kept():
    with Painter(CARD) as server:
        draw = load(server, render_steps=4, resolution=SIZE)
        pictures = draw(TEXTS, SEEDS)
        assert colours(pictures) == expected() and not draw.failures
        assert (draw.count_tokens("one two three"), draw.max_tokens) == (3, 5)  # with the server's tokenizer
        assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 12 and pictures[0].mode == "RGB"
        assert {(body.pop("prompt"), body.pop("seed")) for body in server.bodies} == set(
            zip(TEXTS, SEEDS, strict=True)
        )
        fixed = {"model": "tiny", "n": 1, "response_format": "b64_json", "output_format": "png"}
        assert all(body == {**fixed, **REQUEST} for body in server.bodies)


def test_equal_rows_are_drawn_once_blank_ones_are_not_sent_and_on_image_is_called_for_each_picture():
    with Painter(CARD) as server:
        draw, seen = load(server), {}
        first, blank, again, other = draw(["a cat", " \n", "a cat", "a cat"], [1, 1, 1, 2], seen.__setitem__)
        assert first is again and other is not first and blank is None
        assert seen == {0: first, 2: again, 3: other}
        assert len(server.bodies) == 2 and draw.failures == {"blank text": 1}
        assert draw([], []) == []


def test_another_engine_gets_what_was_asked_for_and_31_bits_of_each_seed():
    with Painter() as server:
        draw = load(server, render_tokenizer=TOKENIZER, guidance=2.0, resolution=SIZE)
        small = [seed % 2**31 for seed in SEEDS]
        assert colours(draw(TEXTS, SEEDS)) == expected(seeds=small)
        assert {body["seed"] for body in server.bodies} == set(small)
        assert "num_inference_steps" not in server.bodies[0] and server.bodies[0]["guidance_scale"] == 2.0
        assert (draw.max_tokens, draw.count_tokens("a red circle")) == (32, 4)  # three words and the end


def test_the_key_comes_from_the_environment_goes_into_a_header_alone_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("RENDER_API_KEY", "secret")
    with Painter(CARD) as server:
        draw = load(server)
        draw(["a cat"], [1])
        assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in repr(vars(draw))
    monkeypatch.setenv("RENDER_API_KEY", "secret\nsecond line")  # no header
    with pytest.raises(UserError, match="RENDER_API_KEY") as refused:
        load("http://127.0.0.1:9/v1")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "most"), [({}, 6), ({"render_concurrency": 2}, 2), ({"processes": 3}, 2)], ids=str
)
def test_as_many_are_in_flight_as_the_server_can_use_shared_by_processes(options, most):
    with Painter(CARD, delay=0.05) as server:
        assert None not in load(server, **options)(TEXTS * 2, list(range(24)))
        assert server.most_in_flight == most


# ----- what fails


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "drop", "cut json", "half a png"])
def test_a_failure_that_may_pass_is_asked_again_and_nothing_is_lost(fault):
    with Painter(CARD, fault=lambda body, count: fault if count == 0 else "") as server:
        draw = load(server)
        assert colours(draw(TEXTS, SEEDS)) == expected() and not draw.failures


@pytest.mark.parametrize(
    ("fault", "reason", "most_requests"),
    [
        ("400", "HTTP 400", 1),
        ("422", "a fault\\nthat was asked for", 1),
        ("black", "black picture", 1),
        ("409", "HTTP 409", 4),
        ("500", "HTTP 500", 4),
        ("wrong size", "a picture of 32x32, not 16x16", 4),
        ("jpeg", "without a whole PNG", 4),
        ("half a png", "without a whole PNG", 4),
        ("cut json", "without a whole PNG", 4),
        ("hang", "no answer within 0.5 s", 5),
        ("drip", "no answer within 0.5 s", 5),
    ],
)
def test_one_rows_failure_is_absent_with_its_reason_and_leaves_the_others(fault, reason, most_requests):
    with Painter(CARD, fault=lambda body, count: fault if body["prompt"] == TEXTS[3] else "") as server:
        draw = load(server, render_timeout=0.5 if fault in ("hang", "drip") else 5.0)
        pictures = draw(TEXTS, SEEDS)
        ((found, count),) = draw.failures.items()
        assert pictures[3] is None and reason in found and count == 1
        assert colours(pictures[:3] + pictures[4:]) == expected(TEXTS[:3] + TEXTS[4:], SEEDS[:3] + SEEDS[4:])
        assert server.counts[TEXTS[3]] <= most_requests


def test_a_batch_ends_at_its_deadline_with_what_it_has():
    with Painter(CARD, fault=lambda body, count: "" if body["prompt"] in TEXTS[:2] else "hang") as server:
        draw = load(server, render_concurrency=1, render_batch_timeout=1.0)
        assert colours(draw(TEXTS, SEEDS)) == expected()[:2] + [None] * 10
        assert draw.failures == {"unfinished at the batch's end": 10} and len(server.bodies) == 3


# ----- several servers


def test_rows_are_spread_by_who_has_room():
    with Painter(CARD, delay=0.02) as quick, Painter(CARD, delay=0.4) as slow:
        draw = load(slow, quick)
        assert colours(draw(TEXTS * 4, list(range(48)))) == expected(TEXTS * 4, range(48))
        assert len(quick.bodies) + len(slow.bodies) == 48 and 6 <= len(slow.bodies) < len(quick.bodies)


@pytest.mark.parametrize("fault", ["500", "409", "drop", "wrong size", "hang"])
def test_a_server_that_fails_every_row_costs_none_while_another_is_well(fault):
    with Painter(CARD) as well, Painter(CARD, fault=lambda body, count: fault) as ill:
        draw = load(ill, well, render_timeout=0.5)
        assert colours(draw(TEXTS * 2, list(range(24)))) == expected(TEXTS * 2, range(24))
        assert ill.bodies and not draw.failures


def test_a_probe_of_a_server_that_never_answers_delays_no_batch():
    hangs = False
    with Painter(CARD) as well, Painter(CARD, fault=lambda body, count: "hang" if hangs else "") as ill:
        draw = load(ill, well, render_timeout=1.0)
        hangs = True
        assert colours(draw(TEXTS, SEEDS)) == expected()  # its circuit opens after one timeout
        time.sleep(0.1)  # until its next probe
        draw.options.render_timeout = draw.options.render_batch_timeout = 30.0  # a batch held up would end incomplete
        asked = len(ill.bodies)
        assert colours(draw(TEXTS, SEEDS)) == expected() and len(ill.bodies) == asked + 1
        assert ill.in_flight >= 1, "the probe still hangs"


def test_a_server_that_was_gone_at_the_start_joins_when_it_answers(caplog):
    port = closed_port()
    with Painter(CARD, delay=0.05) as server:
        with caplog.at_level(logging.WARNING):
            draw = load(server, f"http://127.0.0.1:{port}/v1")
        assert f"{port}/v1" in caplog.text
        assert None not in draw(TEXTS, SEEDS)
        with Painter(CARD, port=port, delay=0.05) as late:
            time.sleep(0.3)  # until its next probe
            assert None not in draw(TEXTS * 2, list(range(24)))
            assert len(late.bodies) > 1


def test_all_dead_is_absent_and_never_raises():
    with Painter(CARD) as one, Painter(CARD) as two:
        draw = load(one, two, render_timeout=1.0)
    assert draw(TEXTS, SEEDS) == [None] * 12
    assert draw.failures == {"All connection attempts failed": 12}


def test_an_outage_shorter_than_the_patience_loses_nothing_and_is_not_hammered(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.2)
    well = threading.Event()
    with Painter(CARD, fault=lambda body, count: "" if well.is_set() else "503") as server:
        draw = load(server, render_timeout=20.0)
        threading.Timer(1.5, well.set).start()
        assert colours(draw(TEXTS, SEEDS)) == expected() and not draw.failures
        assert len(server.bodies) < 12 + 6 + 12, "in flight when it went down, then one probe a pause"


def test_a_run_that_must_leave_does_not_wait_for_pictures(monkeypatch):
    received: set = set()
    monkeypatch.setattr(signals, "_received", received)

    def fault(body: dict, count: int) -> str:
        if len(server.bodies) == 7:  # six are in flight at once, so the first picture has come
            received.add(signal.SIGTERM)
        return "" if body["prompt"] == TEXTS[0] else "hang"

    with Painter(CARD, fault=fault) as server:
        draw = load(server, render_timeout=60.0)
        pictures = draw(TEXTS, SEEDS)
        assert server.in_flight >= 6, "those that hang still do"
        assert pictures[0] is not None and pictures[1:] == [None] * 11 and draw.failures == {"told to leave": 11}


# ----- before the first picture


DIFFERS = {**CARD, "request": {**REQUEST, "drawing": {"render_quantization": "int8"}}}


@pytest.mark.parametrize(
    ("card", "options", "named"),
    [
        (CARD, {"render_model": "other"}, "--render_model"),
        (CARD, {"resolution": 32}, "32x32"),
        (CARD, {"render_dtype": "float32"}, "float32"),
        (None, {"render_dtype": "float32"}, "float32"),
        (None, {}, "--render_tokenizer"),
        (CARD, {"render_device": "cuda:1"}, "--render_device"),
        (DIFFERS, {"sdmodel_name": "{other},{url}"}, "int8"),
        (CARD, {"sdmodel_name": "{url},{url}/"}, "twice"),
        (CARD, {"sdmodel_name": "{root}"}, "/v1"),
        (CARD, {"sdmodel_name": "http://127.0.0.1:9/v1"}, "scripts/render_server.py"),
        (CARD, {"sdmodel_name": "http://pictures.example.com/v1"}, "RENDER_ALLOW_HTTP"),
        (CARD, {"sdmodel_name": "https://me:secret@pictures.example.com/v1"}, "RENDER_API_KEY"),
        (CARD, {"render_batch_size": "auto"}, "--render_batch_size"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_picture(card, options, named):
    with Painter(card) as server, Painter(CARD) as other:
        url = options.get("sdmodel_name", "{url}")
        url = url.format(url=server.url, other=other.url, root=server.url.removesuffix("/v1"))
        with pytest.raises(UserError, match=named) as refused:
            load_renderer(RenderOptions(**{**options, "sdmodel_name": url}), "cpu")
        assert "secret" not in str(refused.value) and not server.bodies


def test_the_doctor_draws_one_real_picture_and_says_whether_a_seed_means_one(tmp_path):
    def found(url: str):
        flags = ["--config", str(ROOT / "configs/miniature.yaml"), "--outdir", str(tmp_path), "--sdmodel_name", url]
        options = r1_prompter.parse_options([*flags, "--resolution", str(SIZE), "--render_steps", "4"])
        return probe_renderer(options, Prompt("a red circle"))[0]

    with Painter(CARD) as server:
        seen = found(server.url)
        assert seen.state == OK and server.url in seen.text
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


def below(pid: int) -> dict[int, str]:
    """Processes that `pid` started, and those that they did: pid -> command line."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            found[process.pid] = " ".join(process.cmdline()).strip()
    return found


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
        children = psutil.Process(process.pid).children(recursive=True)
        assert any(command.startswith("ray::ServeReplica") for command in below(process.pid).values())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()[-3000:]
        assert not psutil.wait_procs(children, timeout=5)[1]
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
    return load(served[0], render_timeout=60.0, render_steps=8, resolution=48, max_sequence_length=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"num_inference_steps": 20}, {}, 409),
        ({"drawing": {"render_dtype": "float32"}}, {}, 409),
        ({"seed": -1}, {}, 400),
        ({"prompt": " "}, {}, 400),
        ({"n": 2}, {}, 409),
        ({"response_format": "url"}, {}, 409),
        ({"model": "dall-e"}, {}, 409),
        ({}, {"Authorization": "Bearer wrong"}, 401),
        ({}, {"Content-Type": "text/plain"}, 415),
    ],
)
def test_our_server_refuses_what_it_does_not_do_in_the_shape_of_openais_errors(served, body, headers, status):
    sent = {"prompt": "a red circle", "seed": 1, **body}
    given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    reply = httpx.post(f"{served[0]}/images/generations", content=json.dumps(sent), headers=given, timeout=30)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert all(name in error["message"] for name in body) and set(error) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_our_server_says_that_it_is_well_without_a_key_and_nothing_else(served):
    root = served[0].removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    assert httpx.get(f"{root}/v1/models").status_code == httpx.get(f"{root}/v1/tokenizer").status_code == 401
    assert httpx.get(f"{root}/etc/passwd", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


@pytest.mark.slow
def test_our_server_listens_on_this_machine_alone_but_for_ports_of_replicas_that_ask_for_its_token(served):
    here, beyond = [], []
    for pid, command in {served[1].pid: "", **below(served[1].pid)}.items():
        for one in psutil.Process(pid).net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                is_loopback = one.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
                (here if is_loopback else beyond).append((one.laddr.port, command))
    assert here and len(beyond) <= 2 and all(owner.startswith("ray::ServeReplica") for _, owner in beyond), beyond
    for port, _ in beyond:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_our_server_draws_the_very_pixels_of_this_process_though_a_replica_is_killed_meanwhile(served, there, here):
    texts = LAYOUTS * 4
    seeds = list(range(FIRST, FIRST + len(texts)))
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
    assert [one.tobytes() for one in drawn] == [one.tobytes() for one in here(texts, seeds)]
    assert there.max_tokens == here.max_tokens and there.count_tokens(texts[0]) == here.count_tokens(texts[0])


@pytest.mark.slow
def test_training_with_servers_gives_the_rollouts_and_rewards_of_training_without(served, tmp_path):
    def rollouts(name: str, *more: str) -> list[dict]:
        command = ["r1_prompter.py", "--config", "configs/miniature.yaml", "--outdir", tmp_path / name]
        command += [word for option, value in DRAWN.items() for word in (f"--{option}", str(value))]
        command += ["--max_steps", "2", "--per_device_train_batch_size", "16", "--save_strategy", "no"]
        command += ["--rewards", "hps", "format", "--reward_weights", "1", "0.3", "--save_images_every", "1", *more]
        run_forked(*command, environment={**ENVIRONMENT, "RENDER_API_KEY": KEY}).check_returncode()
        files = sorted((tmp_path / name / "rollouts").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    local, remote_rows = rollouts("local"), rollouts("remote", "--sdmodel_name", served[0])
    assert len(local) == 2 * 16
    for mine, theirs in zip(local, remote_rows, strict=True):
        # HPS of a group at once, or of the batch at once: another order of sums
        assert mine.pop("parts") == pytest.approx(theirs.pop("parts"), abs=1e-5)
        assert mine.pop("total") == pytest.approx(theirs.pop("total"), abs=1e-5)
        assert mine.pop("advantage") == pytest.approx(theirs.pop("advantage"), abs=1e-3)
        assert mine == theirs


class Slow:
    """Stands in for `LocalRenderer`: 4 pictures at once in 0.1 s, however few are asked for."""

    chunk_size, max_tokens = 4, 32
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 32}

    def __init__(self):
        self.failures, self.drawn, self.fails = Counter(), [], False

    def __call__(self, texts, seeds):
        time.sleep(0.1)
        if self.fails:
            raise RuntimeError("an illegal memory access was encountered")
        self.drawn.append(list(texts))
        return [Image.new("RGB", (SIZE, SIZE), colour(*row)) for row in zip(texts, seeds, strict=True)]


@pytest.mark.filterwarnings("ignore:Using extra keyword")  # of ray.serve, when it is imported
def test_a_servers_card_says_which_weights_it_draws_with_wherever_they_lie(tmp_path):
    from rendering.server import _drawing

    for name in ("flux", "moved"):
        shutil.copytree("miniature/weights/flux", tmp_path / name)
    was, moved = (_drawing(RenderOptions(str(tmp_path / name))) for name in ("flux", "moved"))
    with (tmp_path / "flux" / "vae" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\7")
    now = _drawing(RenderOptions(str(tmp_path / "flux")))
    assert was == moved != now and was["render_dtype"] == now["render_dtype"]
    cards = [{**CARD, "request": {**REQUEST, "drawing": drawing}} for drawing in (was, moved, now)]
    with Painter(cards[0]) as one, Painter(cards[1]) as same, Painter(cards[2]) as other:
        first, again, changed = (renderer_contents(RenderOptions(server.url)) for server in (one, same, other))
    assert not differences({"contents": first}, {"contents": again})
    said = differences({"contents": first}, {"contents": changed})
    assert all(word in said for word in (*first["sdmodel_name"], *changed["sdmodel_name"]))


@pytest.mark.filterwarnings("ignore:Using extra keyword")  # of ray.serve, when it is imported
def test_rows_that_come_one_by_one_are_drawn_together_and_a_renderer_that_raises_makes_its_replica_ill(monkeypatch):
    from rendering import server as render_server

    monkeypatch.setattr(render_server, "load_renderer", lambda options, device: Slow())
    replica = render_server.Renderers(RenderOptions("miniature/weights/flux"), "tiny", "cpu", 8, 0.01)
    replica.renderer.drawn.clear()

    async def row(number: int, pause: float = 0.0):
        await asyncio.sleep(pause * number)
        return await replica.draw((f"thing {number}", number))

    async def everything():
        drawn = await asyncio.gather(*(row(number, 0.025) for number in range(40)))  # four at once come in 0.1 s
        assert colours(drawn) == [colour(f"thing {number}", number) for number in range(40)]
        assert len(replica.renderer.drawn) <= 16, "10 are needed; each alone, 40"
        first, gone, last = [asyncio.create_task(row(number)) for number in (0, 1, 2)]
        await asyncio.sleep(0)
        gone.cancel()  # a client that has left
        assert None not in await asyncio.gather(first, last) and replica.renderer.drawn[-1] == ["thing 0", "thing 2"]
        replica.check_health()
        replica.renderer.fails = True
        assert all("illegal memory" in outcome for outcome in await asyncio.gather(*map(row, range(6))))

    asyncio.run(asyncio.wait_for(everything(), 60))
    with pytest.raises(RuntimeError, match="started anew"):
        replica.check_health()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using extra keyword")  # of ray.serve, when it is imported
def test_our_server_does_not_start_with_what_cannot_work(capsys):
    from rendering import server as render_server

    for flags, named in [
        (["--host", "0.0.0.0"], "RENDER_API_KEY"),
        (["--render_batch_size", "auto"], "--render_batch_size"),
        (["--sdmodel_name", "http://127.0.0.1:8001/v1"], "--sdmodel_name"),
        (["--render_steps", "0"], "--render_steps"),
        (["--port", "0"], "--port"),
        (["--replicas", "0"], "--replicas"),
        (["--sdmodel_name", str(ROOT / "miniature/weights/flux"), "--resolution", "50"], "48"),
    ]:
        assert render_server.main(flags) == 2
        assert named in capsys.readouterr().err
