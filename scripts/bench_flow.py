"""The rollouts and updates of pref_grpo.py against the published loop, in one run: `bench.py --target flow`.

All draw the same groups of the miniature with 25 steps, of which 14 drawn at random are random and trained, and score
them with the same rewards. The published loop (Pref-GRPO's code) takes picture by picture: it encodes the text again,
decodes, scores when all are there, and trains one step of one picture at a time. Ours takes 32 at once. Two more
columns are ours with a sliding window of 4 steps, and with DiffusionNFT, which needs no path.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from pathlib import Path

import torch

import pref_grpo
from group_training import Batch
from pref_grpo import PrefGRPO
from run.heartbeat import Heartbeat
from run.loop import Loop
from scoring.judge import Judged
from scripts.bench_common import ROOT

STEPS = 3  # of ours; the first warms up
BATCH = 32  # pictures at once, at most
PUBLISHED = "--render_steps 25 --loss grpo --sde_window random --sde_steps 14"


def bench_flow(prompts: int, group: int) -> dict:
    """Rows of seconds a picture by phase, the ratio, and the peak of memory after each of our steps."""
    batch = math.gcd(BATCH, prompts * group)
    sides = {
        "published": f"{PUBLISHED} --render_batch_size 1",
        "ours": f"{PUBLISHED} --render_batch_size {batch}",
        "window of 4": f"{PUBLISHED} --sde_window sliding --sde_steps 4 --render_batch_size {batch}",
        "nft": f"--render_steps 25 --render_batch_size {batch}",
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in sides.items():
            found[name], memory = _side(Path(folder, name), prompts, group, words)
    rows = [{"phase": phase, **{name: found[name][phase] for name in sides}} for phase in found["ours"]]
    ratios = {name: found["published"]["all"] / seconds["all"] for name, seconds in found.items()}
    rows.append({"phase": "times the published speed", **ratios})
    return {"pictures": prompts * group, "threads": torch.get_num_threads(), "peak_memory_mib": memory, "rows": rows}


def _side(folder: Path, count: int, group: int, words: str) -> tuple[dict[str, float], str]:
    """Seconds a picture by phase of one side, and its peaks of memory."""
    config = ["--config", str(ROOT / "configs" / "miniature_flow.yaml"), "--outdir", str(folder)]
    options = pref_grpo.parse_options(
        [*config, *words.split(), "--prompts_per_step", str(count), "--num_generations", str(group)]
    )
    setup, renderer = pref_grpo.prepare(options)
    method = PrefGRPO(options, setup, renderer)
    loop = Loop(
        setup.accelerator, setup.folder, setup.resume, Heartbeat(folder, 0, 600), total=STEPS, save_every=STEPS,
        model=renderer.denoiser,
    )  # fmt: skip
    is_plain, peaks, found = options.render.render_batch_size == 1, [], {}
    for step in range(1, 2 if is_plain else STEPS + 1):
        found = _plain(method, step, loop) if is_plain else _ours(method, step, loop)
        peaks.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")
    loop.heartbeat.close()
    each = {phase: seconds / (count * group) for phase, seconds in found.items()}
    return {**each, "all": sum(each.values())}, ", ".join(peaks)


def _ours(method: PrefGRPO, step: int, loop: Loop) -> dict[str, float]:
    batch = method.rollout(step, loop.heartbeat)
    started = time.perf_counter()
    advantages, _ = method.advantages(batch.judged.parts)
    method.update(step, batch, torch.tensor(advantages, dtype=torch.float32), loop)
    seconds = {name.removeprefix("seconds/"): value for name, value in batch.seconds.items()}
    return {**seconds, "train": time.perf_counter() - started}


def _plain(method: PrefGRPO, step: int, loop: Loop) -> dict[str, float]:
    method.renderer._encoded = {}  # as `LocalRenderer` has it: forgotten after each call
    started, rows = time.perf_counter(), method.rows_of(step)
    drawn = [method.draw(step, [row]) for row in rows]
    samples, paths = [sample for found, _ in drawn for sample in found], [path for _, path in drawn]
    rendered = time.perf_counter()
    parts = [{reward.name: reward([sample])[0] for reward in method.rewards} for sample in samples]
    scored = time.perf_counter()
    advantages, _ = method.advantages(parts)
    batch = Batch(rows, samples, paths, Judged(parts, [], {}), {})
    method.update(step, batch, torch.tensor(advantages, dtype=torch.float32), loop)
    return {"render": rendered - started, "score": scored - rendered, "train": time.perf_counter() - scored}
