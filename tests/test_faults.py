"""Claims about runs that are killed, starved, lied to or misconfigured: they go on correctly or stop, and say why.

Each fault is a real one: a signal, a damaged file, a full file system, a server that misbehaves, a NaN in the loss.
The table in docs/reliability.md names the test of each. pytest tests/test_faults.py
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miniature.judge_server import JudgeServer
from prompting import SYSTEM_PROMPT
from run import checkpoints
from run.checkpoints import ResumeKey
from tests.processes import ENVIRONMENT, ROOT, launcher, run_forked

pytestmark = pytest.mark.slow

TRAIN, FAULTY = ROOT / "r1_prompter.py", ROOT / "tests" / "fault_run.py"
STEPS, SAVE = 7, 3  # two steps an epoch: checkpoints lie inside an epoch and at its end
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]


def run(program: Path, toy, outdir: Path, *options: object, processes: int = 1) -> subprocess.CompletedProcess:
    """One run of the trainer on the toy stack, alone or as two processes under ZeRO-2; whatever comes of it."""
    line = command(program, toy, outdir, *options, processes=processes)
    if processes == 1:
        return run_forked(*line[1:])
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def command(program: Path, toy, outdir: Path, *options: object, processes: int = 1) -> list[str]:
    fault = [options[:3], options[3:]] if program == FAULTY else [[], options]
    usual = ["--config", toy.config, "--outdir", outdir, "--max_steps", STEPS, "--save_steps", SAVE]
    words = [*fault[0], *usual, *fault[1]]
    return launcher(program, *words) if processes > 1 else [sys.executable, str(program), *map(str, words)]


def last_error(done: subprocess.CompletedProcess) -> str:
    return [line for line in done.stderr.splitlines() if "error: " in line][-1]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(outdir: Path) -> dict:
    """All that a run was: weights, every rollout with its scores, every logged number but the times."""
    weights = list(outdir.glob("*.safetensors"))
    assert weights, f"{outdir} has no policy"
    timed = ("seconds", "step_time", "tokens_per_second")
    logged = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(outdir / "metrics.jsonl")]
    return {
        "weights": {name: tensor for path in weights for name, tensor in load_file(path).items()},
        "rollouts": {path.name: rows(path) for path in sorted((outdir / "rollouts").iterdir())},
        "metrics": logged,
    }


def assert_same_run(one: Path, other: Path) -> None:
    left, right = record(one), record(other)
    assert len(left["rollouts"]) == STEPS and left["rollouts"] == right["rollouts"]
    assert left["metrics"] == right["metrics"]
    assert left["weights"].keys() == right["weights"].keys()
    assert all(torch.equal(tensor, right["weights"][name]) for name, tensor in left["weights"].items())


def whole(outdir: Path) -> list[int]:
    """Steps of the checkpoints that are what their manifests say, newest first."""
    resume_key = ResumeKey(manifest(checkpoints.found(outdir)[-1])["config_hash"])
    good = [c for c in checkpoints.found(outdir) if checkpoints.problem_with(c, resume_key, contents=True) is None]
    return [checkpoints.step_of(checkpoint) for checkpoint in good]


def manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / checkpoints.MANIFEST).read_text())


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory) -> Path:
    """A run of one process that nothing happens to."""
    outdir = tmp_path_factory.mktemp("reference") / "run"
    done = run(TRAIN, toy, outdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return outdir


@pytest.fixture
def stopped(toy, tmp_path, reference) -> Path:
    """The reference as it lay there when its process was gone after step 6: checkpoints 3 and 6, no policy."""
    outdir = tmp_path / "run"
    shutil.copytree(reference, outdir)
    shutil.rmtree(outdir / f"checkpoint-{STEPS}")
    for path in outdir.glob("*.safetensors"):
        path.unlink()
    return outdir


# Killed and told to leave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "adapter"), [(1, False), (1, True), (2, False)], ids=["1-full", "1-lora", "2-full"]
)
def test_a_run_killed_while_drawing_continues_bit_for_bit(toy, tmp_path, processes, adapter):
    more = LORA if adapter else []
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run(TRAIN, toy, undisturbed, *more, processes=processes).returncode == 0
    done = run(FAULTY, toy, killed, "kill_drawing", 5, processes - 1, *more, processes=processes)
    assert done.returncode != 0 and whole(killed) == [3] and len(list((killed / "rollouts").iterdir())) == 4
    done = run(TRAIN, toy, killed, "--resume", *more, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing after step 3, from" in done.stdout and "checkpoint-3" in done.stdout
    assert_same_run(undisturbed, killed)


@pytest.mark.parametrize(
    ("fault", "at", "code", "saved"),
    [
        ("terminate_drawing", 5, 143, 4),  # at the end of an epoch
        ("terminate_training", 9, 143, 5),  # two micro-batches a step: the step is finished first
        ("interrupt_drawing", 3, 130, 2),
    ],
)
def test_a_run_told_to_leave_saves_what_it_had_and_continues_bit_for_bit(
    toy, tmp_path, reference, fault, at, code, saved
):
    done = run(FAULTY, toy, tmp_path / "run", fault, at, 0)
    assert done.returncode == code and f"told to leave after step {saved}" in done.stdout
    assert whole(tmp_path / "run")[0] == saved
    assert run(TRAIN, toy, tmp_path / "run", "--resume").returncode == 0
    assert_same_run(reference, tmp_path / "run")


def test_a_run_told_to_save_saves_at_the_next_step_and_goes_on_unchanged(toy, tmp_path, reference):
    done = run(FAULTY, toy, tmp_path / "run", "save_drawing", 5, 0)
    assert done.returncode == 0 and whole(tmp_path / "run") == [7, 6, 5]  # the recipe keeps three
    assert_same_run(reference, tmp_path / "run")


def test_one_process_told_to_leave_takes_the_other_along(toy, tmp_path):
    done = run(FAULTY, toy, tmp_path / "run", "terminate_drawing", 5, 1, processes=2)
    assert done.returncode != 0 and "told to leave after step 4" in done.stdout
    assert whole(tmp_path / "run") == [4, 3]


def test_a_launcher_told_to_leave_leaves_a_checkpoint(toy, tmp_path):
    outdir = tmp_path / "run"
    line = command(TRAIN, toy, outdir, "--max_steps", 2000, "--save_steps", 2000, processes=2)
    with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as it:
        until = time.monotonic() + 400
        while not (outdir / "rollouts" / "step_000002.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert (outdir / "rollouts" / "step_000002.jsonl").exists(), "it did not start"
        it.send_signal(signal.SIGTERM)
        it.wait(60)
    assert whole(outdir)[0] >= 1


# Checkpoints that are not what they seem ---------------------------------------------------------------------------


def test_a_run_killed_while_saving_leaves_no_half_checkpoint(toy, tmp_path, reference):
    done = run(FAULTY, toy, tmp_path / "run", "kill_saving", 2, 0)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / checkpoints.STAGING / "checkpoint-6").is_dir() and whole(tmp_path / "run") == [3]
    assert run(TRAIN, toy, tmp_path / "run", "--resume").returncode == 0
    assert_same_run(reference, tmp_path / "run")
    assert not (tmp_path / "run" / checkpoints.STAGING).exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "half-written": (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
    "one bit flipped": (lambda c: flip(c / "model.safetensors"), "model.safetensors is corrupt: SHA-256"),
    "a file gone": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "manifest spoilt": (lambda c: cut(c / "manifest.json"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(toy, stopped, reference, what):
    damage, reason = DAMAGE[what]
    damage(stopped / "checkpoint-6")
    done = run(TRAIN, toy, stopped, "--resume", "--save_strategy", "steps")
    assert done.returncode == 0, done.stderr[-2000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("passed over checkpoint-")]
    assert len(passed) == 1 and reason in passed[0] and "continuing after step 3" in done.stdout
    assert_same_run(reference, stopped)


def test_a_foreign_checkpoint_is_passed_over_with_its_reason(toy, stopped, tmp_path):
    assert run(TRAIN, toy, tmp_path / "other", "--seed", 1).returncode == 0
    shutil.copytree(tmp_path / "other" / "checkpoint-7", stopped / "checkpoint-7")
    done = run(TRAIN, toy, stopped, "--resume")
    assert done.returncode == 0 and "passed over checkpoint-7: it is of another configuration" in done.stdout
    assert "continuing after step 6" in done.stdout


def test_when_no_checkpoint_is_good_each_is_named_and_nothing_is_touched(toy, stopped):
    flip(stopped / "checkpoint-6" / "optimizer.pt")
    flip(stopped / "checkpoint-3" / "optimizer.pt")
    before = sorted(path.name for path in stopped.rglob("*"))
    done = run(TRAIN, toy, stopped, "--resume")
    assert done.returncode == 2
    assert "checkpoint-6: optimizer.pt is corrupt" in last_error(done) and "checkpoint-3: opt" in last_error(done)
    assert sorted(path.name for path in stopped.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--learning_rate", "2e-3"], "learning_rate 0.001 -> 0.002"),
        (["--resume", "checkpoint-4"], "has checkpoint-6, checkpoint-3"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused_with_both_values(toy, stopped, options, reason):
    done = run(TRAIN, toy, stopped, "--resume", *options)
    assert done.returncode == 2 and reason in last_error(done)


def test_other_data_under_the_same_name_is_refused(toy, stopped):
    original = toy.prompts.read_bytes()
    try:
        toy.prompts.write_bytes(original + b"a photo of a green dog\n")
        done = run(TRAIN, toy, stopped, "--resume")
    finally:
        toy.prompts.write_bytes(original)
    assert done.returncode == 2 and "data_hash" in last_error(done)


def test_another_number_of_processes_is_refused_with_both_numbers(toy, stopped):
    done = run(TRAIN, toy, stopped, "--resume", processes=2)
    assert done.returncode != 0 and "num_processes 1 -> 2" in last_error(done)


def test_a_named_checkpoint_is_continued_from(toy, stopped, reference):
    done = run(TRAIN, toy, stopped, "--resume", "checkpoint-3")
    assert done.returncode == 0 and "continuing after step 3" in done.stdout
    assert_same_run(reference, stopped)


def test_resuming_where_there_is_nothing_yet_starts_and_says_so(toy, tmp_path):
    done = run(TRAIN, toy, tmp_path / "run", "--resume", "auto", "--max_steps", 1)
    assert done.returncode == 0 and "starting at step 0" in done.stdout


def test_pruning_keeps_the_newest_good_checkpoint_and_what_it_does_not_know(tmp_path):
    resume_key = ResumeKey("c")
    for step in (9, 10, 20, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(step))
        checkpoints.write_manifest(folder, step, resume_key)
    cut(tmp_path / "checkpoint-30" / "manifest.json")
    assert [path.name for path in checkpoints.prune(tmp_path, resume_key, keep=1)] == ["checkpoint-10", "checkpoint-9"]
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-30", "checkpoint-20"]
    assert checkpoints.prune(tmp_path, resume_key, keep=0) == []  # never the last good one


def test_a_run_keeps_as_many_checkpoints_as_it_is_told(toy, tmp_path):
    done = run(TRAIN, toy, tmp_path / "run", "--save_steps", 1, "--save_total_limit", 2)
    assert done.returncode == 0 and whole(tmp_path / "run") == [7, 6]


# Numbers -----------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_on_all_processes_and_counted(toy, tmp_path):
    outdir = tmp_path / "run"
    options = ["--max_steps", 2, "--save_steps", 1]
    done = run(FAULTY, toy, outdir, "nan_loss", 2, 1, *options, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["steps/skipped"] for row in rows(outdir / "metrics.jsonl")] == [0.0, 1.0]
    before, after = (load_file(outdir / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(toy, tmp_path):
    done = run(FAULTY, toy, tmp_path / "run", "nan_loss", "2+", 0)
    assert done.returncode == 1 and "3 optimiser steps in a row is not finite" in last_error(done)
    assert "learning_rate 0.001" in last_error(done)


def test_a_reward_that_fails_on_one_process_stops_all_with_its_reason(toy, tmp_path):
    done = run(FAULTY, toy, tmp_path / "run", "fail_scoring", 3, 1, processes=2)
    assert done.returncode != 0
    assert "process 1: scoring failed (RuntimeError: the reward's device fell off the bus)" in last_error(done)
    assert whole(tmp_path / "run") == [2]  # what had been learnt is not lost


def test_groups_that_all_score_alike_raise_an_alarm_and_not_a_stop(toy, tmp_path):
    with JudgeServer(lambda samples: [0.5 for _ in samples]) as url:
        options = ["--rewards", "judge", "--judge_model", "miniature", "--judge_url", url]
        done = run(TRAIN, toy, tmp_path / "run", *options)
    assert done.returncode == 0 and done.stderr.count("every group's members scored alike") == 1
    assert {row["groups/equal"] for row in rows(tmp_path / "run" / "metrics.jsonl")} == {1.0}


# Judges ------------------------------------------------------------------------------------------------------------


class Mortal(JudgeServer):
    """A judge that answers its first questions and then closes the door, as `what` says."""

    def __init__(self, first: int, fate: tuple):
        super().__init__(lambda samples: [0.5 for _ in samples])
        self.left, self.fate = first, fate

    def _reply(self, body, fate):
        self.left -= 1
        return super()._reply(body, fate) if self.left >= 0 else self.fate


@pytest.mark.parametrize("fate", [(500, {}), (200, {"choices": []})], ids=["an error", "no answer"])
def test_a_judge_that_stops_judging_stops_the_run_with_its_share(toy, tmp_path, fate):
    with Mortal(6, fate) as url:
        options = ["--rewards", "judge", "--judge_model", "miniature", "--judge_url", url, "--judge_timeout", 1]
        done = run(TRAIN, toy, tmp_path / "run", *options)
    assert done.returncode == 1 and "missing: judge in 100%" in last_error(done)
    assert SYSTEM_PROMPT[:40] not in done.stderr and max(map(len, done.stderr.splitlines())) < 400  # no dump of a chat
    last = max((tmp_path / "run" / "rollouts").iterdir())
    assert all(row["total"] is None and row["advantage"] == 0 for row in rows(last) if row["rewrite"])


def test_a_run_told_to_leave_does_not_wait_for_its_judge(toy, tmp_path):
    asked, judged = threading.Event(), []
    slow = JudgeServer(
        lambda samples: judged.extend(samples) or [0.5 for _ in samples], delay=60, watch=lambda *_: asked.set()
    )
    with slow as url:
        options = ["--rewards", "judge", "--judge_model", "miniature", "--judge_url", url]
        line = command(TRAIN, toy, tmp_path / "run", *options)
        with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as it:
            assert asked.wait(120)
            it.send_signal(signal.SIGTERM)
            said = it.communicate(timeout=120)[0]
        assert not judged, "it waited for the judge"
    assert it.returncode == 143 and "told to leave after step 0" in said


# Disk, loggers, time ------------------------------------------------------------------------------------------------


def on_small_disk(where: Path, line: list[str]) -> subprocess.CompletedProcess:
    """Run `line` with a file system of 24 MB mounted at `where`; what is left there is copied to `where`-after."""
    where.mkdir()
    words = " ".join(f"'{word}'" for word in line)
    script = f"mount -t tmpfs -o size=24m none {where} && {words}; code=$?; cp -r {where} {where}-after; exit $code"
    isolated = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(isolated, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def test_a_full_disk_costs_the_pictures_and_nothing_else(toy, tmp_path, reference):
    line = command(FAULTY, toy, tmp_path / "disk" / "run", "fill_with_pictures", 4, 0)
    done = on_small_disk(tmp_path / "disk", line)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pictures deleted" in done.stderr
    after = tmp_path / "disk-after" / "run"
    assert not list((after / "images").iterdir()) and whole(after) == [7, 6, 3]
    for step in (4, 5, 6, 7):  # their rows are there, without pictures
        kept = rows(after / "rollouts" / f"step_{step:06d}.jsonl")
        assert {name for row in kept for name in row["images"]} == {None}
    strip = [{**row, "images": None} for path in sorted((after / "rollouts").iterdir()) for row in rows(path)]
    usual = [{**row, "images": None} for path in sorted((reference / "rollouts").iterdir()) for row in rows(path)]
    assert strip == usual


def test_a_disk_full_for_good_stops_the_run_and_keeps_the_last_checkpoint(toy, tmp_path):
    line = command(FAULTY, toy, tmp_path / "disk" / "run", "fill_disk", 4, 0)
    done = on_small_disk(tmp_path / "disk", line)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "free some space, then continue with --resume; the last checkpoint is checkpoint-3" in last_error(done)
    assert whole(tmp_path / "disk-after" / "run") == [3]


def test_a_logger_that_fails_is_told_once_and_training_goes_on(toy, tmp_path, reference):
    (tmp_path / "blocked").write_text("a file where TensorBoard wants its folder")
    environment = {**ENVIRONMENT, "TENSORBOARD_LOGGING_DIR": str(tmp_path / "blocked")}
    done = run_forked(*command(TRAIN, toy, tmp_path / "run")[1:], environment=environment)
    assert done.returncode == 0 and done.stderr.count("TensorBoardCallback failed") == 1
    assert_same_run(reference, tmp_path / "run")


def test_a_phase_beyond_its_budget_writes_every_stack_and_the_heartbeat_names_it(toy, tmp_path):
    outdir = tmp_path / "run"
    line = command(FAULTY, toy, outdir, "hang_scoring", 2, 0, "--phase_budget", 2)
    with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as it:
        until = time.monotonic() + 120
        stacks = outdir / "stacks_0.txt"
        while not (stacks.exists() and "fault_run.py" in stacks.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        beat = json.loads((outdir / "heartbeat_0.json").read_text())
        assert it.wait(60) == 0  # nothing is killed
    assert (beat["phase"], beat["step"]) == ("score hps", 2) and "Timeout (0:00:02)" in stacks.read_text()


def test_a_folder_that_cannot_be_written_is_named(toy, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(TRAIN, toy, tmp_path / "file" / "run")
    assert done.returncode == 2 and "cannot be written" in last_error(done) and "file/run" in last_error(done)


def test_the_table_of_faults_names_every_test_of_this_file_and_none_that_is_not_there():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    files = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    tests = {file: set(re.findall(r"^def (test_\w+)", text, re.MULTILINE)) for file, text in files.items()}
    here = tests[Path(__file__).stem]
    assert named <= files.keys() | set().union(*tests.values())
    assert here - named == {"test_the_table_of_faults_names_every_test_of_this_file_and_none_that_is_not_there"}
