"""Claims about the ablation runner, with the real trainer on the toy stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pref_grpo
import r1_prompter
import t2i_r1
from errors import UserError
from scripts import ablate
from tests.processes import ENVIRONMENT, ROOT, run_forked

pytestmark = pytest.mark.slow


def test_one_table_holds_every_variant_a_failure_is_no_number_and_a_finished_run_is_not_repeated(toy, tmp_path):
    launch = f"{sys.executable} r1_prompter.py --config {toy.config} --save_strategy no --max_steps 2"
    command = ["scripts/ablate.py", "--outdir", str(tmp_path / "out"), "--launch", launch]
    command += ["--variant", "H.1: --rewards hps format", "--variant", "typo: --rewards hsp"]
    command += ["--", "--held_out", "length"]
    done = run_forked(*command)
    assert done.returncode == 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout
    head, _, good, bad = table.splitlines()
    assert "Δ held_out/length" in head and "Δ rewards/hps" in head
    cells = [cell.strip() for cell in good.strip("|").split("|")]
    assert cells[:2] == ["H.1", "0"] and len([float(cell) for cell in cells[2:]]) == 3
    assert "0 failed (exit code 2" in bad and "did you mean 'hps'" in bad
    assert all(cell.strip() == "-" for cell in bad.strip("|").split("|")[2:])
    written = (tmp_path / "out" / "H.1_s0" / "metrics.jsonl").stat().st_mtime_ns
    again = run_forked(*command)
    assert again.returncode == 1 and (tmp_path / "out" / "H.1_s0" / "metrics.jsonl").stat().st_mtime_ns == written


def finished(folder: Path, values: list[float], oracle: float | None = None) -> None:
    folder.mkdir(parents=True)
    folder.with_name(f"{folder.name}.done").touch()
    rows = [{"step": i, "rewards/hps/mean": value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if oracle is not None:
        means = {"raw": 0.2, "start": 0.4, "trained": oracle}
        table = {"rows": [{"name": name, "mean": mean} for name, mean in means.items()]}
        (folder / "summary.json").write_text(json.dumps({"table": table, "gap_closed": oracle / 2}))


def test_figures_are_the_last_tenth_less_the_first_and_intervals_are_of_seeds(tmp_path):
    finished(tmp_path / "H_s0", [0.0, *[0.5] * 8, 1.0], oracle=0.8)
    finished(tmp_path / "H_s1", [0.0, *[0.5] * 8, 0.4], oracle=0.6)
    oracle = {"raw": 0.2, "before": 0.4, "after": 0.8, "gap_closed": 0.4}
    assert ablate.figures(tmp_path / "H_s0") == {**oracle, "Δ rewards/hps": 1.0}
    head, _, row = ablate.write_table(tmp_path / "t.md", tmp_path, ["H"], [0, 1], {}).splitlines()
    assert head == "| variant | seeds | raw | before | after | after − H | gap_closed | Δ rewards/hps |"
    # t(0.975, 1) = 12.706
    assert row == ("| H | 0, 1 | 0.200 ± 0.000 | 0.400 ± 0.000 | 0.700 ± 1.271 | - | 0.350 ± 0.635 | 0.700 ± 3.812 |")


def test_variants_are_compared_seed_by_seed_and_only_where_both_are_there(tmp_path):
    for seed, (base, other) in enumerate([(0.5, 0.6), (0.7, 0.8), (0.9, None)]):
        finished(tmp_path / f"base_s{seed}", [0.0, 1.0], oracle=base)
        if other:
            finished(tmp_path / f"other_s{seed}", [0.0, 1.0], oracle=other)
    failures = {("other", 2): "exit code 1: no picture"}
    *_, row = ablate.write_table(tmp_path / "t.md", tmp_path, ["base", "other"], [0, 1, 2], failures).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "0, 1; 2 failed (exit code 1: no picture)" and cells[5] == "0.100 ± 0.000"


def test_a_run_that_was_made_with_other_options_is_no_number(tmp_path):
    writes = "import sys, pathlib; pathlib.Path(sys.argv[-1]).mkdir(); print('made')"
    assert ablate.run(tmp_path / "H_s0", [sys.executable, "-c", writes, "--steps", "1"]) is None
    assert ablate.run(tmp_path / "H_s0", [sys.executable, "-c", writes, "--steps", "1"]) is None
    assert "--steps 1; delete it" in ablate.run(tmp_path / "H_s0", [sys.executable, "-c", writes, "--steps", "2"])


@pytest.mark.parametrize("text", ["no colon", "../up: --x", ": --x", "a b: --x"])
def test_a_variant_without_a_plain_name_is_refused(text):
    with pytest.raises(UserError, match="--variant"):
        ablate.read_variant(text)


SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("ablate_*.sh"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_ablation_script_trains_variants_that_differ_by_options_that_exist(name, tmp_path):
    out, noted, python, words = (tmp_path / name for name in ("out", "noted.jsonl", "python", "words"))
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {words}\n')
    python.chmod(0o755)
    for cold_start in ("cold_start_direct", "cold_start_s1"):  # as if they had been trained
        (out / cold_start).mkdir(parents=True)
        (out / cold_start / "report.html").touch()
    launch = f"{sys.executable} tests/launch_recorded.py {noted}"
    settings = {"SEEDS": "1", "OUTDIR": str(out), "LAUNCH": launch, "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", f"scripts/{name}", "--save_steps", "7"],
        cwd=ROOT, env={**ENVIRONMENT, **settings}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    done = run_forked(*words.read_text().splitlines())
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [json.loads(line) for line in noted.read_text().splitlines()]
    assert len(runs) == len(list(out.glob("*.done"))) >= 2
    assert len({tuple(options[:-2]) for options in runs}) == len(runs)
    for options in runs:
        if "flow" in name:
            loop = pref_grpo.parse_options(["--config", "configs/miniature_flow.yaml", *options]).loop
        elif "janus" in name:
            loop = t2i_r1.parse_options(["--config", "configs/miniature_janus.yaml", *options]).loop
        else:
            loop = r1_prompter.parse_options(["--config", "configs/miniature.yaml", *options]).training
        assert (loop.seed, loop.save_steps) == (1, 7)
