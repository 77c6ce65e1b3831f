"""What TRL's asynchronous trainer needs and a machine without GPU has not, in its place and no more; the rest is real.

vLLM               a server that samples with transformers and answers /v1/completions as vLLM does
NCCL               weights are copied into that server, which lives in the trainer's process
aiohttp            the worker's HTTP client is the standard library's
FlashAttention-3   the same attention in plain torch
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import async_grpo_trainer, async_rollout_worker, packing

CALLS = 32  # of the worker in flight
async_rollout_worker._RETRYABLE_HTTP_ERRORS = (
    OSError,
)  # in the worker too, which imports this file; TRL has aiohttp's


class PolicyServer(ThreadingHTTPServer):
    """Samples completions while the `with` block lasts.

    Attributes:
        updates: how often it has been given weights.
        hidden: what CUDA_VISIBLE_DEVICES was in the processes that asked.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.turn, self.updates, self.hidden = threading.Lock(), 0, set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> PolicyServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @torch.inference_mode()
    def complete(self, asked: dict) -> dict:
        """One completion: its tokens, the last of which ends it, and their log probabilities after temperature."""
        generator = torch.Generator().manual_seed(asked["seed"])
        ids, past, tokens, log_probs = torch.tensor([asked["prompt"]]), None, [], []
        while len(tokens) < asked["max_tokens"] and self.model.config.eos_token_id not in tokens:
            out = self.model(ids, past_key_values=past, use_cache=True)
            all_V = torch.log_softmax(out.logits[0, -1] / asked["temperature"], dim=-1)
            tokens.append(int(torch.multinomial(all_V.exp(), 1, generator=generator)))
            log_probs.append(float(all_V[tokens[-1]]))
            ids, past = torch.tensor([tokens[-1:]]), out.past_key_values
        return {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": log_probs}}]}

    @torch.inference_mode()
    def update(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        with self.turn:
            mine = dict(self.model.named_parameters())
            for name, tensor in weights:
                mine[name].copy_(tensor)
            self.updates += 1


class _Handler(BaseHTTPRequestHandler):
    server: PolicyServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.hidden.add(asked["hidden"])
        with self.server.turn:
            reply = json.dumps(self.server.complete(asked)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


class Loop(async_rollout_worker._AsyncRolloutLoop):
    """TRL's loop in its spawned worker, but for the HTTP client."""

    async def _run_loops(self, stop_event: asyncio.Event) -> None:
        self.calls = ThreadPoolExecutor(CALLS)
        await asyncio.gather(self._generate_loop(stop_event=stop_event), self._score_loop(stop_event=stop_event))

    async def _post(self, path: str, payload: dict, timeout: float, max_retries: int = 3) -> dict:
        body = json.dumps({**payload, "hidden": os.environ["CUDA_VISIBLE_DEVICES"]}).encode()
        return await asyncio.get_running_loop().run_in_executor(self.calls, _ask, self.vllm_server_url + path, body)


def _ask(url: str, body: bytes) -> dict:
    with urllib.request.urlopen(urllib.request.Request(url, body)) as reply:
        return json.load(reply)


class Attention:
    """`flash_attn_varlen_func` of FlashAttention-3, as TRL's packing calls it."""

    @staticmethod
    def flash_attn_varlen_func(q, k, v, starts_q, starts_k, most_q, most_k, *, softmax_scale, causal, window_size):
        """Each segment's queries (T, heads, D) see its path's keys (K, key heads, D) up to their own place."""
        assert causal and window_size == (-1, -1)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        outs = []
        for (q0, q1), (k0, k1) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * softmax_scale
            later = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(diagonal=k1 - k0 - (q1 - q0) + 1)
            outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v[k0:k1]))
        return torch.cat(outs)


def stand_in(monkeypatch, server: PolicyServer) -> None:
    """Let TRL's trainer and worker meet these instead."""

    class Transfer:
        def __init__(self, **_: object):
            self.init_weight_transfer = self.pause = self.resume = self.destroy = lambda: None
            self.send_weights = server.update

    monkeypatch.setattr(async_grpo_trainer, "WeightTransferClient", Transfer)
    monkeypatch.setattr(async_rollout_worker, "is_vllm_available", lambda: True)
    monkeypatch.setattr(async_rollout_worker, "is_aiohttp_available", lambda: True)
    monkeypatch.setattr(async_rollout_worker.AsyncRolloutWorker, "_loop_cls", Loop)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    monkeypatch.setattr(packing, "_flash_attn", lambda: Attention)
