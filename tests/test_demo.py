"""Claims about the loop as a whole, on the miniature and with the real scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import processes
from tests.processes import ROOT, run_forked

pytestmark = pytest.mark.slow

ENVIRONMENT = {**processes.ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
NOISE = ("Loading weights", "pipeline components", "Writing model", "accelerator", "indexing errors", "Traceback")


def run(*command: object, forked: bool = True) -> subprocess.CompletedProcess:
    if forked:
        done = run_forked(*command, environment=ENVIRONMENT)
    else:
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [words for words in NOISE if words in done.stdout + done.stderr] == []
    return done


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_reward_rises_on_the_miniature_and_the_demo_shows_it(tmp_path):
    out = tmp_path / "demo"
    shorter = ["--max_steps", 16, "--per_device_train_batch_size", 32, "--save_steps", 16]
    done = run("scripts/demo.py", "--outdir", out, "--samples", 1, *shorter, forked=False)
    rewards = [row["reward"] for row in rows(out / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5])
    summary = json.loads((out / "summary.json").read_text())
    rows_of_table = {row["name"]: row for row in summary["table"]["rows"]}
    for row in rows_of_table.values():
        low, high = row["ci95"]
        assert low <= row["mean"] <= high
        *categories, surplus = row["cells"]
        assert len(categories) == 6 and np.isclose(np.mean(categories), row["mean"])  # 40 prompts a category
        assert surplus >= 0
    means = {name: row["mean"] for name, row in rows_of_table.items()}
    assert means["written"] > means["raw"]
    assert summary["rollouts"] == 16 * 64
    assert set(summary["seconds"]) == {"total", "generate", "render", "score", "train"}
    assert "policy after" in done.stdout and str(out / "report.html") in done.stdout
    assert (out / "before_after.png").stat().st_size > 10_000 and len(rows(out / "gallery.jsonl")) == 24
    assert "policy after" in run("scripts/demo.py", "--outdir", out).stdout  # a complete run is only shown

    same = ["--runs", out, "--renderer", "miniature/weights/flux", "--samples", 1, "--out", tmp_path / "transfer.md"]
    run("scripts/transfer.py", *same)  # to the renderer that it was trained with: nothing may change
    cells = [float(cell) for cell in (tmp_path / "transfer.md").read_text().splitlines()[-1].split("|")[2:-1]]
    assert cells[:4] == [round(means[name], 3) for name in ("raw", "start", "trained", "written")]
    assert cells[4] == round(summary["gap_closed"], 3)


def test_the_demo_of_the_image_model_shows_untrained_trained_and_averaged_weights(tmp_path):
    out = tmp_path / "flow"
    small = ["--prompts_per_step", 4, "--num_generations", 4, "--render_batch_size", 8, "--eval_prompts", 4]
    words = ["scripts/demo_flow.py", "--outdir", out, "--samples", 1, "--max_steps", 2, "--save_steps", 2, *small]
    run(*words)
    summary = json.loads((out / "summary.json").read_text())
    means = {row["name"]: row["mean"] for row in summary["table"]["rows"]}
    assert list(means) == ["start", "trained", "ema"] and 0.1 < means["start"] < 0.3  # as the untrained one draws
    assert summary["rollouts"] == 2 * 16 and set(summary["seconds"]) == {"total", "render", "score", "train"}
    shown = rows(out / "gallery.jsonl")
    assert len(shown) == 24 and all((out / row[system]["image"]).exists() for row in shown for system in means)
    assert any((out / row["start"]["image"]).read_bytes() != (out / row["ema"]["image"]).read_bytes() for row in shown)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Through training" in page and "averaged weights" in page and (out / "before_after.png").exists()


@pytest.mark.slow
def test_the_demo_of_the_janus_shows_plans_of_its_own_and_of_the_world(tmp_path):
    out = tmp_path / "janus"
    small = ["--prompts_per_step", 4, "--num_generations", 4, "--train_batch_size", 8, "--image_batch", 8]
    small += ["--eval_prompts", 4, "--max_steps", 2, "--save_steps", 2]
    run("scripts/demo_janus.py", "--outdir", out, "--samples", 1, *small)
    summary = json.loads((out / "summary.json").read_text())
    means = {row["name"]: row["mean"] for row in summary["table"]["rows"]}
    assert list(means) == ["raw", "start", "trained", "written"]
    assert means["raw"] < means["start"] < means["written"] and means["written"] > 0.95
    shown = rows(out / "gallery.jsonl")
    assert all(row["written"]["rewrite"].startswith("a ") and row["start"]["rewrite"] for row in shown)
    assert "own plans, after" in (out / "report.html").read_text(encoding="utf-8")
    understood = [row["eval/understanding"] for row in rows(out / "metrics.jsonl") if "eval/understanding" in row]
    assert len(understood) == 2 and all(0.5 < share <= 1 for share in understood)


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
    for card in (tmp_path / "run" / "README.md", tmp_path / "run" / "checkpoint-2" / "README.md"):  # not PEFT's draft
        text = card.read_text(encoding="utf-8")
        assert "2 of 2" in text and "r1_prompter.py --config" in text and "More Information Needed" not in text
    (tmp_path / "prompts.txt").write_text("a photo of three circles\n")
    command = ["--data", tmp_path / "prompts.txt", "--gpt_path", tmp_path / "run", "--out", tmp_path / "rewrites"]
    run("scripts/reprompt.py", *command)
    assert rows(tmp_path / "rewrites" / "rewrites.jsonl")[0]["readable"]
