"""Claims about `run.Loop` and `run.Saver`, shown with a trainer that owns its loop (tests/toy_trainer.py), and about
`scoring.advantages`. pytest tests/test_loop.py
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from errors import Stopped
from run import checkpoints
from run.folder import RunFolder
from run.heartbeat import Heartbeat
from run.loop import PATIENCE, FiniteSteps
from run.saver import Saver
from scoring.advantages import advantages
from tests.processes import ENVIRONMENT, ROOT, launcher, run_forked

TOY, FAULTY, STEPS = ROOT / "tests" / "toy_trainer.py", ROOT / "tests" / "toy_fault.py", 10


def run(outdir: Path, *flags: str, fault: tuple = (), processes: int = 1) -> subprocess.CompletedProcess:
    program, words = FAULTY if fault else TOY, (*fault, outdir, STEPS, *flags)
    if processes == 1:
        return run_forked(program, *words)
    command = launcher(program, *words)
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def record(outdir: Path) -> tuple:
    """All that a run was, but the times."""
    weights = {name: tensor.tolist() for name, tensor in load_file(outdir / "model.safetensors").items()}
    rows = [json.loads(line) for line in (outdir / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in row.items() if k != "seconds_since_start"} for row in rows]
    rollouts = [path.read_text() for path in sorted((outdir / "rollouts").iterdir())]
    return weights, logged, rollouts


def saved(outdir: Path) -> list[str]:
    return [path.name for path in checkpoints.found(outdir)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    outdir = tmp_path_factory.mktemp("toy") / "run"
    done = run(outdir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert saved(outdir) == ["checkpoint-10", "checkpoint-9"]  # the newest two
    assert len(record(outdir)[1]) == STEPS
    return outdir


@pytest.mark.slow
def test_a_loop_killed_between_two_steps_ends_bit_for_bit_where_the_undisturbed_one_ends(undisturbed, tmp_path):
    assert run(tmp_path / "run", fault=("kill_between", 6)).returncode == -signal.SIGKILL
    assert saved(tmp_path / "run") == ["checkpoint-3"]
    done = run(tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing after step 3" in done.stdout
    assert record(tmp_path / "run") == record(undisturbed)


@pytest.mark.slow
def test_a_loop_told_to_leave_saves_the_step_that_is_done_and_continues_from_it(undisturbed, tmp_path):
    done = run(tmp_path / "run", fault=("terminate", 5))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-3000:]
    assert "told to leave after step 5" in done.stdout
    assert run(tmp_path / "run", "--resume").returncode == 0
    assert record(tmp_path / "run") == record(undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving_stops_the_run_and_costs_no_checkpoint(undisturbed, tmp_path):
    done = run(tmp_path / "run", fault=("full_disk", 6))
    assert done.returncode == 1 and "the last checkpoint is checkpoint-3" in done.stderr
    assert run(tmp_path / "run", "--resume").returncode == 0
    assert record(tmp_path / "run") == record(undisturbed)


@pytest.mark.slow
def test_two_processes_told_to_leave_save_the_step_that_is_done(tmp_path):
    done = run(tmp_path / "run", fault=("terminate", 5), processes=2)
    assert done.returncode == 1 and "told to leave after step 5" in done.stdout, done.stderr[-3000:]
    assert saved(tmp_path / "run") == ["checkpoint-5", "checkpoint-3"]


def test_a_save_that_fails_is_tried_once_more_in_place_of_the_pictures(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    folder.start({}, ["toy"], None)
    (tmp_path / "run" / "images").mkdir()
    (tmp_path / "run" / "images" / "one.png").write_bytes(b"a picture")
    tries = []

    def write(path: Path) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.mkdir(parents=True)

    saver = Saver(folder, Heartbeat(folder.path, 0, 60), None, lambda: 0)
    saver.save(4, write)
    assert len(tries) == 2 and saver.has(4) and not list((tmp_path / "run" / "images").iterdir())
    with pytest.raises(Stopped, match="checkpoint-4"):  # nothing is left to delete
        saver.save(5, lambda path: tries.clear() or write(path))


def test_a_gradient_that_is_not_finite_is_dropped_and_three_in_a_row_stop_the_run():
    finite, good, bad = FiniteSteps(), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert not finite.drop_bad_gradients([good]) and good.grad is not None
    assert finite.drop_bad_gradients([good, bad]) and good.grad is None and bad.grad is None
    for skipped in (True, True, False, *[True] * (PATIENCE - 1)):
        finite.count(skipped, 1, 0.1)
    with pytest.raises(Stopped):
        finite.count(True, 2, 0.1)


def test_advantages_are_centred_in_their_group_and_an_absent_member_has_none():
    totals = [1.0, 3.0, None, 2.0, 2.0, 2.0, None, 7.0, None]
    known = np.array([1.0, 3.0])
    by_group = (known - 2) / (known.std(ddof=1) + 1e-4)
    assert advantages(totals, 3) == pytest.approx([*by_group, 0, 0, 0, 0, 0, 0, 0], abs=1e-12)
