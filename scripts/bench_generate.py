"""`scripts/bench.py --target generate`: the ways in which TRL samples without vLLM, on the miniature's policy.

Each is a set of TRL's own options; all write the same number of rollouts of the same prompts. Seconds are the median
of 3 after one that warms up. "tokens" counts what was written up to each row's end, padding left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch
import yaml
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from data.prompts import load_prompts
from inference import Reprompter
from prompting import messages
from scripts.bench import ROOT

WAYS = {  # name -> TRL's options
    "default, a cache that grows": {},
    "cache_implementation: static": {"cache_implementation": "static"},
    "use_transformers_continuous_batching": {"use_transformers_continuous_batching": True},
    "dtype: bfloat16": {"dtype": "bfloat16"},
}


def bench_generate(groups: int, group: int) -> dict:
    """Seconds and tokens a second of each way, as plain data."""
    options = yaml.safe_load((ROOT / "configs" / "miniature.yaml").read_text(encoding="utf-8"))
    prompts = random.Random(0).sample(load_prompts(ROOT / options["data"]), groups)
    asked = [messages(prompt.text) for prompt in prompts for _ in range(group)]
    rows = []
    for name, way in tqdm(WAYS.items(), desc="ways", leave=False):
        write = _writer(ROOT / options["gpt_path"], asked, options["max_completion_length"], way)
        try:
            write()
            found = sorted(write() for _ in range(3))[1]
        except (ValueError, RuntimeError, ImportError) as error:
            rows.append({"name": name, "seconds": None, "tokens_per_s": None, "skipped": " ".join(str(error).split())})
            continue
        rows.append({"name": name, "seconds": found[0], "tokens_per_s": found[1] / found[0], "skipped": ""})
    return {"target": "generate", "rollouts": len(asked), "threads": torch.get_num_threads(), "rows": rows}


def _writer(path: object, asked: Sequence[list[dict]], length: int, way: dict) -> Callable[[], tuple[float, int]]:
    """What samples once, and returns its seconds and tokens."""
    made = Reprompter(str(path), max_new_tokens=length, temperature=1.0, dtype=way.get("dtype", "float32"))
    tokenizer, model = made.tokenizer, made.policy
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(
        max_new_tokens=length, do_sample=True, cache_implementation=way.get("cache_implementation"), **ends
    )

    def together() -> tuple[float, int]:
        batch = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        torch.manual_seed(0)
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**batch.to(model.device), generation_config=config)
        seconds = time.perf_counter() - started
        return seconds, int((out[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())

    def continuously() -> tuple[float, int]:
        rows = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in asked]
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate_batch(
                rows, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(),
                progress_bar=False,
            )  # fmt: skip
        return time.perf_counter() - started, sum(len(one.generated_tokens) for one in out.values())

    return continuously if "use_transformers_continuous_batching" in way else together


def table(rows: Sequence[dict]) -> str:
    """Lines for a terminal."""
    lines = [f"{'way':42s}{'s':>9s}{'tokens/s':>11s}"]
    for row in rows:
        figures = f"{row['seconds']:9.2f}{row['tokens_per_s']:11.0f}" if not row["skipped"] else f"  {row['skipped']}"
        lines.append(f"{row['name']:42s}{figures}")
    return "\n".join(lines)
