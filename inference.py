"""Rewrite prompts with a trained policy: `Reprompter("runs/mine")(["a cat on a mat"])[0].rewrite`.

A batch holds prompts of about one length, padded on the left. Greedy rewrites do not depend on the batch but for the
rounding of matrix products: in float32 that is too small to matter (the tests compare sizes 1, 3 and 8); in bfloat16
it can turn a near-tie, and a batch size of 1 is the way to be exact. A sampled rewrite is a function of the seed and
of the prompts in its batch; behind `url` it is the server's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from openai.types.chat import ChatCompletion
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.generation import BaseStreamer

from clients.chat import ChatClient
from clients.http import CallFailed, run_async
from errors import Stopped
from interfaces import Prompt
from models.policy import ChatTemplate, Conversation, load_policy, load_tokenizer
from prompting import messages, parse, well_formed

logger = logging.getLogger(__name__)

REFUSED = (400, 413, 422)  # of one prompt, which says nothing against the others
TOKENS = ("prompt_tokens", "completion_tokens")  # of a server's usage


@dataclass(frozen=True)
class Rewrite:
    """One prompt, rewritten.

    Attributes:
        prompt: the user's own text.
        reasoning: the think block; "" if there is none or the answer could not be read.
        rewrite: what the image model is given; the user's own text if the answer could not be read.
        readable: whether the answer could be read.
        completion: the whole answer, with what the chat template writes at its head.
        prompt_tokens, completion_tokens: lengths in the policy's tokens: of all that it read (system prompt and
            template too), of all that it wrote (end token too).
    """

    prompt: str
    reasoning: str
    rewrite: str
    readable: bool
    completion: str
    prompt_tokens: int
    completion_tokens: int


class Reprompter:
    """A policy that rewrites prompts: `Reprompter(path)(["a cat"])[0].rewrite`.

    Args:
        path: policy folder, PEFT adapter folder or hub name; with `url` the policy's name there.
        batch_size: prompts rewritten at once.
        temperature: 0 is greedy; above, plain sampling (no top-k, no top-p, no repetition penalty, as in training).
        dtype, device: see `models.policy.load_policy`.
        reasoning: whether the policy was trained to think first.
        template_kwargs: see `models.policy.load_tokenizer`; the folder of a trained policy has them in its template.
        exact: batch only prompts of exactly one length, so that no batch is padded; without it batches are full.
        url: base of an OpenAI-compatible API that serves the policy ("http://127.0.0.1:8000/v1"), in place of loading
            it; the key is POLICY_API_KEY. dtype, device, template_kwargs and exact are then the server's.

    Raises:
        UserError: the policy or its tokenizer cannot be loaded, or the API does not answer.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        dtype: str = "auto",
        device: str = "auto",
        reasoning: bool = True,
        template_kwargs: Mapping[str, Any] | str | None = None,
        exact: bool = False,
        url: str | None = None,
    ) -> None:
        self.reasoning, self.temperature, self.seed = reasoning, temperature, seed
        if url is None:
            self.policy = LocalPolicy(
                path, batch_size, max_new_tokens, dtype, device, reasoning, template_kwargs, exact
            )
        else:
            self.policy = ServedPolicy(url, path, batch_size, max_new_tokens)

    def __call__(self, texts: Sequence[str]) -> list[Rewrite]:
        """Rewrite `texts`; one Rewrite each, in their order. A text that comes twice is rewritten once."""
        done = {rewrite.prompt: rewrite for batch in self.stream(list(dict.fromkeys(texts))) for rewrite in batch}
        return [done[text] for text in texts]

    def stream(
        self, texts: Sequence[str], skip: Iterable[str] = (), share: tuple[int, int] = (0, 1)
    ) -> Iterator[list[Rewrite]]:
        """Rewrite distinct `texts` batch by batch, shortest first; a batch wholly in `skip` is left out.

        The batches are those of a run that skips nothing and has no other process, so that a continued or a shared run
        samples what it would have sampled.

        Args:
            share: (i, n): only every n-th batch, from the i-th on.

        Raises:
            Stopped: the server no longer answers; what was yielded is not lost.
        """
        skip = set(skip)
        inputs = [self.policy.encode(messages(text, self.reasoning)) for text in texts]
        for batch in self.policy.batches(inputs)[share[0] :: share[1]]:
            if not all(texts[i] in skip for i in batch):
                some = [texts[i] for i in batch]
                seed = _seed(self.seed, [Prompt(text).id for text in some])
                yield self._rewrite(some, [inputs[i] for i in batch], seed, self.temperature)

    def typed(self, text: str) -> Iterator[Rewrite]:
        """Rewrite one text: what there is of its answer, again and again while it is written; at last all of it."""
        encoded, seed = self.policy.encode(messages(text, self.reasoning)), _seed(self.seed, [Prompt(text).id])
        for written in self.policy.typed(encoded, seed, self.temperature):
            yield self._read(text, written)

    def sample(self, text: str, conversation: Conversation, count: int, temperature: float) -> list[Rewrite]:
        """`count` sampled answers to one conversation about `text`: a function of seed, conversation and count."""
        seed = _seed(self.seed, [Prompt("/".join(turn["content"] for turn in conversation)).id])
        return self._rewrite([text] * count, [self.policy.encode(conversation)] * count, seed, temperature)

    def _rewrite(self, texts: list[str], inputs: list[Any], seed: int, temperature: float) -> list[Rewrite]:
        written = self.policy.write(inputs, seed, temperature)
        return [self._read(text, one) for text, one in zip(texts, written, strict=True)]

    def _read(self, text: str, written: Written) -> Rewrite:
        answer = parse(written.text, self.reasoning)
        return Rewrite(
            prompt=text,
            reasoning=(answer.reasoning or "") if answer else "",
            rewrite=answer.rewrite if answer else well_formed(text),
            readable=answer is not None,
            completion=written.text,
            prompt_tokens=written.prompt_tokens,
            completion_tokens=written.tokens,
        )


class Written(NamedTuple):
    """What a policy wrote, and the tokens that it read and wrote."""

    text: str
    prompt_tokens: int
    tokens: int


class LocalPolicy:
    """A policy in this process; for its arguments see `Reprompter`."""

    def __init__(
        self, path: str, batch_size: int, max_new_tokens: int, dtype: str, device: str, reasoning: bool,
        template_kwargs: Mapping[str, Any] | str | None, exact: bool,
    ) -> None:  # fmt: skip
        self.tokenizer = load_tokenizer(path, template_kwargs=template_kwargs)
        self.template = ChatTemplate(self.tokenizer, reasoning)
        self.model = load_policy(path, dtype, device)
        self.batch_size, self.max_new_tokens, self.exact = batch_size, max_new_tokens, exact
        self.end_tokens = _end_tokens(self.model, self.tokenizer)

    def encode(self, conversation: Conversation) -> list[int]:
        """The tokens that it reads before it answers."""
        return self.template.encode(conversation)

    def batches(self, inputs: Sequence[list[int]]) -> list[list[int]]:
        """Positions in batches, shortest first."""
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        groups: dict[int, list[int]] = {}
        for i in order:
            groups.setdefault(len(inputs[i]) if self.exact else 0, []).append(i)
        size = self.batch_size
        return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]

    def typed(self, ids: list[int], seed: int, temperature: float) -> Iterator[Written]:
        """Its answer to one input while it is written, and at last whole."""
        words, text = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True), ""
        with ThreadPoolExecutor(1) as worker:
            answer = worker.submit(self.write, [ids], seed, temperature, words)
            answer.add_done_callback(lambda _: words.end())  # even if it failed
            for word in words:
                text += word
                yield Written(self.template.whole(text), len(ids), 0)
            yield from answer.result()

    def write(
        self, inputs: Sequence[list[int]], seed: int, temperature: float, streamer: BaseStreamer | None = None
    ) -> list[Written]:
        """Its answers; a `streamer` is shown the tokens of a single one as they come."""
        width = max(map(len, inputs))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in inputs], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=self.model.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, repetition_penalty=1.0, eos_token_id=self.end_tokens, pad_token_id=pad,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            torch.manual_seed(seed)
            out = self.model.generate(input_ids=ids, attention_mask=mask, streamer=streamer)
        rows = out[:, width:].tolist()
        return [self._read(len(asked), row) for asked, row in zip(inputs, rows, strict=True)]

    def _read(self, prompt_tokens: int, row: list[int]) -> Written:
        length = next((i + 1 for i, token in enumerate(row) if token in self.end_tokens), len(row))
        written = self.tokenizer.decode(row[:length], skip_special_tokens=True)
        return Written(self.template.whole(written), prompt_tokens, length)


class ServedPolicy:
    """A policy behind an OpenAI-compatible API: vLLM, transformers serve, llama.cpp, ..."""

    def __init__(self, url: str, model: str, batch_size: int, max_new_tokens: int) -> None:
        self.client = ChatClient("policy", url, model, concurrency=batch_size)
        self.max_new_tokens = max_new_tokens
        self.try_it()

    def try_it(self) -> None:
        """One token, asked for once, so that a wrong address, key or name is known before anything is written.

        Raises:
            UserError: it did not answer.
        """

        async def ask() -> None:
            async with self.client.connect() as complete:
                await complete([{"role": "user", "content": "a cat"}], max_tokens=1, temperature=0)

        attempts, self.client.attempts = self.client.attempts, 1
        try:
            run_async(ask())
        except CallFailed as error:
            raise self.client.unusable(error) from error
        self.client.attempts = attempts

    def encode(self, conversation: Conversation) -> Conversation:
        """The server has the template."""
        return conversation

    def batches(self, inputs: Sequence[Conversation]) -> list[list[int]]:
        """Positions in parts, after each of which nothing is lost."""
        size = self.client.concurrency
        return [list(range(len(inputs)))[first : first + size] for first in range(0, len(inputs), size)]

    def typed(self, conversation: Conversation, seed: int, temperature: float) -> Iterator[Written]:
        """Its answer to one input, whole at once."""
        yield from self.write([conversation], seed, temperature)

    def write(self, inputs: Sequence[Conversation], seed: int, temperature: float) -> list[Written]:
        """Its answers; each has a seed of its own.

        Raises:
            Stopped: a call failed for good.
        """
        sampling = {"top_p": 1.0} if temperature > 0 else {}

        async def ask(complete: Callable[..., Awaitable[ChatCompletion]], number: int) -> Written:
            seeded = {"seed": (seed + number) % 2**31, "max_tokens": self.max_new_tokens, **sampling}
            try:
                return _read_reply(await complete(inputs[number], temperature=temperature, **seeded))
            except CallFailed as error:
                if error.status not in REFUSED:
                    raise
                logger.warning("a prompt is refused, its answer counts as unreadable: %s", error)
                return Written("", 0, 0)

        async def ask_all() -> list[Written]:
            async with self.client.connect() as complete, asyncio.TaskGroup() as calls:
                asked = [calls.create_task(ask(complete, number)) for number in range(len(inputs))]
            return [call.result() for call in asked]

        try:
            return run_async(ask_all())
        except ExceptionGroup as failed:
            one = failed.exceptions[0]
            if not isinstance(one, CallFailed):
                raise
            raise Stopped(f"policy at {self.client.url}: {one}; what was rewritten is kept: run it again") from one


def _read_reply(reply: ChatCompletion) -> Written:
    """With the think block back in its place, if the server took it out or its template opened it."""
    message, usage = reply.choices[0].message, reply.usage
    more = message.model_extra or {}
    text, thought = message.content, more.get("reasoning_content") or more.get("reasoning")
    if not isinstance(text, str):  # the SDK does not check what it was sent
        text = ""
    if isinstance(thought, str) and thought:
        text = f"<think>{thought}</think>\n{text}"
    elif "</think>" in text and "<think>" not in text:
        text = f"<think>\n{text}"
    counts = [vars(usage).get(name) if usage and not isinstance(usage, str) else 0 for name in TOKENS]
    return Written(text, *(count if isinstance(count, int) else 0 for count in counts))


def _end_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    of_model = policy.generation_config.eos_token_id
    ends = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})


def _seed(seed: int, ids: Sequence[str]) -> int:
    return int(hashlib.sha256("/".join((str(seed), *ids)).encode()).hexdigest()[:15], 16)
