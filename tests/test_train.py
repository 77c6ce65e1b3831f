"""Claims about r1_prompter.py on the toy stack of conftest.py: in this process, as a script, as two processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from errors import UserError
from interfaces import Reward
from models.hub import contents_of
from run.folder import RunFolder
from run.seeds import render_seed
from tests.processes import ENVIRONMENT, ZERO_2, kill_when, launch, run_forked

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = [sys.executable, str(ROOT / "r1_prompter.py")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rollouts(run: Path) -> dict[int, list[dict]]:
    return {int(path.stem[5:]): rows(path) for path in sorted((run / "rollouts").glob("*.jsonl"))}


def main(*argv: object) -> int:
    import r1_prompter

    return r1_prompter.main([str(word) for word in argv])


class Scripted(Reward):
    """A text reward that gives what a function of the completion's index says."""

    needs_images, range = False, (-10.0, 10.0)

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __call__(self, samples):
        return [self.value(i) for i in range(len(samples))]


def expected_advantages(parts: np.ndarray, group: int) -> np.ndarray:
    """TRL's normalize_then_sum with unit weights; parts (B, K), an absent row is NaN throughout."""
    grouped = parts.reshape(-1, group, parts.shape[1])
    mean = np.nanmean(grouped, axis=1, keepdims=True)
    std = np.nanstd(grouped, axis=1, ddof=1, keepdims=True)
    total = ((grouped - mean) / (std + 1e-4)).reshape(parts.shape).sum(axis=1)
    return np.nan_to_num((total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4))


def test_equal_rewards_give_zero_advantage_and_zero_gradient(toy, tmp_path, monkeypatch):
    import rewards

    monkeypatch.setitem(rewards.REWARDS, "same", lambda *_: Scripted("same", lambda i: 0.5))
    options = ["--rewards", "same", "--save_strategy", "no"]
    assert main("--config", toy.config, "--outdir", tmp_path / "run", *options) == 0
    assert all(row["advantage"] == 0 for step in rollouts(tmp_path / "run").values() for row in step)
    assert [row["grad_norm"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0.0, 0.0]


def test_advantages_are_those_of_the_formula_and_an_absent_row_has_none(toy, tmp_path, monkeypatch):
    import rewards

    noise = np.random.default_rng(0).normal(size=(2, 8))
    monkeypatch.setitem(rewards.REWARDS, "one", lambda *_: Scripted("one", lambda i: noise[0, i]))
    gaps = Scripted("gaps", lambda i: None if i == 2 else noise[1, i] / 50)
    monkeypatch.setitem(rewards.REWARDS, "gaps", lambda *_: gaps)
    options = ["--rewards", "one", "gaps", "--max_steps", 1, "--save_strategy", "no", "--num_generations", 4]
    assert main("--config", toy.config, "--outdir", tmp_path / "run", *options) == 0
    step = rollouts(tmp_path / "run")[1]
    parts = np.array([[np.nan if p is None else p for p in row["parts"].values()] for row in step])
    assert np.isnan(parts[2]).all() and step[2]["total"] is None and step[2]["advantage"] == 0
    np.testing.assert_allclose([row["advantage"] for row in step], expected_advantages(parts, 4), atol=1e-4)


def test_a_rewriter_trains_in_front_of_a_frozen_janus(toy, tiny_janus, tmp_path):
    options = ["--sdmodel_name", tiny_janus, "--max_steps", 1, "--save_strategy", "no"]
    assert main("--config", toy.config, "--outdir", tmp_path / "run", *options) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["sdmodel_name"] == str(tiny_janus)
    step = rollouts(tmp_path / "run")[1]
    assert any(row["seeds"] for row in step) and all(row["tokens"] for row in step if row["rewrite"])


def test_three_batches_without_scores_stop_the_run_with_code_1(toy, tmp_path, monkeypatch, capfd):
    import rewards

    monkeypatch.setitem(rewards.REWARDS, "dead", lambda *_: Scripted("dead", lambda i: None))
    options = ["--rewards", "dead", "--max_steps", 9, "--save_strategy", "no"]
    assert main("--config", toy.config, "--outdir", tmp_path / "run", *options) == 1
    assert sorted(rollouts(tmp_path / "run")) == [1, 2, 3]
    assert "max_absent_share" in capfd.readouterr().err.splitlines()[-1]


BAD = {
    "missing data": (["--data", "nowhere.txt"], "nowhere.txt"),
    "unknown reward": (["--rewards", "hsp"], "did you mean 'hps'"),
    "reward weights": (["--reward_weights", "1", "2"], "[1.0, 2.0]"),
    "unknown flag": (["--learning_rat", "1"], "did you mean '--learning_rate'"),
    "ill-typed value": (["--num_generations", "eight"], "'eight'"),
    "group not whole": (["--num_generations", "3"], "num_generations (3)"),
    "too few prompts": (["--gradient_accumulation_steps", "64"], "4 prompts, fewer than the 64"),
    "save in mid-cycle": (["--num_iterations", "2"], "save_steps 1"),
    "step over two generations": (["--steps_per_generation", "1"], "gradient_accumulation_steps 2"),
    "renamed option": (["--output_dir", "elsewhere"], "--outdir"),
    "no such policy": (["--gpt_path", "/nowhere/policy"], "/nowhere/policy"),
    "a server slower than its fellows wait": (
        ["--sdmodel_name", "http://127.0.0.1:9/v1", "--ddp_timeout", "1800"],
        "1800",
    ),
    "no such renderer": (["--sdmodel_name", "/nowhere/flux"], "/nowhere/flux"),
    "no such checkpoint": (["--resume", "checkpoint-5"], "has none"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_with_the_value_and_code_2(toy, tmp_path, capfd, bad):
    options, named = BAD[bad]
    assert main("--config", toy.config, "--outdir", tmp_path / "run", *options) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "r1_prompter: error:" in line]
    assert len(said) == 1 and named in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 1\n", "did you mean 'learning_rate'"),
        ("num_generations: 8.5\n", "'8.5'"),
        ("- a\n", "list"),
        ("a: [\n", "YAML"),
    ],
)
def test_a_bad_yaml_is_one_line_and_code_2(tmp_path, capfd, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    assert main("--config", tmp_path / "bad.yaml", "--outdir", tmp_path / "run", "--data", "x.txt") == 2
    assert named in capfd.readouterr().err


def test_an_empty_prompt_file_and_a_missing_yaml_are_named(toy, tmp_path, capfd):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main("--config", toy.config, "--data", tmp_path / "empty.txt", "--outdir", tmp_path / "run") == 2
    assert "empty.txt" in capfd.readouterr().err
    assert main("--config", "nowhere.yaml", "--outdir", tmp_path / "run") == 2
    assert "nowhere.yaml" in capfd.readouterr().err


def test_a_group_split_over_two_processes_is_refused_with_the_numbers():
    import r1_prompter

    training = SimpleNamespace(num_generations=8, per_device_train_batch_size=2, steps_per_generation=2)
    with pytest.raises(r1_prompter.UserError, match="2 x steps_per_generation 2 = 4 .* num_generations 8"):
        r1_prompter.plan(None, training, prompts=100)


def test_all_missing_checkpoints_of_the_documented_command_are_named_at_once(tmp_path):
    command = [*SCRIPT, "--data", "data/generation_prompts_1k_filterd.txt", "--outdir", str(tmp_path / "run")]
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    for word in ("Qwen/Qwen2.5-3B-Instruct", "6.2 GB", "FLUX.1-dev", "34 GB", "Non-Commercial", "HPS_v2.1", "2.0 GB"):
        assert word in last


def test_the_recipe_holds_for_the_bare_command_and_yields_to_yaml_and_flags(tmp_path):
    import r1_prompter

    bare = ["--data", "x", "--outdir", "y"]
    (tmp_path / "own.yaml").write_text("learning_rate: 1e-5\ntemperature: 0.7\nrewards: hps\n")
    recipe = yaml.safe_load((ROOT / "configs" / "flux_dev.yaml").read_text())
    known = {
        name: value for part in vars(r1_prompter.parse_options(bare)).values() for name, value in vars(part).items()
    }
    for key, value in recipe.items():
        assert known[key] == ([value] if key == "report_to" else value), key
    argv = [*bare, "--config", str(tmp_path / "own.yaml"), "--temperature", "0.9"]
    options = r1_prompter.parse_options(argv)
    assert (options.training.learning_rate, options.training.temperature) == (1e-5, 0.9)
    assert options.script.rewards == ["hps"]
    assert options.training.model_init_kwargs["dtype"] == options.model.dtype == "bfloat16"


def test_every_yaml_loads(monkeypatch):
    import r1_prompter
    import sft
    from tests.test_pref_grpo import RECIPES as FLOW_RECIPES
    from tests.test_t2i_r1 import RECIPES as JANUS_RECIPES

    monkeypatch.setattr("run.options.need", lambda package, asker: None)
    for path in (ROOT / "configs").glob("*.yaml"):
        if not path.name.startswith("deepspeed") and path.stem not in {
            **FLOW_RECIPES,
            **JANUS_RECIPES,
            "miniature_app": 1,
        }:
            program = sft if "cold_start" in path.name else r1_prompter
            program.parse_options(["--config", str(path), "--data", "x", "--outdir", "y"])
    for path in (ROOT / "deepspeed_2.yaml", ROOT / "configs" / "deepspeed_2_cpu.yaml"):
        assert yaml.safe_load(path.read_text())["deepspeed_config"]["zero_stage"] == 2


def test_a_folder_of_another_run_or_of_something_else_is_refused(tmp_path):
    def folder(name: str, resume: str | None = None, **config) -> RunFolder:
        return RunFolder(tmp_path / name, config, may_differ={"outdir"}, resume=resume)

    mine = folder("run", seed=1, outdir="a")
    mine.plan()
    mine.start({}, ["r1_prompter.py", "--hub_token", "secret", "--api_key=secret"], None)
    record = tmp_path / "run" / "run.json"
    assert "secret" not in record.read_text()
    folder("run", seed=1, outdir="b").plan()  # where it writes is not what it is
    assert folder("run", seed=1, resume="auto").plan().step == 0  # nothing was saved yet: from the beginning
    with pytest.raises(UserError, match="seed 1 -> 2"):
        folder("run", seed=2).plan()
    record.write_text(json.dumps({"commit": "a5c5730", "config_hash": mine.config_hash, "config": {}}))
    with pytest.raises(UserError, match="a5c5730"):  # options had other names then
        folder("run", seed=1).plan()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        folder("other", seed=1).plan()


def test_a_run_is_not_resumed_on_other_models_behind_the_same_paths(toy, tmp_path, capfd):
    run, models = tmp_path / "run", {"gpt_path": toy.policy, "sdmodel_name": toy.flux, "hps_path": toy.hps}
    copies = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in models.items()}
    flags = [word for name, folder in copies.items() for word in (f"--{name}", folder)]
    command = ["--config", toy.config, *flags, "--rewards", "format", "--held_out", "hps", "--outdir", run]
    assert main(*command) == 0
    shutil.rmtree(run / "checkpoint-2")  # as if it had been stopped
    was = json.loads((run / "run.json").read_text())["contents"]
    for name, folder in copies.items():
        weights = next(folder.rglob("*.safetensors"))
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + b"\7")
        assert main(*command, "--resume") == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert was[name][1] in said and contents_of({name: folder})[name][1] in said and str(folder) in said
        weights.write_bytes(before)
    assert main(*command, "--resume") == 0


@pytest.mark.slow
def test_a_killed_run_resumes_at_its_newest_checkpoint_and_logs_each_step_once(toy, tmp_path):
    run = tmp_path / "run"
    steps = 30
    command = [*SCRIPT, "--config", str(toy.config), "--outdir", str(run), "--max_steps", str(steps)]
    program = command[1:]
    kill_when(lambda: bool(list(run.glob("checkpoint-*/manifest.json"))) and len(rollouts(run)) >= 3, command)
    before = rollouts(run)
    done = run_forked(*program, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]

    record = json.loads((run / "run.json").read_text())
    assert 1 <= record["resumed_from_step"] < steps and record["derived"]["images"] == 8 * steps
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, steps + 1))
    after = rollouts(run)
    assert list(after) == list(range(1, steps + 1)) and after[1] == before[1]
    for step, group in after.items():
        for row in group:
            assert row["seeds"] == ([render_seed(42, row["prompt_id"], step, 0)] if row["rewrite"] else [])
    names = {name for group in after.values() for row in group for name in row["images"] if name}
    assert names and all(hashlib.sha256((run / name).read_bytes()).hexdigest()[:20] in name for name in names)
    assert "seconds/train" in rows(run / "metrics.jsonl")[-1] and f"step {steps}/{steps}" in done.stdout
    assert all((run / name).exists() for name in ("report.html", "model.safetensors", "tokenizer.json", "tensorboard"))
    again = run_forked(*program)
    assert again.returncode == 2 and "--resume" in again.stderr.splitlines()[-1]
    finished = run_forked(*program, "--resume")
    assert finished.returncode == 2 and "is complete" in finished.stderr.splitlines()[-1]
    assert len(rows(run / "metrics.jsonl")) == steps


@pytest.mark.slow
def test_two_processes_under_zero_2_agree_on_the_weights_and_hold_whole_groups(toy, tmp_path):
    options = [tmp_path / "two.json", "--config", toy.config, "--outdir", tmp_path / "run"]
    done = launch(ROOT / "tests" / "launch_two.py", *options)
    first, second = json.loads((tmp_path / "two.json").read_text())
    assert first["weights"] == second["weights"]
    for ids in (first["prompt_ids"], second["prompt_ids"]):
        assert len(ids) == 8 and all(len(set(ids[i : i + 4])) == 1 for i in (0, 4))
    assert not set(first["prompt_ids"]) & set(second["prompt_ids"])
    assert len(rollouts(tmp_path / "run")[2]) == 16 and len(rows(tmp_path / "run" / "metrics.jsonl")) == 2
    assert done.stdout.count("report:") == 1


@pytest.mark.slow
def test_two_machines_make_one_run_and_a_wrong_rank_is_named(toy, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GPUS_PER_NODE": "1"}
    paths = {"DATA": toy.prompts, "GPT_PATH": toy.policy, "SDMODEL_NAME": toy.flux, "OUTDIR": tmp_path / "run"}
    script = {name: str(path) for name, path in paths.items()} | {"ACCELERATE_CONFIG": str(ZERO_2)}
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"

    def machine(rank: int) -> subprocess.Popen:
        environment = {**ENVIRONMENT, **machines, **script, "NODE_RANK": str(rank), "PATH": path}
        command = [ROOT / "scripts" / "run_multinode.sh", "--config", toy.config]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    both = [machine(rank) for rank in (0, 1)]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert [out.count("report:") for out, _ in said] == [1, 0]
    assert len(rollouts(tmp_path / "run")[2]) == 16 and len(rows(tmp_path / "run" / "metrics.jsonl")) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["derived"]["processes"] == 2
    refused = machine(2)
    assert "NODE_RANK is 2 of NNODES 2" in refused.communicate(timeout=30)[1] and refused.returncode == 2
