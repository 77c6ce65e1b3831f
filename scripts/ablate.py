"""Run variants of one training and write one table: what an ablation script calls.

    python scripts/ablate.py --outdir runs/ablate --table runs/ablate/rewards.md --launch "python scripts/demo.py" \\
        --variant "H: --rewards hps format --reward_weights 1 0.3" --variant "..." [--seeds 0 1 2] [-- options of all]

Each (variant, seed) is `LAUNCH --seed <seed> <options of all> <its options> --outdir OUTDIR/<variant>_s<seed>`, with
the seed for every "{seed}" in the options; its output goes to a `.log` beside the folder. A run that is complete is
not repeated, so scripts that share an OUTDIR share their common variants; one that stopped is continued; one that
failed is shown as failed with its last line, never as a number; and so is one that was made with other options.

The table has a row a variant: mean over seeds, with a 95 % interval (Student's t) where there are two seeds or more.
Columns: what the oracle says where the launched script asks it (scripts/demo.py), and by how much that is above the
first variant (paired by seed); then of every held-out scorer and reward the mean over the last tenth of the run less
that over the first.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from errors import UserError
from models.hub import contents_of
from run.files import differences
from run.options import SEED, option, parse, run_main

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[\w+.=-]+")


@dataclass
class AblateOptions:
    """Which runs, where, and how many at once."""

    outdir: Path = option(help="Each run gets a folder in here.", changes="nothing")
    launch: str = option(help="The command to which options are appended.", changes="run")
    variant: list[str] = option(help='"name: options"; once for each variant.', changes="run", action="append")
    table: Path | None = option(None, "The table's file; unset: table.md in --outdir.", changes="nothing")
    seeds: list[int] = option([0], "Each variant runs with each of them.", changes="run", **SEED)
    jobs: int = option(1, "Runs at once; set OMP_NUM_THREADS so that they fit.", changes="nothing", least=1)


def main() -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    return run_main("ablate", lambda: ablate(*parse([AblateOptions], None, words[:split]), words[split + 1 :]))


def ablate(options: AblateOptions, common: Sequence[str]) -> int:
    """Make all runs that are not there yet and write the table; returns 1 if a run failed.

    Args:
        common: options of every run.
    """
    variants = dict(read_variant(text) for texts in options.variant for text in texts)
    outdir, launch = options.outdir.resolve(), shlex.split(options.launch)
    outdir.mkdir(parents=True, exist_ok=True)
    table = options.table or outdir / "table.md"
    runs = [(name, seed) for seed in options.seeds for name in variants]
    failures: dict[tuple[str, int], str] = {}

    def one(name: str, seed: int) -> None:
        words = [word.replace("{seed}", str(seed)) for word in (*common, *variants[name])]
        if failure := run(outdir / f"{name}_s{seed}", [*launch, "--seed", str(seed), *words]):
            failures[name, seed] = failure

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in tqdm(pool.map(one, *zip(*runs, strict=True)), total=len(runs), desc="runs", unit="run"):
            write_table(table, outdir, list(variants), options.seeds, failures)
    print(table.read_text(encoding="utf-8"))
    return 1 if failures else 0


def read_variant(text: str) -> tuple[str, list[str]]:
    """ "H+D: --rewards hps gdino" -> ("H+D", ["--rewards", "hps", "gdino"]); the name becomes a file name."""
    name, colon, options = text.partition(":")
    if not colon or not NAME.fullmatch(name.strip()):
        raise UserError(f"--variant {text!r}: write 'name: options', the name of letters, digits and + . = - _")
    return name.strip(), shlex.split(options)


def run(folder: Path, command: Sequence[str]) -> str | None:
    """Run, continue or skip one training; None if it is complete, else why it is not.

    `<folder>.done`, beside the folder, has the command that ended well; `<folder>.log` is what it printed.
    """
    done, log_file = (folder.parent / f"{folder.name}.{kind}" for kind in ("done", "log"))
    wanted = shlex.join(command[1:])  # whichever python it is
    if done.exists() and folder.exists():
        made, record = done.read_text(encoding="utf-8"), folder / "run.json"
        before = json.loads(record.read_text(encoding="utf-8")).get("contents", {}) if record.exists() else {}
        local = {option: models for option, models in before.items() if (ROOT / models[0]).exists()}
        now = contents_of({option: ROOT / path for option, (path, _) in local.items()})
        if (changed := differences({"contents": local}, {"contents": now})) or made != wanted:
            return f"is there, made by other options: {changed or made}; delete it, or another OUTDIR"
        return None
    command = [*command, "--resume", "--outdir", str(folder)]
    with open(log_file, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        started = time.time()
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
        log.write(f"exit code {code} after {(time.time() - started) / 60:.1f} min\n")
    if code == 0:
        done.write_text(wanted, encoding="utf-8")
        return None
    lines = [line for line in log_file.read_text(encoding="utf-8").splitlines() if "error" in line]
    return f"exit code {code}: {lines[-1][-200:] if lines else 'see the log'}"


def write_table(
    table: Path, outdir: Path, variants: Sequence[str], seeds: Sequence[int], failures: Mapping[tuple[str, int], str]
) -> str:
    """The table of what is there; a cell is "-" where a run has no such figure, a failed run is named."""
    finished = {(n, s) for n in variants for s in seeds if (outdir / f"{n}_s{s}.done").exists()} - failures.keys()
    measured = {key: figures(outdir / f"{key[0]}_s{key[1]}") for key in finished}
    columns = list(dict.fromkeys(key for row in measured.values() for key in row))
    compared = f"after − {variants[0]}" if any("after" in row for row in measured.values()) else None
    if compared:
        columns.insert(columns.index("after") + 1, compared)
    lines = [["variant", "seeds", *columns]]
    for name in variants:
        there = [seed for seed in seeds if (name, seed) in finished]
        values = {column: [measured[name, seed].get(column) for seed in there] for column in columns}
        if compared and name != variants[0]:
            both = [seed for seed in there if (variants[0], seed) in finished]
            values[compared] = [measured[name, s]["after"] - measured[variants[0], s]["after"] for s in both]
        failed = [f"{seed} failed ({failures[name, seed]})" for seed in seeds if (name, seed) in failures]
        cells = [mean_and_interval(values[column]) for column in columns]
        lines.append([name, "; ".join([", ".join(map(str, there)), *failed]), *cells])
    text = markdown(lines)
    table.write_text(text, encoding="utf-8")
    return text


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of these cells; the first line is its head."""
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows]) + "\n"


def figures(folder: Path) -> dict[str, float]:
    """The figures of one finished run."""
    found = {}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        means = {row["name"]: row["mean"] for row in summary["table"]["rows"]}
        columns = {"raw": "raw", "before": "start", "after": "trained", "averaged": "ema"}
        found = {column: means[name] for column, name in columns.items() if name in means}
        found |= {"gap_closed": summary["gap_closed"]} if "gap_closed" in summary else {}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted({key for row in rows for key in row if re.fullmatch(r"(held_out|rewards)/[^/]+/mean", key)})
    tenth = max(1, len(rows) // 10)
    for name in names:
        ends = [[row[name] for row in part if row.get(name) is not None] for part in (rows[:tenth], rows[-tenth:])]
        if all(ends):
            found[f"Δ {name.removesuffix('/mean')}"] = float(np.mean(ends[1]) - np.mean(ends[0]))
    return found


def mean_and_interval(values: Sequence[float | None]) -> str:
    """Mean ± half of its 95 % interval (Student's t), the mean alone of one value, "-" of none."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.3f}" if known else "-"
    return f"{np.mean(known):.3f} ± {stats.t.ppf(0.975, len(known) - 1) * stats.sem(known):.3f}"


if __name__ == "__main__":
    sys.exit(main())
