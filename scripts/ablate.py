"""Run variants of one training and write one table: what an ablation script calls.

    python scripts/ablate.py --outdir runs/ablate_rewards --launch "python scripts/demo.py" \\
        --variant "H: --rewards hps format --reward_weights 1 0.3" --variant "..." [--seeds 0 1 2] [-- options of all]

Each (variant, seed) is `LAUNCH --outdir OUTDIR/<variant>_s<seed> --seed <seed> <its options> <options of all>`; its
output goes to a `.log` beside the folder. A run that is complete is not repeated, one that stopped is continued, one
that failed is shown as failed with its last line, never as a number. `table.md` has a row a variant: mean over seeds,
with a 95 % interval (Student's t) where there are two seeds or more.

Columns: oracle accuracy after training where the launched script measures it (scripts/demo.py), then of every held-out
scorer and reward the mean over the last tenth of the run less that over the first.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[\w+.=-]+")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run variants of one training and write one table.")
    parser.add_argument("--outdir", type=Path, required=True, help="one folder a run is made in here, and table.md")
    parser.add_argument("--launch", required=True, help="the command to which options are appended")
    parser.add_argument("--variant", action="append", required=True, help='"name: options"; once for each')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each variant runs with each of them")
    parser.add_argument("common", nargs="*", help="after --: options of every run")
    args = parser.parse_args()
    try:
        variants = dict(read_variant(text) for text in args.variant)
    except ValueError as error:
        parser.error(str(error))
    args.outdir = args.outdir.resolve()
    args.outdir.mkdir(parents=True, exist_ok=True)
    runs = [(name, seed) for seed in args.seeds for name in variants]
    failures = {}
    for name, seed in tqdm(runs, desc="runs", unit="run"):
        folder = args.outdir / f"{name}_s{seed}"
        failure = run(folder, [*shlex.split(args.launch), "--seed", str(seed), *variants[name], *args.common])
        if failure is not None:
            failures[name, seed] = failure
        table = write_table(args.outdir, list(variants), args.seeds, failures)
    print(table)
    return 1 if failures else 0


def read_variant(text: str) -> tuple[str, list[str]]:
    """ "H+D: --rewards hps gdino" -> ("H+D", ["--rewards", "hps", "gdino"]).

    Raises:
        ValueError: no colon, or a name that would be no plain file name.
    """
    name, colon, options = text.partition(":")
    if not colon or not NAME.fullmatch(name.strip()):
        raise ValueError(f"--variant {text!r}: write 'name: options', the name of letters, digits and + . = - _")
    return name.strip(), shlex.split(options)


def run(folder: Path, command: Sequence[str]) -> str | None:
    """Run, continue or skip one training; None if it is complete, else why it is not.

    `<folder>.done`, beside the folder, says that the command ended well; `<folder>.log` is what it printed.
    """
    done, log_file = (folder.parent / f"{folder.name}.{kind}" for kind in ("done", "log"))
    if done.exists() and folder.exists():
        return None
    stopped = any(folder.glob("checkpoint-*/trainer_state.json"))
    command = [*command, "--outdir", str(folder), *(["--resume"] if stopped else [])]
    with open(log_file, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        started = time.time()
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
        log.write(f"exit code {code} after {(time.time() - started) / 60:.1f} min\n")
    if code == 0:
        done.touch()
        return None
    lines = [line for line in log_file.read_text(encoding="utf-8").splitlines() if "error" in line]
    return f"exit code {code}: {lines[-1][-200:] if lines else 'see the log'}"


def write_table(outdir: Path, variants: Sequence[str], seeds: Sequence[int], failures: dict) -> str:
    """`table.md` of what is there; a cell is "-" where a run has no such figure, a failed run is named."""
    measured = {(name, seed): figures(outdir / f"{name}_s{seed}") for name in variants for seed in seeds}
    columns = list(dict.fromkeys(key for row in measured.values() for key in row))
    lines = ["| variant | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in variants:
        there = [seed for seed in seeds if measured[name, seed] and (name, seed) not in failures]
        cells = [_cell([measured[name, seed].get(column) for seed in there]) for column in columns]
        failed = [f"{seed} failed ({failures[name, seed]})" for seed in seeds if (name, seed) in failures]
        lines.append(f"| {name} | {'; '.join([', '.join(map(str, there)), *failed])} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (outdir / "table.md").write_text(text, encoding="utf-8")
    return text


def figures(folder: Path) -> dict[str, float]:
    """The figures of one finished run; {} if there is none."""
    if not (folder / "report.html").exists():
        return {}
    found = {}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = {
            "oracle before": summary["oracle"]["start"]["mean"],
            "oracle after": summary["oracle"]["trained"]["mean"],
        }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted({key for row in rows for key in row if re.fullmatch(r"(held_out|rewards)/[^/]+/mean", key)})
    tenth = max(1, len(rows) // 10)
    for name in names:
        ends = [[row[name] for row in part if row.get(name) is not None] for part in (rows[:tenth], rows[-tenth:])]
        if all(ends):
            found[f"Δ {name.removesuffix('/mean')}"] = float(np.mean(ends[1]) - np.mean(ends[0]))
    return found


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.3f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {stats.t.ppf(0.975, len(known) - 1) * stats.sem(known):.3f}"


if __name__ == "__main__":
    sys.exit(main())
