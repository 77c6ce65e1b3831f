"""How fast is what a run does? On the miniature, and on the real shapes with random weights.

    python scripts/bench.py --target cpu        a rollout against a plain loop, in one run
    python scripts/bench.py --target gpu        real shapes, random weights: scripts/bench_gpu.py
    python scripts/bench.py --target levers     each lever of the renderer: scripts/bench_levers.py
    python scripts/bench.py --target flow       pref_grpo.py against the published loop: scripts/bench_own.py
    python scripts/bench.py --target janus      t2i_r1.py against the published loop: scripts/bench_own.py

A rollout: write a completion, draw it, score it with the rewards of configs/miniature.yaml. Both sides get the same
completions, sampled in batches as TRL does. The plain loop takes them one by one, as RePrompt and T2I-R1 do: each
image reward draws the rewrite again for itself and scores that picture. The trainer's `Scorer` draws each distinct
(rewrite, seed) once, in batches, for all rewards. `ratio_to_plain_loop` compares drawing and scoring;
`ratio_with_generation` adds the sampling, which both sides share.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data.prompts import load_prompts
from inference import LocalPolicy
from interfaces import Prompt
from miniature import build as miniature
from prompting import messages
from rewards import RewardContext, build
from run.options import option, parse, run_main
from scoring.drawing import Drawer
from scoring.rollouts import Scorer
from scripts.bench_common import MINIATURE, MINIATURE_REWARDS, ROOT, measure, plain_loop, table
from scripts.bench_gpu import SCALES, bench_gpu
from scripts.bench_levers import bench_levers
from scripts.bench_own import bench_flow, bench_janus, bench_real

BATCH = 128  # completions in one call of `generate`, as in the miniature's run


@dataclass
class BenchOptions:
    """What is measured."""

    target: str = option(help="What to measure.", changes="run", choices=["cpu", "gpu", "levers", "flow", "janus"])
    json: str | None = option(None, "Write the figures to this file too.", changes="nothing")
    prompts: int = option(16, "cpu, flow, janus: prompts, one group each.", changes="run", least=1)
    group: int = option(8, "cpu, flow, janus: completions or pictures a prompt.", changes="run", least=2)
    minutes: float = option(8.0, "gpu, levers: what would take longer is left out.", changes="run", above=0)
    scale: str | None = option(
        None, "Real shapes or the miniature; unset: real for gpu, tiny for levers, the published loop for the others.",
        changes="run", choices=["real", "tiny"],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("bench", lambda: bench(*parse([BenchOptions], None, sys.argv[1:] if argv is None else argv)))


def bench(options: BenchOptions) -> None:
    """Measure one target and print its figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "cpu": lambda: bench_cpu(options.prompts, options.group),
        "gpu": lambda: bench_gpu(SCALES[options.scale or "real"], options.minutes, device),
        "levers": lambda: bench_levers(options.scale or "tiny", options.minutes, device),
        "flow": lambda: bench_flow(options.prompts, options.group),
        "janus": lambda: bench_janus(options.prompts, options.group),
    }[options.target]
    if options.target in ("flow", "janus") and options.scale:
        found = partial(bench_real, options.target, SCALES[options.scale], device)
    found = found()
    if options.json is not None:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    rows = found.pop("rows", [])
    for key, value in found.items():
        print(f"{key:28s} {value:.4f}" if isinstance(value, float) else f"{key:28s} {value}")
    if rows:
        print(table(rows))


def bench_cpu(groups: int, group: int) -> dict:
    """Seconds per rollout and phase, the ratios to the plain loop, and the peak of memory."""
    prompts = random.Random(0).sample(load_prompts(ROOT / MINIATURE["data"]), groups)
    asked = [prompt for prompt in prompts for _ in range(group)]
    renderer = miniature.renderer()
    rewards = build(MINIATURE["rewards"], MINIATURE_REWARDS, RewardContext(renderer=renderer, prompts=prompts))
    scorer = Scorer(Drawer(renderer, group=group), rewards, {prompt.id: prompt for prompt in prompts})
    completions, generating = _sample(asked)
    ids = [prompt.id for prompt in asked]
    scorer.score(completions[:group], ids[:group], 1)  # warm up, off the clock
    scorer.score(completions, ids, 1)
    seconds = {"generate": generating, **{name: scorer.metrics[f"seconds/{name}"] for name in ("render", "score")}}
    rollouts, total = len(asked), sum(seconds.values())
    one_by_one = miniature.renderer(render_batch_size=1)
    plain_loop(one_by_one, rewards, asked[:1], completions[:1])  # warm up, off the clock
    plain = plain_loop(one_by_one, rewards, asked, completions)
    return {
        "rollouts": rollouts,
        "threads": torch.get_num_threads(),
        "distinct_pictures": int(scorer.metrics["images/drawn"]),
        **{f"{phase}_s_per_rollout": value / rollouts for phase, value in seconds.items()},
        "s_per_rollout": total / rollouts,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "plain_loop_s_per_rollout": plain / rollouts,
        "ratio_to_plain_loop": plain / (total - generating),
        "ratio_with_generation": (generating + plain) / total,
    }


def _sample(asked: Sequence[Prompt]) -> tuple[list[str], float]:
    """One sampled completion per prompt, in batches as TRL makes them, and the seconds that it took."""
    path, length = str(ROOT / MINIATURE["gpt_path"]), MINIATURE["max_completion_length"]
    policy = LocalPolicy(path, BATCH, length, "float32", "auto", True, None, False)
    texts, seconds = [], 0.0
    for first in range(0, len(asked), BATCH):
        ids, out = [policy.encode(messages(prompt.text)) for prompt in asked[first : first + BATCH]], []
        seconds += measure(lambda ids=ids, out=out: out.extend(policy.write(ids, 0, 1.0)))["seconds"]
        texts += [written.text for written in out]
    return texts, seconds


if __name__ == "__main__":
    sys.exit(main())
