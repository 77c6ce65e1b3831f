"""Claims about t2i_r1.py: what a run leaves, what learns and what is frozen, that it goes on bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

import t2i_r1
from models.janus import Settings, load_janus
from rewards.git import GIT
from tests.processes import ROOT, kill_when, launch, record, rows

TRAIN, FSDP = ROOT / "t2i_r1.py", (ROOT / "tests" / "fsdp_run.py", "t2i_r1")
ZERO_3 = ROOT / "configs" / "deepspeed_3_cpu.yaml"
RECIPES = {"t2i_r1": 8, "t2i_r1_1b_24gb": 1, "miniature_janus": 2}  # -> processes
SHORT = [
    "--config", ROOT / "configs" / "miniature_janus.yaml", "--prompts_per_step", 2, "--num_generations", 4,
    "--train_batch_size", 4, "--image_batch", 4, "--max_plan_tokens", 12, "--rewards", "git", "--reward_weights", 1,
    "--held_out", "hps",
    "--eval_prompts", 2, "--eval_every", 3, "--max_steps", 5, "--save_steps", 2, "--learning_rate", 1e-3,
]  # fmt: skip


@pytest.fixture
def words(tiny_janus):
    def of(outdir: Path, *options: object) -> list[str]:
        return [*map(str, SHORT), "--model_path", str(tiny_janus), "--outdir", str(outdir), *map(str, options)]

    return of


def changed(outdir: Path, start: Path) -> set[str]:
    """The parts of the model that a run has moved."""
    before, after = load_file(start / "model.safetensors"), load_file(outdir / "model.safetensors")
    assert before.keys() == after.keys() and all(value.isfinite().all() for value in after.values())
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    return {name.split(".")[0] if name.startswith("lm_head") else name.split(".")[1] for name in moved}


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_janus_that_others_load_with_its_settings(words, tiny_janus, tmp_path):
    outdir = tmp_path / "run"
    assert t2i_r1.main(words(outdir, "--max_steps", 2, "--image_temperature", 0.7, "--beta", 0.01)) == 0
    [step] = rows(outdir / "rollouts" / "step_000001.jsonl")[:1]
    assert step["reasoning"] == step["completion"] and step["rewrite"] == f"{step['prompt']}. {step['reasoning']}"
    first, *_, last = rows(outdir / "metrics.jsonl")
    assert first["kl/plan"] == first["kl/image"] == 0 and first["ratio/plan"] == first["ratio/image"] == 1
    assert {"plans/tokens", "plans/cut", "entropy/plan", "entropy/image", "grad_norm"} <= first.keys()
    assert rows(outdir / "metrics.jsonl")[1]["kl/image"] > 0 and 0 <= last["win_rate"] <= 1
    for place in (".", "ema"):
        assert load_janus(str(outdir / place), "float32", "cpu").settings == Settings(1.0, 0.7, 1.0, 1.0, 12)
        JanusForConditionalGeneration.from_pretrained(outdir / place)
    assert (outdir / "report.html").exists() and changed(outdir, tiny_janus) == {"language_model", "lm_head"}


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        (["--levels", "plan"], {"language_model", "lm_head"}),
        (["--levels", "tokens"], {"language_model"}),
        (["--guidance", 3, "--logprob", "guided"], {"language_model", "lm_head"}),
        (["--guidance", 3, "--token_weight", "0.3", "--top_p", 0.9], {"language_model", "lm_head"}),
        (["--entropy_mask", 0.2, "--entropy_bonus", 0.5], {"language_model", "lm_head"}),
        (["--token_similarity", "true", "--beta", 0.01], {"language_model", "lm_head"}),
        (["--use_peft", "true", "--lora_r", 4], {"language_model"}),
        (["--train_generation_head", "true"], {"language_model", "lm_head", "generation_head"}),
        (["--updates_per_rollout", 2, "--gradient_checkpointing", "true"], {"language_model", "lm_head"}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_each_way_of_learning_moves_what_it_says_and_nothing_else(words, tiny_janus, tmp_path, options, moved):
    assert t2i_r1.main(words(tmp_path / "run", "--max_steps", 1, "--spread_floor", 0, *options)) == 0
    assert changed(tmp_path / "run", tiny_janus) == moved


def test_without_a_spread_of_rewards_nothing_moves(words, tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setattr(GIT, "__call__", lambda self, samples: [0.5] * len(samples))
    assert t2i_r1.main(words(tmp_path / "run", "--max_steps", 1)) == 0
    assert changed(tmp_path / "run", tiny_janus) == set()


def test_what_is_replayed_must_be_what_was_sampled(words, tmp_path, capsys, monkeypatch):
    write = t2i_r1.Janus.write

    def another(self, *given):
        plans, log_probs = write(self, *given)
        return plans, [[value - 0.1 for value in row] for row in log_probs]

    monkeypatch.setattr(t2i_r1.Janus, "write", another)
    assert t2i_r1.main(words(tmp_path / "run")) == 2
    assert "log-probabilities differ by 0.1" in capsys.readouterr().err


# Broken off ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "more"),
    [
        ("render", []),  # plans are written first
        ("render", ["--max_plan_tokens", 1]),  # so nearly all of it is image tokens
        ("train", ["--beta", 0.01, "--updates_per_rollout", 2]),
        ("save", ["--use_peft", "true", "--lora_r", 4]),
    ],
    ids=["plan", "image", "update", "save"],
)
def test_a_run_killed_anywhere_ends_bit_for_bit_where_the_undisturbed_one_ends(words, tmp_path, phase, more):
    killed, reference = tmp_path / "killed", tmp_path / "reference"
    assert t2i_r1.main(words(reference, *more)) == 0

    def is_there() -> bool:
        beat = killed / "heartbeat_0.json"
        now = json.loads(beat.read_text()) if beat.exists() else {}
        return (now.get("phase"), now.get("step")) == (phase, 4)

    kill_when(is_there, [sys.executable, str(TRAIN), *words(killed, *more)])
    assert t2i_r1.main(words(killed, *more, "--resume")) == 0
    assert record(killed) == record(reference)


@pytest.mark.slow
def test_two_processes_under_zero_2_zero_3_and_fsdp2_are_the_run_of_one(words, tmp_path):
    options = ["--max_steps", 3, "--learning_rate", 1e-4, "--beta", 0.01]
    assert t2i_r1.main(words(tmp_path / "one", *options)) == 0
    launch(TRAIN, *words(tmp_path / "zero_2", *options))
    launch(TRAIN, *words(tmp_path / "zero_3", *options), config=ZERO_3)
    launch(*FSDP, *words(tmp_path / "fsdp", *options))
    for name, more in (("fsdp", {}), ("zero_3", {"config": ZERO_3})):
        for place in ("ema", "checkpoint-3"):  # as if it had been stopped before
            shutil.rmtree(tmp_path / name / place)
        launch(*(FSDP if name == "fsdp" else (TRAIN,)), *words(tmp_path / name, *options, "--resume"), **more)
    start = flat(Path(json.loads((tmp_path / "one" / "run.json").read_text())["config"]["model_path"]))
    for place in (".", "ema"):
        alone = flat(tmp_path / "one" / place)
        for other in ("zero_2", "zero_3", "fsdp"):  # to rounding
            assert (flat(tmp_path / other / place) - alone).norm() < 0.03 * (alone - start).norm(), other


def flat(folder: Path) -> torch.Tensor:
    """All weights in one."""
    weights = load_file(folder / "model.safetensors")
    return torch.cat([weights[name].float().ravel() for name in sorted(weights)])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--num_generations", 1], ["--prompts_per_step", 3, "--num_generations", 3], ["--guidance", 0.5],
        ["--rewards", "git", "length"], ["--rewards", "format"], ["--max_plan_tokens", 480], ["--levels", "none"],
        ["--rewards", "judge", "--judge_url", "http://127.0.0.1:1/v1"], ["--token_weight", 2],
        ["--token_similarity", "true", "--levels", "plan"], ["--clip_range", 0],
        ["--model_path", ROOT / "miniature" / "weights" / "policy"], ["--questions", "nowhere.jsonl"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(words, tmp_path, capsys, options):
    assert t2i_r1.main(words(tmp_path / "run", *options)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("t2i_r1: error: ")]
    assert len(said) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fills_whole_groups_and_batches(recipe, tmp_path):
    options = t2i_r1.parse_options(["--config", str(ROOT / "configs" / f"{recipe}.yaml"), "--outdir", str(tmp_path)])
    assert t2i_r1.plan(options, 960, RECIPES[recipe])["passes_per_optimizer_step"] >= 1
    options.groups.check_rewards(options.reward)
