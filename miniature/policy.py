"""The miniature's policies: `weights/instruct`, what a Qwen-Instruct is to the real recipe, and `weights/policy`.

The first reads wishes and writes layouts, follows the chat template, mostly keeps to the form it is told and seldom to
the content. The second is the first after the one cold start of the house: examples by `scripts/make_sft.py`, trained
by `sft.py`, run here as a user would run them.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys

import torch
from torch import nn

from data.grammar import TASKS
from interfaces import Prompt
from miniature import world
from miniature.fit import CACHE, ROOT, WEIGHTS, byte_level_bpe, fit
from prompting import DIRECT_PROMPT, SYSTEM_PROMPT, completion, messages

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_TEXT = {"tokenize": False, "add_generation_prompt": True}
POLICY_FILES = (
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
CARELESS = 0.15  # share of the instruct model's lessons whose content is right
LOOSE = 0.25  # share of its lessons that are not in the form that was asked for


def build_instruct(reading_steps: int = 700, chat_steps: int = 300) -> None:
    """Qwen2ForCausalLM: a language of wishes and good answers, then chats whose answers are often loose or wrong."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    _, held_out = world.splits()
    forbidden = {prompt.text for prompt in held_out}
    tokenizer = bpe_tokenizer()
    policy = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
            initializer_range=0.09,  # 1 / sqrt(width); with a large model's 0.02 no colour was copied in 1,600 steps
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip

    def wish(rng: random.Random) -> Prompt:
        prompt = world.request(rng.choice(TASKS), rng)
        return wish(rng) if prompt.text in forbidden else prompt

    def reading(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        prompts = [wish(rng) for _ in range(64)]
        texts = [f"{prompt.text}\n{_answer(prompt, rng, 1.0, rng.random() < 0.5)}" for prompt in prompts]
        both = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
        return policy(**both, labels=both.input_ids.masked_fill(both.attention_mask == 0, -100)).loss

    def chatting(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        asked, answers = [], []
        for _ in range(32):
            prompt, reasoning = wish(rng), rng.random() < 0.5
            asked.append(tokenizer.apply_chat_template(messages(prompt.text, reasoning), **AS_TEXT))
            answers.append(_chat(prompt, rng, reasoning) + tokenizer.eos_token)
        both = tokenizer([q + a for q, a in zip(asked, answers, strict=True)], padding=True, return_tensors="pt")
        width = both.input_ids.shape[1]
        start = width - both.attention_mask.sum(1) + torch.tensor([len(ids) for ids in tokenizer(asked).input_ids])
        labels = both.input_ids.masked_fill(torch.arange(width) < start[:, None], -100)  # padding is on the left
        return policy(**both, labels=labels).loss

    modules = nn.ModuleDict({"policy": policy})
    fit("policy_reading", modules, reading, steps=reading_steps, lr=2e-3)
    fit("policy_instruct", modules, chatting, steps=chat_steps, lr=1e-3)
    policy.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    policy.save_pretrained(WEIGHTS / "instruct")
    tokenizer.save_pretrained(WEIGHTS / "instruct")


def build_policy() -> None:
    """The cold start as a user runs it: `scripts/cold_start.sh`, seed 0."""
    run = CACHE / "cold_start"
    here = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["scripts/cold_start.sh", str(run), "0"], cwd=ROOT.parent, env=here, check=True)
    for name in POLICY_FILES:
        shutil.copy(run / name, WEIGHTS / "policy" / name)


def _answer(prompt: Prompt, rng: random.Random, skill: float, reasoning: bool) -> str:
    thought, rewrite = world.lesson(prompt, rng, skill)
    return completion(thought if reasoning else None, rewrite)


def _chat(prompt: Prompt, rng: random.Random, reasoning: bool) -> str:
    """An answer in the form asked for, or a loose one: no tags, or the other form, or a word before it."""
    thought, rewrite = world.lesson(prompt, rng, CARELESS)
    good = completion(thought if reasoning else None, rewrite)
    if rng.random() >= LOOSE:
        return good
    return rng.choice((rewrite, completion(None if reasoning else thought, rewrite), f"Subjects: {good}"))


def bpe_tokenizer():
    """Both policies' tokenizer, with its chat template."""
    rng = random.Random("bpe")
    texts = [SYSTEM_PROMPT, DIRECT_PROMPT] * 200
    for task in TASKS:
        prompts = [world.request(task, rng) for _ in range(500)]
        texts += [f"{prompt.text}\n{completion(*world.lesson(prompt, rng, 0.5))}" for prompt in prompts]
    return byte_level_bpe(texts, 768, (), chat_template=CHAT_TEMPLATE)
