"""A teacher for tests: a real HTTP server that rewrites prompts, and on request refuses, truncates and fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from miniature.judge_server import JudgeServer
from prompting import completion

MODEL = "teacher"


class TeacherServer(JudgeServer):
    """Serves while the `with` block lasts. An answer is a pure function of prompt and sampling seed; faults that are
    no answers (`fail_share`, `drop_share`, `delay`, see `JudgeServer`) fall on requests in order of arrival.

    Args:
        useless: kind of useless answer -> its share of all: "refusal field", "refusal", "filter", "blocked",
            "truncated", "malformed", "lost".

    Attributes:
        answered: (prompt, sampling seed, kind) of each answer, "" for a good one.
    """

    def __init__(self, useless: Mapping[str, float] | None = None, **faults):
        super().__init__(lambda samples: [], model=MODEL, **faults)
        self.useless = dict(useless or {})
        self.answered: list[tuple[str, int, str]] = []

    def _reply(self, body: bytes, fate: float) -> tuple[int, dict] | None:
        if self.fault(fate):
            return super()._reply(body, fate)
        request = json.loads(body)
        prompt, seed = request["messages"][-1]["content"], request["seed"]
        if request["model"] != MODEL:
            return 404, {"error": {"message": f"no model {request['model']!r}"}}
        kind = self._kind(prompt, seed)
        self.answered.append((prompt, seed, kind))
        good = completion(f"Subjects: {prompt}.", f"{prompt}, soft light, version {seed}")
        text = {
            "refusal": "I'm sorry, but I can't help with that.",
            "refusal field": "",
            "filter": "<think>Sub",
            "truncated": good[:60],
            "malformed": f"Sure! Here is your prompt: {prompt}",
            "lost": completion("Something else.", "a landscape in the evening"),
        }.get(kind, good)
        if kind == "blocked":
            return 400, {"error": {"message": "the prompt was blocked", "code": "content_filter"}}
        reply = self._completion(text)
        reply["usage"] = {"prompt_tokens": 200, "completion_tokens": 50}
        choice = reply["choices"][0]
        choice["finish_reason"] = {"truncated": "length", "filter": "content_filter"}.get(kind, "stop")
        choice["message"]["refusal"] = "I won't." if kind == "refusal field" else None
        return 200, reply

    def _kind(self, prompt: str, seed: int) -> str:
        fate = int(hashlib.sha256(f"{prompt}/{seed}".encode()).hexdigest()[:8], 16) / 2**32
        for kind, share in self.useless.items():
            fate -= share
            if fate < 0:
                return kind
        return ""
