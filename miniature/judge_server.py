"""A judge for the miniature: an OpenAI-compatible server of the standard library around any p(yes) of pictures.

    python -m miniature.judge_server --port 8080

plays both VLM judges with the miniature's ORM. It knows the two templates by their words, reads the user's prompt back
out of them, and answers what a judge would: to `rewards.judge` the grade 10 * p(yes), to `rewards.preference` the
picture with the higher p(yes), a tie where they are equal. Faults can be asked for, to see how a run bears them.

On this machine only, without keys.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import random
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from clients.chat import SLOT, Template
from data import grammar
from interfaces import Sample
from rewards import judge, preference

Score = Callable[[list[Sample]], list[float | None]]

WEIGHTS = Path(__file__).with_name("weights") / "orm"
MODEL = "miniature"
GARBAGE = "Both have their charm: Image 1 is better lit, Image 2 is better framed. My score? High."
FAULTS = {  # option -> what becomes of that share of the chat requests
    "fail_share": "answered with --fail-status",
    "drop_share": "their connection is closed without an answer",
    "garbage_share": "answered with text that holds no verdict",
}


class JudgeServer(ThreadingHTTPServer):
    """Serves while the `with` block lasts: `with JudgeServer(score) as url`.

    Args:
        score: p(yes) in [0, 1] for one picture per sample, None where there is none (HTTP 500); one call at a time.
            A picture that was scored for a prompt is not scored again.
        port: on this machine; 0 takes a free one.
        model: the name that requests must carry.
        fail_status: an HTTP status, for `fail_share`.
        delay: seconds before each answer; may be changed while it serves, as may `shares`.
        watch: is shown headers and body of each request.
        shares: those of FAULTS.

    Attributes:
        requests: so far.
        most_in_flight: most of them at one time.
    """

    request_queue_size = 128  # the default of 5 refuses what sixteen callers send at once
    daemon_threads = True

    def __init__(
        self,
        score: Score,
        *,
        port: int = 0,
        model: str = MODEL,
        fail_status: int = 500,
        delay: float = 0.0,
        watch: Callable[[Mapping[str, str], bytes], object] = lambda headers, body: None,
        **shares: float,
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.model, self.watch, self.delay, self.fail_status = model, watch, delay, fail_status
        self.shares = {**dict.fromkeys(FAULTS, 0.0), **shares}
        self.requests = self.most_in_flight = self._in_flight = 0
        self._score, self._known, self._scoring = score, {}, threading.Lock()
        self._dice, self._counting, self._closing = random.Random(0), threading.Lock(), threading.Event()

    def __enter__(self) -> str:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A caller that gave up is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def reply(self, headers: Mapping[str, str], body: bytes) -> tuple[int, dict] | None:
        """Status and JSON for one chat request; None drops the connection."""
        self.watch(headers, body)
        with self._counting:
            self.requests += 1
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            fate = self._dice.random()
        try:
            self._closing.wait(self.delay)
            return self._reply(body, fate)
        finally:
            with self._counting:
                self._in_flight -= 1

    def fault(self, fate: float) -> str:
        """Which of FAULTS falls on a request with that draw from [0, 1), "" for none."""
        for name, share in self.shares.items():
            fate -= share
            if fate < 0:
                return name
        return ""

    def _reply(self, body: bytes, fate: float) -> tuple[int, dict] | None:
        if fault := self.fault(fate):
            failed, garbage = (self.fail_status, _error("asked for")), (200, self._completion(GARBAGE))
            return {"fail_share": failed, "drop_share": None, "garbage_share": garbage}[fault]
        request = json.loads(body)
        if request["model"] != self.model:
            return 404, _error(f"no model {request['model']!r}, only {self.model!r}")
        *images, words = request["messages"][0]["content"]
        uris = [image["image_url"]["url"] for image in images]
        template, answer = (judge.TEMPLATE, _grade) if len(uris) == 1 else (preference.TEMPLATE, _compare)
        prompt = prompt_in(template, words["text"])
        if prompt is None:
            return 400, _error("a text that is neither judge's template")
        try:
            pictures = [_picture(uri) for uri in uris]
        except OSError as error:
            return 400, _error(f"no picture as data URI: {error}")
        keys = [(hashlib.sha256(uri.encode()).digest(), prompt) for uri in uris]
        with self._scoring:
            samples = [Sample(grammar.read(prompt), "", "", (picture,)) for picture in pictures]
            new = {key: one for key, one in zip(keys, samples, strict=True) if key not in self._known}
            self._known.update(zip(new, self._score(list(new.values())) if new else [], strict=True))
        scores = [self._known[key] for key in keys]
        if None in scores:
            return 500, _error("a picture could not be scored")
        return 200, self._completion(answer(*scores))

    def _completion(self, text: str) -> dict:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        head = {"id": "chatcmpl-miniature", "object": "chat.completion", "created": 0, "model": self.model}
        return {**head, "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer
    disable_nagle_algorithm = True
    server: JudgeServer

    def do_GET(self) -> None:
        """The list of models."""
        if self.path != "/v1/models":
            return self.send_error(404)
        self._send(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def do_POST(self) -> None:
        """A chat completion."""
        reply = self.server.reply(self.headers, self.rfile.read(int(self.headers["Content-Length"])))
        if reply is None:
            self.close_connection = True
        else:
            self._send(*reply)

    def log_message(self, *_: object) -> None:
        """Thousands of lines that nobody reads."""

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def prompt_in(template: Template, text: str) -> str | None:
    """The user's prompt that `template` was filled with to give `text`; None if it was not."""
    before, after = map(re.escape, template.text.split(SLOT))
    found = re.fullmatch(f"{before}(.*){after}", text, re.DOTALL)
    return found and found[1]


def _picture(uri: str) -> Image.Image:
    """The picture in a data URI; nothing else is ever fetched."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2]))).convert("RGB")


def _grade(score: float) -> str:
    return f"<score>{10 * score:.2f}</score> This is how sure the picture is to show what was asked for."


def _compare(first: float, second: float) -> str:
    better = "tie" if first == second else f"Image {1 if first > second else 2} is better"
    return f"<think>Image 1: {first:.4f}, Image 2: {second:.4f}.</think><answer>{better}</answer>"


def _error(message: str) -> dict:
    return {"error": {"message": message}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the miniature's ORM until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m miniature.judge_server", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080, help="%(default)s; 0 takes a free one")
    for name, meaning in FAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=0.0, help=f"of requests, {meaning}")
    parser.add_argument("--fail-status", type=int, default=500, help="%(default)s")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    options = vars(parser.parse_args(arguments))

    from rewards.orm import ORM  # here, so that tests with a score of their own need no ORM

    server = JudgeServer(ORM(WEIGHTS, device="cpu", dtype="float32"), **options)
    print(f"judge {server.model!r} at {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
