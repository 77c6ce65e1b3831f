"""Trained in front of one renderer, used in front of another: what is left of the gain?

    python scripts/transfer.py --runs runs/recipe/sft+rl_s* --renderer miniature/weights/sd3 --guidance 1

For each run of scripts/demo.py: the same rewrites of the held-out prompts as there, drawn by the other renderer and
read by the oracle. Prints and writes one table; a row a run, then mean and 95 % interval (Student's t) over the runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from errors import UserError
from miniature import build
from miniature.held_out import SYSTEMS, measure
from run.options import option, parse, run_main
from scripts.ablate import markdown, mean_and_interval


@dataclass
class TransferOptions:
    """Which runs, in front of which renderer."""

    runs: list[Path] = option(help="Run folders of scripts/demo.py.", changes="run")
    renderer: Path = option(help="Diffusers folder of the other renderer.", changes="run")
    guidance: float | None = option(
        None, "The other renderer's; miniature/weights/sd3 wants 1; unset: its own.", changes="run", least=0
    )
    samples: int = option(2, "Pictures per held-out prompt and column.", changes="run", least=1)
    out: Path | None = option(None, "Write the table to this file too.", changes="nothing")


def transfer(options: TransferOptions) -> None:
    """Draw the rewrites of all runs and print the table."""
    runs = [run for run in options.runs if not run.is_file()]  # a pattern also finds the logs beside the folders
    for run in runs:
        if not (run / "run.json").is_file() or not (run / "report.html").is_file():
            raise UserError(f"--runs {run} is no finished run of scripts/demo.py")
    renderer = build.renderer(sdmodel_name=options.renderer.resolve(), guidance=options.guidance)
    measured = [measure(run, renderer, options.samples) for run in tqdm(runs, desc="runs", unit="run")]
    rows = [[*map(found.mean, SYSTEMS), found.gap_closed()] for found in measured]
    lines = [["run", "raw prompt", "policy before", "policy after", "written", "gap_closed"]]
    lines += [[run.name, *(f"{value:.3f}" for value in row)] for run, row in zip(runs, rows, strict=True)]
    if len(rows) > 1:
        lines.append(["mean ± 95 %", *(mean_and_interval(column) for column in zip(*rows, strict=True))])
    text = markdown(lines)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main("transfer", lambda: transfer(*parse([TransferOptions], None, sys.argv[1:]))))
