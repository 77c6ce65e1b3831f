"""Claims about a policy behind a URL, at a server of ours that answers what it is told to."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from errors import Stopped, UserError
from inference import Reprompter

GOOD = "<think>x</think><answer>a red cat</answer>"


@pytest.fixture
def served():
    """Starts a server; `answer(text)` gives (status, body) for each request's last message."""
    servers = []

    def start(answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = answer(asked["messages"][-1]["content"])
                body = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()


def reply(message: dict, usage: object = None) -> dict:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    given = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14} if usage is None else usage
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": given}


@pytest.mark.parametrize(
    "message",
    [
        {"content": GOOD},
        {"content": "<answer>a red cat</answer>", "reasoning_content": "x"},
        {"content": "x</think><answer>a red cat</answer>"},  # its template wrote the opening
    ],
)
def test_an_answer_is_read_wherever_the_server_puts_its_reasoning(served, message):
    (found,) = Reprompter("m", url=served(lambda text: (200, reply(message))))(["a cat"])
    assert (found.readable, found.rewrite, found.reasoning, found.completion_tokens) == (True, "a red cat", "x", 5)


@pytest.mark.parametrize("usage", [{}, "x", {"prompt_tokens": None, "completion_tokens": "7"}])
def test_odd_usage_costs_no_answer(served, usage):
    (found,) = Reprompter("m", url=served(lambda text: (200, reply({"content": GOOD}, usage))))(["a cat"])
    assert found.rewrite == "a red cat"


@pytest.mark.parametrize("content", [5, [{"type": "text", "text": GOOD}], None, "no tags"])
def test_an_answer_that_cannot_be_read_falls_back_to_the_users_words(served, content):
    (found,) = Reprompter("m", url=served(lambda text: (200, reply({"content": content}))))(["a cat"])
    assert (found.readable, found.rewrite) == (False, "a cat")


def test_a_prompt_that_is_refused_is_counted_and_the_others_are_answered(served):
    def answer(text):
        return (400, {"error": "content filter"}) if "bad" in text else (200, reply({"content": GOOD}))

    found = Reprompter("m", url=served(answer))(["a cat", "a bad dog", "a cow"])
    assert [one.rewrite for one in found] == ["a red cat", "a bad dog", "a red cat"]


@pytest.mark.parametrize(
    "answer", [(404, {}), (401, {}), (200, "<html>"), (200, {"choices": []}), (200, "[" * 99_999)]
)
def test_what_is_no_chat_api_is_named_before_anything_is_asked(served, answer):
    with pytest.raises(UserError, match="127.0.0.1"):
        Reprompter("m", url=served(lambda text: answer))


def test_a_server_that_dies_stops_the_run_and_what_came_before_is_kept(served):
    def answer(text):
        return (404, {}) if text == "last" else (200, reply({"content": GOOD}))

    stream = Reprompter("m", 1, url=served(answer)).stream(["a cat", "last"])
    assert next(stream)[0].rewrite == "a red cat"
    with pytest.raises(Stopped, match="kept"):
        next(stream)
