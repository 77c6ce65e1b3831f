"""Rollouts and updates of the trainers whose model draws by itself, against the published loops, each in one run.

`bench.py --target flow`: all draw the same groups of the miniature with 25 steps, of which 14 drawn by lot are random
and trained, and score them with the same rewards. The published loop (Pref-GRPO's code) takes picture by picture: it
encodes the text again, decodes, scores when all are there, and trains one step of one picture at a time. Ours takes 32
at once. Two more columns are ours with a sliding window of 4 steps, and with DiffusionNFT, which needs no path.

`bench.py --target janus`: plans and pictures with guidance 5. The published loop (T2I-R1's code) takes one prompt at a
time, scores picture by picture, and trains on one prompt's group at a time. Ours draws 128 at once and trains on 16,
which is the fastest on a core. One more column is ours without guidance.

With `--scale real` both measure one step of ours alone, at real shapes with random weights: FLUX.1-dev (LoRA, 512
pixels, a group of 8), Janus-Pro-1B (all of the language model) and -7B (LoRA): seconds a phase, peak of memory, and
the share of the ceiling (`bench_gpu.matmul_rate`) that the counted FLOPs reach. The rewards are the miniature's.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

import pref_grpo
import t2i_r1
from doctor.janus import IMAGE, MODELS
from group_training import Batch, GroupMethod
from models.janus import Janus
from run.heartbeat import Heartbeat
from run.loop import Loop
from scoring.judge import Judged
from scripts.bench_common import ROOT, measure
from scripts.bench_gpu import SCALES, Scale, matmul_rate

STEPS = 3  # of ours; the first warms up
FLOW = "--render_steps 25 --loss grpo --sde_window random --sde_steps 14"
JANUS = "--train_batch_size 2 --gradient_checkpointing true"
REAL = {  # what is measured, with which options
    "flow": {"FLUX.1-dev": f"{FLOW} --render_batch_size 2 --use_peft true --gradient_checkpointing true"},
    "janus": {"Janus-Pro-1B": JANUS, "Janus-Pro-7B": f"{JANUS} --use_peft true"},
}
SIZES = {
    ("flow", True): "--num_generations 8 --resolution 512 --render_dtype bfloat16 --max_sequence_length 256",
    ("flow", False): "--num_generations 2 --resolution 16 --render_dtype float32",
    ("janus", True): "--num_generations 8 --image_batch 8 --max_plan_tokens 128 --guidance 5 --dtype bfloat16",
    ("janus", False): "--num_generations 2 --image_batch 2 --max_plan_tokens 8 --guidance 5",
}


def bench_flow(prompts: int, group: int) -> dict:
    """See `_compare`."""
    batch = math.gcd(32, prompts * group)
    return _compare(pref_grpo, pref_grpo.PrefGRPO, "miniature_flow", prompts, group, 1, {
        "published": f"{FLOW} --render_batch_size 1",
        "ours": f"{FLOW} --render_batch_size {batch}",
        "window of 4": f"{FLOW} --sde_window sliding --sde_steps 4 --render_batch_size {batch}",
        "nft": f"--render_steps 25 --render_batch_size {batch}",
    })  # fmt: skip


def bench_janus(prompts: int, group: int) -> dict:
    """See `_compare`."""
    batch, part = math.gcd(128, prompts * group), math.gcd(16, prompts * group)
    return _compare(t2i_r1, t2i_r1.T2IR1, "miniature_janus", prompts, group, group, {
        "published": f"--guidance 5 --image_batch {group} --train_batch_size {group}",
        "ours": f"--guidance 5 --image_batch {batch} --train_batch_size {part}",
        "no guidance": f"--guidance 1 --image_batch {batch} --train_batch_size {part}",
    })  # fmt: skip


def bench_real(target: str, scale: Scale, device: torch.device) -> dict:
    """A row for each model: its second step, timed; the FLOPs are those of the first."""
    ceiling, rows = matmul_rate(scale.matrix, device), []
    trainer, kind, config = {
        "flow": (pref_grpo, pref_grpo.PrefGRPO, "miniature_flow"), "janus": (t2i_r1, t2i_r1.T2IR1, "miniature_janus"),
    }[target]  # fmt: skip
    for name, words in REAL[target].items():
        with tempfile.TemporaryDirectory() as folder:
            given = ["--config", str(ROOT / "configs" / f"{config}.yaml"), "--outdir", str(Path(folder, "run"))]
            given += ["--prompts_per_step", "1", "--eval_prompts", "1", *words.split()]
            is_real = scale is SCALES["real"]
            given += SIZES[target, is_real].split()
            if is_real:
                save_random(name, Path(folder, "model"), scale, device)
                given += ["--sdmodel_name" if target == "flow" else "--model_path", str(Path(folder, "model"))]
            options = trainer.parse_options(given)
            method = kind(options, *trainer.prepare(options))
            loop = _loop(method, Path(folder, "run"))
            with FlopCounterMode(display=False) as counter:
                _ours(method, 1, loop)
            phases: dict[str, float] = {}
            found = measure(
                lambda method=method, loop=loop, phases=phases: phases.update(_ours(method, 2, loop)), device
            )
            loop.heartbeat.close()
            share = counter.get_total_flops() / found["seconds"] / ceiling
            rows.append({"what": name, **phases, "peak_gb": found["peak_gb"], "share": share})
    return {"ceiling_tflops": ceiling / 1e12, "rows": rows}


def save_random(name: str, folder: Path, scale: Scale, device: torch.device) -> None:
    """Random weights of these shapes in bfloat16, where a trainer looks for them."""
    if name == "FLUX.1-dev":
        scale.pipe(device).save_pretrained(folder)
        return
    model = MODELS[f"deepseek-community/{name}"]
    processor = JanusProcessor.from_pretrained(ROOT / "miniature" / "weights" / "janus", num_image_tokens=IMAGE)
    text = LlamaConfig(
        vocab_size=model.vocabulary, hidden_size=model.width, intermediate_size=model.inner,
        num_hidden_layers=model.layers, num_attention_heads=model.width // 128, tie_word_embeddings=False,
        max_position_embeddings=16384,
    )  # fmt: skip
    vision = JanusVisionConfig(projection_dim=model.width, num_image_tokens=IMAGE)
    vq = JanusVQVAEConfig(projection_dim=model.width, image_token_embed_dim=model.width)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False,
                         image_token_id=processor.tokenizer.convert_tokens_to_ids(processor.image_token))  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        Janus(JanusForConditionalGeneration(config).to(torch.bfloat16), processor).save(folder)


def _compare(
    trainer: ModuleType, kind: type[GroupMethod], config: str, prompts: int, group: int, at_once: int,
    sides: dict[str, str],
) -> dict:  # fmt: skip
    """Rows of seconds a picture by phase, the ratio, and the peak of memory after each of our steps."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in sides.items():
            given = ["--config", str(ROOT / "configs" / f"{config}.yaml"), "--outdir", str(Path(folder, name))]
            given += ["--prompts_per_step", str(prompts), "--num_generations", str(group), *words.split()]
            options = trainer.parse_options(given)
            method = kind(options, *trainer.prepare(options))
            method.held_out = []  # the published loops have none
            found[name], memory = _measure(method, Path(folder, name), at_once if name == "published" else 0)
    rows = [
        {"phase": phase, **{name: found[name][phase] / (prompts * group) for name in sides}} for phase in found["ours"]
    ]
    ratios = {name: found["published"]["all"] / seconds["all"] for name, seconds in found.items()}
    rows.append({"phase": "times the published speed", **ratios})
    return {"pictures": prompts * group, "threads": torch.get_num_threads(), "peak_memory_mib": memory, "rows": rows}


def _measure(method: GroupMethod, folder: Path, at_once: int) -> tuple[dict[str, float], str]:
    """Seconds of the last step by phase, and the peaks of memory; the published loop draws so many `at_once`."""
    loop, peaks, found = _loop(method, folder), [], {}
    for step in range(1, 2 if at_once else STEPS + 1):
        found = _published(method, step, loop, at_once) if at_once else _ours(method, step, loop)
        peaks.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")
    loop.heartbeat.close()
    return {**found, "all": sum(found.values())}, ", ".join(peaks)


def _loop(method: GroupMethod, folder: Path) -> Loop:
    setup = method.setup
    return Loop(
        setup.accelerator, setup.folder, setup.resume, Heartbeat(folder, 0, 600), total=STEPS, save_every=STEPS,
        model=method.net,
    )  # fmt: skip


def _ours(method: GroupMethod, step: int, loop: Loop) -> dict[str, float]:
    batch = method.rollout(step, loop.heartbeat)
    started = time.perf_counter()
    advantages, _ = method.advantages(batch.judged.parts)
    method.update(step, batch, torch.tensor(advantages, dtype=torch.float32), loop)
    seconds = {name.removeprefix("seconds/"): value for name, value in batch.seconds.items()}
    return {**seconds, "train": time.perf_counter() - started}


def _published(method: GroupMethod, step: int, loop: Loop, at_once: int) -> dict[str, float]:
    started, rows = time.perf_counter(), method.rows_of(step)
    drawn = [method.draw(step, rows[first : first + at_once]) for first in range(0, len(rows), at_once)]
    samples, kept = [sample for found, _ in drawn for sample in found], [path for _, path in drawn]
    rendered = time.perf_counter()
    parts = [{reward.name: reward([sample])[0] for reward in method.rewards} for sample in samples]
    scored = time.perf_counter()
    advantages, _ = method.advantages(parts)
    batch = Batch(rows, samples, kept, Judged(parts, [], {}), {})
    method.update(step, batch, torch.tensor(advantages, dtype=torch.float32), loop)
    return {"render": rendered - started, "score": scored - rendered, "train": time.perf_counter() - scored}
