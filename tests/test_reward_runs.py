"""Claims about whole runs with many rewards: the real trainer on the miniature, with a judge that misbehaves."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from errors import UserError
from interfaces import Prompt, Reward, Sample
from miniature.fit import WEIGHTS
from miniature.judge_server import JudgeServer
from rewards import REWARDS, RewardContext, RewardOptions, build, check
from rewards.offload import describe, offloaded
from rewards.orm import ORM
from tests.processes import launch, run_forked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ["--config", "configs/miniature.yaml", "--save_strategy", "no"]
LOCAL = ("hps", "git", "gdino", "orm", "imagereward", "pickscore")


@pytest.fixture(scope="module")
def orm() -> ORM:
    return ORM(WEIGHTS / "orm", device="cpu", dtype="float32")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rollouts(run: Path) -> list[dict]:
    return [row for path in sorted((run / "rollouts").glob("*.jsonl")) for row in rows(path)]


def train(*options: object, processes: Path | None = None) -> subprocess.CompletedProcess:
    """One training on the miniature, alone or under the accelerate configuration `processes`."""
    if processes is not None:
        return launch(ROOT / "r1_prompter.py", *MINIATURE, *options, config=processes)
    done = run_forked("r1_prompter.py", *MINIATURE, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def local_options() -> RewardOptions:
    paths = {f"{name}_path": str(WEIGHTS / name) for name in LOCAL}
    return RewardOptions(**paths, orm_dtype="float32")


def test_a_run_finishes_with_a_judge_that_fails_a_fifth_and_babbles_a_fifth_of_the_time(orm, tmp_path):
    run = tmp_path / "run"
    options = ["--outdir", run, "--rewards", "hps", "git", "orm", "preference", "--reward_weights", 1, 1, 1, 1]
    options += ["--preference_pairs", "anchor", "--max_steps", 2, "--per_device_train_batch_size", 16]
    with JudgeServer(orm, fail_share=0.2, garbage_share=0.2) as url:
        train(*options, "--judge_url", url)  # two processes: tests/test_pref_grpo.py
    scored = rollouts(run)
    absent = [row for row in scored if row["total"] is None]
    assert len(scored) == 2 * 16 and 0 < len(absent) < len(scored) / 2
    for row in absent:  # no part of an absent sample is a number, and nothing is learnt from it
        assert set(row["parts"].values()) == {None} and row["advantage"] == 0
    for row in scored:
        assert row in absent or all(math.isfinite(part) for part in row["parts"].values())
    logged = rows(run / "metrics.jsonl")
    assert len(logged) == 2 and sum(row["preference/unparsable"] for row in logged) > 0
    for row in logged:
        assert {"preference/asked", "preference/failed", "preference/failed_pairs", "samples/absent"} <= set(row)
        assert 0 <= row["preference/first_position"] <= 1 and 0 <= row["preference/win_rate_vs_raw"] <= 1
    assert sum(row["samples/absent"] for row in logged) / 2 == pytest.approx(len(absent) / len(scored))


def test_rewards_are_whole_and_score_the_same_under_zero_3(tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "deepspeed_2_cpu.yaml").read_text())
    config["deepspeed_config"] |= {"zero_stage": 3, "zero3_init_flag": True}
    (tmp_path / "zero_3.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    options = ["--outdir", run, "--rewards", *LOCAL, "--reward_weights", *[1] * len(LOCAL), "--max_steps", 1]
    options += ["--per_device_train_batch_size", 8, "--orm_dtype", "float32"]
    train(*options, processes=tmp_path / "zero_3.yaml")
    drawn = [row for row in rollouts(run) if row["rewrite"] is not None]
    assert drawn
    from data.grammar import read

    samples = [Sample(read(row["prompt"]), "", "", (Image.open(run / row["images"][0]),)) for row in drawn]
    for reward in build(LOCAL, local_options(), RewardContext()):
        expected = reward(samples)
        assert [row["parts"][reward.name] for row in drawn] == pytest.approx(expected, abs=1e-3), reward.name


def test_all_ten_rewards_and_a_held_out_one_run_together_and_say_what_they_cost(orm, tmp_path):
    run = tmp_path / "run"
    names = [name for name in REWARDS if name not in ("pickscore", "ocr")]
    options = ["--outdir", run, "--rewards", *names, "--reward_weights", *[1] * len(names), "--held_out", "pickscore"]
    options += ["--multi_objective_aggregation", "normalize_then_sum", "--preference_pairs", 2, "--max_steps", 1]
    options += ["--per_device_train_batch_size", 16, "--length_high", 30, "--length_low", 4, "--reward_offload"]
    with JudgeServer(orm) as url:
        done = train(*options, "--judge_url", url)
    for row in rollouts(run):
        assert list(row["parts"]) == names and list(row["held_out"]) == ["pickscore"]
        assert row["total"] is not None
    (logged,) = rows(run / "metrics.jsonl")
    for name in names:
        assert {f"rewards/{name}/mean", f"rewards/{name}/spread", f"rewards/{name}/zero_spread"} <= set(logged)
    assert {"held_out/pickscore/mean", "correlation/hps~git", "rewrites/distinct_2"} <= set(logged)
    assert "rewards/pickscore/mean" not in logged
    for name in LOCAL:
        cut = "" if name == "orm" else r"; reads \d+ tokens of a prompt, which cuts 0 of \d+ prompts"
        assert re.search(rf"{name}: .* M parameters, .* MiB in (float32|bfloat16) on cpu{cut}\n", done.stdout)
    report = (run / "report.html").read_text()
    assert "Reward part: git" in report and "Reward part: preference" not in report  # it is 0.5 by construction
    assert (run / "verdicts_0.sqlite").exists()


def test_a_reward_is_loaded_only_when_it_is_named():
    options = RewardOptions(hps_path=str(WEIGHTS / "hps"), orm_path="/nowhere", judge_url="http://127.0.0.1:9/v1")
    assert [reward.name for reward in build(["hps", "format"], options, RewardContext())] == ["hps", "format"]


def test_all_missing_rewards_are_named_at_once_with_their_size_licence_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    options = RewardOptions(git_path="/nowhere/git", judge_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError) as caught:
        build(["git", "gdino", "orm", "imagereward", "pickscore", "judge"], options, RewardContext())
    for word in ("/nowhere/git", "hf download IDEA-Research/grounding-dino-tiny", "CaraJ/ORM-T2I-R1 (16 GB",
                 "ImageReward", "PickScore_v1", "scripts/serve_judge.sh"):  # fmt: skip
        assert word in str(caught.value)


def test_judges_that_may_hold_a_process_for_half_of_the_process_groups_timeout_are_refused():
    options = RewardOptions(judge_batch_timeout=900)
    check(["hps", "judge", "preference"], options, ddp_timeout=5401)
    with pytest.raises(UserError, match="2700 s .* ddp_timeout 5400"):
        check(["hps", "judge", "preference"], options, ddp_timeout=5400)
    check(["hps"], options, ddp_timeout=60)  # nobody is asked


BAD = {
    "no judge there": (["--rewards", "judge"], "scripts/serve_judge.sh"),
    "plain http to another machine": (["--rewards", "judge", "--judge_url", "http://example.org/v1"], "https"),
    "unknown formula": (["--rewards", "git", "--reward_formula", "foo"], "'foo'"),
    "weights of another model": (["--rewards", "gdino", "--gdino_path", "miniature/weights/git"], "weights/git"),
    "held out and trained on": (["--rewards", "hps", "--held_out", "hps"], "named twice"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_reward_options_are_one_line_with_code_2_and_leave_nothing_behind(bad, tmp_path, capfd, monkeypatch):
    import r1_prompter

    monkeypatch.chdir(ROOT)
    options, named = BAD[bad]
    run = tmp_path / "run"
    argv = [*MINIATURE, "--outdir", str(run), "--reward_weights", "1", "--judge_url", "http://127.0.0.1:9/v1"]
    assert r1_prompter.main([*argv, *options]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "r1_prompter: error:" in line]
    assert len(said) == 1 and named in said[0]
    assert not run.exists()


class Model(Reward):
    """A reward that says on which device its weights were while it scored."""

    name, range = "model", (0.0, 1.0)

    def __init__(self, fails: bool = False):
        self.model, self.device, self.fails = torch.nn.Linear(4, 2), torch.device("meta"), fails

    def __call__(self, samples):
        self.metrics = {"model/on_meta": float(self.model.weight.is_meta)}
        if self.fails:
            raise ValueError("a picture is missing")
        return [0.5 for _ in samples]


def test_an_offloaded_reward_is_on_its_device_only_while_it_scores(monkeypatch):
    moves = []
    reward = Model()
    monkeypatch.setattr(reward.model, "to", lambda device: moves.append(str(device)))
    outside = offloaded(reward)
    assert moves == ["cpu"] and outside([Sample(Prompt("a cat"), "", "")]) == [0.5]
    assert moves == ["cpu", "meta", "cpu"] and "model/on_meta" in outside.metrics
    reward.fails = True
    with pytest.raises(ValueError, match="missing"):
        outside([])
    assert moves[-1] == "cpu"
    plain = build(["format"], RewardOptions(reward_offload=True), RewardContext())[0]
    assert describe(plain, ()) == "format: no weights on this device" and describe(reward, ()).startswith(
        "model: 0.0 M parameters, 0 MiB"
    )
