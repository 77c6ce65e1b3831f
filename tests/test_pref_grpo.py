"""Claims about pref_grpo.py: what a run leaves, that it goes on bit for bit, what it refuses, and when it stops."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pref_grpo
from data.prompts import prompts_of_step
from errors import Stopped
from interfaces import Prompt, Reward
from miniature.judge_server import JudgeServer
from models.trained import Shadow
from run.folder import RunFolder
from scoring.cache import PictureCache
from scoring.progress import Collapse, Evaluator
from tests.processes import ROOT, kill_when, launch, record, rows

RECIPES = {"pref_grpo_flux": 8, "flow_grpo_sd35": 8, "flux_lora_24gb": 1, "miniature_flow": 2}  # -> processes
TRAIN, FSDP = ROOT / "pref_grpo.py", (ROOT / "tests" / "fsdp_run.py", "pref_grpo")
SHORT = [
    "--config", ROOT / "configs" / "miniature_flow.yaml", "--prompts_per_step", 2, "--num_generations", 4,
    "--render_batch_size", 4, "--render_steps", 4, "--resolution", 16, "--rewards", "git", "--reward_weights", 1,
    "--eval_prompts", 2, "--eval_every", 3, "--max_steps", 5, "--save_steps", 2,
]  # fmt: skip


def words(outdir: Path, *options: object) -> list[str]:
    return [*map(str, SHORT), "--outdir", str(outdir), *map(str, options)]


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_others_read(flow_runs):
    outdir = flow_runs["lora"]
    [step] = rows(outdir / "rollouts" / "step_000001.jsonl")[:1]
    assert step["rewrite"] == step["prompt"] and step["reasoning"] is None and set(step["parts"]) == {"git"}
    first, last = rows(outdir / "metrics.jsonl")
    assert first["win_rate"] == 0.5 and {"reward", "rewards/git/mean", "kl/level_00", "grad_norm"} <= first.keys()
    assert [path.name for path in sorted((outdir / "evaluations").iterdir())] == [
        "step_000000.jsonl",
        "step_000001.jsonl",
    ]
    assert 0 <= last["win_rate"] <= 1 and (outdir / "report.html").exists()
    for kind, file in (("lora", "pytorch_lora_weights.safetensors"), ("full", "model_index.json")):
        assert all((flow_runs[kind] / place / file).exists() for place in (".", "ema"))


def test_each_epoch_has_an_order_of_its_own_and_meets_no_prompt_twice():
    prompts = [Prompt(str(i)) for i in range(10)]
    epochs = [
        [p.text for step in (2 * e + 1, 2 * e + 2) for p in prompts_of_step(step, prompts, 4, 0)] for e in (0, 1)
    ]
    assert epochs[0] != epochs[1] and all(len(set(epoch)) == 8 for epoch in epochs)


@pytest.mark.parametrize("loss", ["grpo", "guard", "dppo", "awm"])
def test_every_loss_moves_the_weights_and_logs_each_step(tmp_path, loss):
    """And the replayed log-probabilities were the sampled ones, or the run would have been refused."""
    start = load_file(ROOT / "miniature/weights/flux/transformer/diffusion_pytorch_model.safetensors")
    options = ["--loss", loss, "--max_steps", 2, "--updates_per_rollout", 2, "--beta", 0.01, "--sde_window", "all"]
    assert pref_grpo.main(words(tmp_path / "run", *options)) == 0
    trained = load_file(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in trained.values())
    assert any(not torch.equal(weight, start[name]) for name, weight in trained.items())
    row = rows(tmp_path / "run" / "metrics.jsonl")[0]
    steps = [f"level_{i:02}" for i in range(3)] if loss == "awm" else [f"step_{i:02}" for i in range(3)]
    for kind in ("ratio", "clipped", "kl", "gradient"):
        assert [name.split("/")[1] for name in row if name.startswith(f"{kind}/")] == steps
    assert row["penalty"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "kind"), [("render", "lora"), ("train", "full"), ("save", "lora")])
def test_a_run_killed_anywhere_ends_bit_for_bit_where_the_undisturbed_one_ends(tmp_path, phase, kind):
    more = ["--use_peft", "true", "--lora_r", 4, "--loss", "grpo"] if kind == "lora" else []
    killed, reference = tmp_path / "killed", tmp_path / "reference"
    assert pref_grpo.main(words(reference, *more)) == 0

    def is_there() -> bool:
        beat = killed / "heartbeat_0.json"
        now = json.loads(beat.read_text()) if beat.exists() else {}
        return (now.get("phase"), now.get("step")) == (phase, 4)

    kill_when(is_there, [sys.executable, str(TRAIN), *words(killed, *more)])
    assert pref_grpo.main(words(killed, *more, "--resume")) == 0
    assert record(killed) == record(reference)


def launched(outdir: Path, *options: object, program: Sequence[object] = (TRAIN,)) -> None:
    launch(*program, *words(outdir, *options))


@pytest.mark.slow
def test_two_processes_under_zero_2_and_under_fsdp2_are_the_run_of_one(tmp_path):
    options = ["--loss", "nft", "--max_steps", 3, "--learning_rate", 1e-4]
    assert pref_grpo.main(words(tmp_path / "one", *options)) == 0
    launched(tmp_path / "zero", *options)
    launched(tmp_path / "fsdp", *options, program=FSDP)
    for place in ("ema", "checkpoint-3"):  # as if it had been stopped before
        shutil.rmtree(tmp_path / "fsdp" / place)
    launched(tmp_path / "fsdp", *options, "--resume", program=FSDP)
    start = flat(ROOT / "miniature" / "weights" / "flux")
    for place in (".", "ema"):
        alone = flat(tmp_path / "one" / place)
        for other in (
            "zero",
            "fsdp",
        ):  # to rounding, which Adam turns into whole steps where a gradient is nearly zero
            assert (flat(tmp_path / other / place) - alone).norm() < 0.03 * (alone - start).norm(), other


def flat(pipeline: Path) -> torch.Tensor:
    """All weights of its transformer in one."""
    weights = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    return torch.cat([weights[name].ravel() for name in sorted(weights)])


@pytest.mark.slow
def test_a_judge_that_fails_a_fifth_of_its_calls_does_not_stop_two_processes(tmp_path):
    with JudgeServer(lambda samples: [np.asarray(s.images[0]).mean() / 255 for s in samples], fail_share=0.2) as url:
        judge = ["--judge_url", url, "--judge_model", "miniature", "--judge_timeout", 1]
        launched(
            tmp_path / "run",
            *judge,
            "--rewards",
            "preference",
            "git",
            "--reward_weights",
            1,
            1,
            "--held_out",
            "judge",
            "--max_steps",
            3,
        )
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2, 3, 3] and "win_rate/preference" in logged[-1]
    found = [row for path in (tmp_path / "run" / "rollouts").iterdir() for row in rows(path)]
    assert all((row["total"] is None) == (None in row["parts"].values()) for row in found)
    assert all(row["advantage"] == 0 for row in found if row["total"] is None)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--num_generations", 1], ["--prompts_per_step", 3, "--num_generations", 3], ["--updates_per_rollout", 3],
        ["--loss", "grpo", "--sde_window", "sliding", "--sde_steps", 4], ["--rewards", "git", "length"],
        ["--rewards", "format"], ["--render_steps", 1], ["--held_out", "git"], ["--reward_weights", 1, 2],
        ["--resolution", 50], ["--preference_pairs", "anchor"], ["--train_guidance", "cfg"], ["--eval_prompts", 999],
        ["--prompts_per_step", 841, "--num_generations", 4],
        ["--loss", "ppo"], ["--sdmodel_name", "http://127.0.0.1:1/v1"], ["--highest_noise", 1.5],
        ["--render_batch_size", "auto"],
        ["--rewards", "judge", "--judge_url", "http://127.0.0.1:1/v1"], ["--lora_target_modules", "nowhere"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(tmp_path, capsys, options):
    lora = ["--use_peft", "true"] if "--lora_target_modules" in options else []
    assert pref_grpo.main(words(tmp_path / "run", *options, *lora)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pref_grpo: error: ")]
    assert len(said) == 1
    if not lora:
        assert not (tmp_path / "run").exists()


def test_a_replay_that_differs_from_what_was_sampled_is_refused_with_the_gap(tmp_path, capsys, monkeypatch):
    taken_again = pref_grpo.Trajectory.velocity
    monkeypatch.setattr(pref_grpo.Trajectory, "velocity", lambda *given: taken_again(*given) * 1.01)
    assert pref_grpo.main(words(tmp_path / "run", "--loss", "grpo")) == 2
    assert "log-probabilities differ by" in capsys.readouterr().err


# When it stops -------------------------------------------------------------------------------------------------------


class Bright(Reward):
    """How bright a picture is: something to hack."""

    name, range = "bright", (0.0, 1.0)

    def __call__(self, samples):
        return [float(np.asarray(sample.images[0]).mean()) / 255 for sample in samples]


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


def evaluations(tmp_path: Path, levels: list[int]) -> list[dict[str, float]]:
    folder = RunFolder(tmp_path / "run", {})
    folder.path.mkdir()
    evaluator = Evaluator(
        lambda texts, seeds: [grey(100)] * len(texts), [Prompt(str(i)) for i in range(16)], [Bright()], [], folder,
        PictureCache(tmp_path / "cache", 1e6), 0,
    )  # fmt: skip
    found = [evaluator(0)]
    for step, level in enumerate(levels, 1):
        evaluator.draw = lambda texts, seeds, level=level: [grey(level)] * len(texts)
        found.append(evaluator(step))
    return found


def test_pictures_are_compared_with_the_untrained_models_from_the_same_noise(tmp_path):
    found = evaluations(tmp_path, [200, 100, 50])
    assert [one["win_rate/bright"] for one in found] == [0.5, 1.0, 0.5, 0.0]
    assert found[1]["eval/bright/mean"] == pytest.approx(200 / 255)


def test_a_collapse_stops_the_run_and_names_the_best_weights_and_a_cheat_is_warned_of(tmp_path, caplog):
    before, good, even, bad = evaluations(tmp_path, [200, 100, 50])
    watch = Collapse(2.0)
    assert [watch.check_evaluation(step, one, [Bright()]) for step, one in enumerate((before, good, even))] == [
        False,
        True,
        False,
    ]
    assert "bright" in caplog.text
    again = Collapse(2.0)
    again.load_state_dict(watch.state_dict())
    with pytest.raises(Stopped, match="step 1"):
        again.check_evaluation(3, bad, [])
    for norm in (1.0, 1.9, 0.6):
        again.check_norm(1, norm)
    for norm in (2.1, 0.4, float("nan")):
        with pytest.raises(Stopped):
            again.check_norm(2, norm)


def test_a_copy_of_weights_follows_stands_in_and_comes_back():
    net = torch.nn.Linear(2, 2)
    start = net.weight.detach().clone()
    copy = Shadow(net)
    with torch.no_grad():
        net.weight += 1
    copy.follow(0.75)
    with copy.in_place():
        torch.testing.assert_close(net.weight, start + 0.25)
    torch.testing.assert_close(net.weight, start + 1)


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fills_whole_groups_and_batches(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if bitsandbytes were installed
    options = pref_grpo.parse_options(
        ["--config", str(ROOT / "configs" / f"{recipe}.yaml"), "--outdir", str(tmp_path)]
    )
    assert pref_grpo.plan(options, 840, RECIPES[recipe])["passes_per_optimizer_step"] >= 1
    options.groups.check_rewards(options.reward)
