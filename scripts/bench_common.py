"""What the benchmarks of scripts/bench.py share: clock, memory, table, and the plain loop to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from interfaces import Prompt, Renderer, Reward, Sample
from prompting import parse
from rewards import RewardOptions
from run.seeds import render_seed

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = yaml.safe_load((ROOT / "configs" / "miniature.yaml").read_text(encoding="utf-8"))
MINIATURE_REWARDS = RewardOptions(
    **{f"{name}_path": str(ROOT / MINIATURE[f"{name}_path"]) for name in ("hps", "git", "gdino", "orm")}
)


def measure(work: Callable[[], object], device: torch.device | str = "cpu") -> dict[str, float | None]:
    """Seconds of a call, and the most memory that its tensors had, in 10^9 bytes (None on a CPU)."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None}


def table(rows: Sequence[Mapping]) -> str:
    """Lines for a terminal: a column per key, "-" where a row lacks it, at the end why a row was skipped."""
    first, *others = dict.fromkeys(key for row in rows for key in row if key != "skipped")
    lines = [f"{first:28s}" + "".join(f"{key:>13s}" for key in others)]
    for row in rows:
        cells = ["-" if row.get(key) is None else f"{row[key]:.4g}" for key in others]
        reason = f"  skipped: {row['skipped']}" if "skipped" in row else ""
        lines.append(f"{row[first]:28s}" + "".join(f"{cell:>13s}" for cell in cells) + reason)
    return "\n".join(lines)


def plain_loop(
    renderer: Renderer, rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence[str]
) -> float:
    """Seconds to draw and score rollout by rollout; each image reward draws the picture again for itself."""
    started = time.perf_counter()
    for prompt, completion in zip(tqdm(prompts, desc="plain loop", leave=False), completions, strict=True):
        answer = parse(completion)
        for reward in rewards:
            images = ()
            if reward.needs_images and answer is not None:
                images = tuple(renderer([answer.rewrite], [render_seed(0, prompt.id, 1, 0)]))
            if not reward.needs_images or images:
                reward([Sample(prompt, completion, answer.rewrite if answer else None, images)])
    return time.perf_counter() - started
