"""Rewrite prompts with a trained policy: `Reprompter("runs/mine")(["a cat on a mat"])[0].rewrite`.

No batch is padded: prompts of one exact token length are batched together. Greedy rewrites then do not depend on the
batch size but for the rounding of matrix products. In float32 that is too small to matter (the tests compare sizes
1, 3 and 8); in bfloat16 it can turn a near-tie, and a batch size of 1 is the way to be exact. A sampled rewrite is a
function of the seed and of the prompts in its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from interfaces import Prompt
from models.policy import ChatTemplate, load_policy, load_tokenizer
from prompting import messages, parse, well_formed


@dataclass(frozen=True)
class Rewrite:
    """One prompt, rewritten.

    Attributes:
        prompt: the user's own text.
        reasoning: the think block; "" if there is none or the answer could not be read.
        rewrite: what the image model is given; the user's own text if the answer could not be read.
        readable: whether the answer could be read.
        completion: the whole answer, with what the chat template writes at its head.
        prompt_tokens, completion_tokens, rewrite_tokens: lengths in the policy's tokens: of all that it read (system
            prompt and template too), of all that it wrote (end token too), of `rewrite`.
    """

    prompt: str
    reasoning: str
    rewrite: str
    readable: bool
    completion: str
    prompt_tokens: int
    completion_tokens: int
    rewrite_tokens: int


class Reprompter:
    """A policy that rewrites prompts: `Reprompter(path)(["a cat"])[0].rewrite`.

    Args:
        path: policy folder, PEFT adapter folder or hub name.
        reasoning: whether the policy was trained to think first.
        temperature: 0 is greedy; above, plain sampling (no top-k, no top-p, no repetition penalty, as in training).
        dtype, device: see `models.policy.load_policy`.
        template_kwargs: see `models.policy.load_tokenizer`; the folder of a trained policy has them in its template.

    Raises:
        UserError: the policy or its tokenizer cannot be loaded.
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
    ) -> None:
        self.reasoning = reasoning
        self.tokenizer = load_tokenizer(path, template_kwargs=template_kwargs)
        self.template = ChatTemplate(self.tokenizer, reasoning)
        self.policy = load_policy(path, dtype, device)
        self.batch_size = batch_size
        self.seed = seed
        self.end_tokens = _end_tokens(self.policy, self.tokenizer)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self.policy.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=self.end_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )

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
        """
        skip = set(skip)
        inputs = [self.template.encode(messages(text, self.reasoning)) for text in texts]
        for batch in _batches([len(ids) for ids in inputs], self.batch_size)[share[0] :: share[1]]:
            if not all(texts[i] in skip for i in batch):
                yield self._rewrite([texts[i] for i in batch], [inputs[i] for i in batch])

    def sample(self, text: str, conversation: list[dict[str, str]], count: int, temperature: float) -> list[Rewrite]:
        """`count` sampled answers to one conversation about `text`: a function of seed, conversation and count."""
        key = "/".join(turn["content"] for turn in conversation)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return self._rewrite([text] * count, [self.template.encode(conversation)] * count, key, **sampling)

    def _rewrite(self, texts: list[str], inputs: list[list[int]], key: str = "", **sampling) -> list[Rewrite]:
        ids = torch.tensor(inputs, device=self.policy.device)  # (batch, tokens), no padding
        gpus = [ids.device] if ids.is_cuda else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(_batch_seed(self.seed, [key] if key else texts))
            out = self.policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling)
        written = out[:, ids.shape[1] :].tolist()
        return [self._read(text, ids.shape[1], row) for text, row in zip(texts, written, strict=True)]

    def _read(self, text: str, prompt_tokens: int, row: list[int]) -> Rewrite:
        length = next((i + 1 for i, token in enumerate(row) if token in self.end_tokens), len(row))
        completion = self.template.whole(self.tokenizer.decode(row[:length], skip_special_tokens=True))
        answer = parse(completion, self.reasoning)
        rewrite = answer.rewrite if answer else well_formed(text)
        return Rewrite(
            prompt=text,
            reasoning=(answer.reasoning or "") if answer else "",
            rewrite=rewrite,
            readable=answer is not None,
            completion=completion,
            prompt_tokens=prompt_tokens,
            completion_tokens=length,
            rewrite_tokens=len(self.tokenizer.encode(rewrite, add_special_tokens=False)),
        )


def _end_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    of_model = policy.generation_config.eos_token_id
    ends = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of one length each, shortest first."""
    groups: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        groups.setdefault(length, []).append(position)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def _batch_seed(seed: int, texts: Sequence[str]) -> int:
    key = "/".join((str(seed), *(Prompt(text).id for text in texts)))
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)
