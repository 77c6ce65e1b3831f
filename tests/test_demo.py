"""Claims about the loop as a whole, on the miniature and with the real scripts.

pytest tests/test_demo.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.prompts import load_prompts
from miniature.build import renderer
from prompting import completion
from rewards import RewardOptions, Setting, build
from scoring.judge import Scorer
from scripts import bench

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*command: object) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_reward_rises_on_the_miniature_and_the_demo_shows_it(tmp_path):
    out = tmp_path / "demo"
    shorter = ["--max_steps", 24, "--per_device_train_batch_size", 32, "--save_steps", 24]
    done = run("scripts/demo.py", "--outdir", out, "--images", 1, *shorter)
    rewards = [row["reward"] for row in rows(out / "metrics.jsonl")]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6])
    summary = json.loads((out / "summary.json").read_text())
    for system in ("raw", "start", "trained", "written"):
        scores = summary["oracle"][system]
        low, high = scores["ci95"]
        assert low <= scores["mean"] <= high
        categories = [scores[name] for name in ("single", "two", "colors", "counting", "position", "attr")]
        assert np.isclose(np.mean(categories), scores["mean"])  # 40 prompts a category
    assert summary["oracle"]["written"]["mean"] > summary["oracle"]["raw"]["mean"]
    assert summary["rollouts"] == 24 * 64
    assert set(summary["seconds"]) == {"total", "generate", "render", "score", "train"}
    assert "policy after" in done.stdout and str(out / "report.html") in done.stdout
    assert (out / "before_after.png").stat().st_size > 10_000 and len(rows(out / "gallery.jsonl")) == 24
    assert "policy after" in run("scripts/demo.py", "--outdir", out).stdout  # a complete run is only shown
    (out / "summary.json").unlink()  # as if it had been stopped while the oracle looked
    run("scripts/demo.py", "--outdir", out, "--images", 1, *shorter)
    again = json.loads((out / "summary.json").read_text())
    assert (again["oracle"], again["rollouts"]) == (summary["oracle"], summary["rollouts"])

    same = ["--runs", out, "--renderer", "miniature/weights/flux", "--images", 1, "--out", tmp_path / "transfer.md"]
    run("scripts/transfer.py", *same)  # to the renderer that it was trained with: nothing may change
    cells = [float(cell) for cell in (tmp_path / "transfer.md").read_text().splitlines()[-1].split("|")[2:-1]]
    assert cells[:4] == [round(summary["oracle"][name]["mean"], 3) for name in ("raw", "start", "trained", "written")]
    assert cells[4] == round(summary["gap_closed"], 3)


def test_the_real_prompt_file_trains_two_steps(tmp_path):
    data = "data/generation_prompts_1k_filterd.txt"
    options = ["--data", data, "--max_steps", 2, "--per_device_train_batch_size", 16, "--save_steps", 2]
    run("r1_prompter.py", "--config", "configs/miniature.yaml", "--outdir", tmp_path / "run", *options)
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    prompts = set((ROOT / data).read_text(encoding="utf-8").splitlines())
    rollouts = [row for file in (tmp_path / "run" / "rollouts").glob("*.jsonl") for row in rows(file)]
    assert len(rollouts) == 32 and all(row["prompt"] in prompts for row in rollouts)


def test_a_lora_run_leaves_an_adapter_that_rewrites(tmp_path):
    short = ["--max_steps", 2, "--per_device_train_batch_size", 16, "--save_steps", 2]
    lora = ["--use_peft", "true", "--lora_r", 4, "--lora_target_modules", "q_proj", "v_proj"]
    run("r1_prompter.py", "--config", "configs/miniature.yaml", "--outdir", tmp_path / "run", *short, *lora)
    assert (tmp_path / "run" / "adapter_config.json").exists()
    (tmp_path / "prompts.txt").write_text("a photo of three circles\n")
    command = ["--prompts", tmp_path / "prompts.txt", "--gpt_path", tmp_path / "run", "--out", tmp_path / "rewrites"]
    run("scripts/reprompt.py", *command)
    assert rows(tmp_path / "rewrites" / "rewrites.jsonl")[0]["readable"]


def test_what_the_plain_loop_draws_and_scores_again_for_each_rollout_and_reward_is_done_once_in_batches():
    """Rows of each forward pass: 8 rollouts of 6 rewrites, drawn in 2 steps, scored by 4 networks."""
    asked = [prompt for prompt in load_prompts(ROOT / "miniature/prompts/train.txt")[:2] for _ in range(4)]
    completions = [completion("Think.", f"{prompt.text} {i % 4 % 3}") for i, prompt in enumerate(asked)]
    batched, single = (renderer(render_batch_size=size, render_steps=2, render_dtype="float32") for size in (6, 1))
    paths = {f"{name}_path": str(ROOT / "miniature/weights" / name) for name in bench.LOCAL}
    names, options = ("hps", "gdino", "git", "orm", "format"), RewardOptions(**paths, orm_dtype="float32")
    rewards = build(names, options, Setting(renderer=batched, prompts=asked))
    passes = {}

    def watch(name, network):
        def note(_, args, named):
            passes.setdefault(name, []).append(next(map(len, filter(torch.is_tensor, (*args, *named.values())))))

        network.register_forward_pre_hook(note, with_kwargs=True)

    for pipe in (batched.pipe, single.pipe):
        watch("texts", pipe.text_encoder_2)
        watch("steps", pipe.transformer)
        watch("pictures", pipe.vae.decoder)
    watch("hps, prompts", rewards[0].model.transformer)
    watch("hps, pictures", rewards[0].model.visual)
    for reward in rewards[1:4]:
        watch(reward.name, reward.model)
    scorer = Scorer(batched, rewards, {prompt.id: prompt for prompt in asked}, num_generations=4)
    scorer.score(completions, [prompt.id for prompt in asked], 1)
    # of git the pictures, then the questions; of the texts one alone before, to know its shape
    scored = {"hps, prompts": [2], "hps, pictures": [6], "gdino": [6], "git": [6, 6], "orm": [6]}
    assert passes == {"texts": [1, 6], "steps": [6, 6], "pictures": [6], **scored}
    passes.clear()
    bench.plain_loop(single, rewards, asked, completions)
    scored = {name: [1] * 8 * len(rows) for name, rows in scored.items()}
    assert passes == {"texts": [1] * 33, "steps": [1] * 64, "pictures": [1] * 32, **scored}


def test_the_bench_splits_the_time_of_a_rollout_into_phases_and_compares(tmp_path):
    small = ["--prompts", 1, "--group", 2, "--json", tmp_path / "bench.json"]
    run("scripts/bench.py", "--target", "cpu", *small)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert sum(value for name, value in found.items() if name.endswith("_share")) == pytest.approx(1)
    assert found["rollouts"] == 2 and {"ratio_to_plain_loop", "ratio_with_generation"} <= found.keys()
