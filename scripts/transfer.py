"""Trained in front of one renderer, used in front of another: what is left of the gain?

    python scripts/transfer.py --runs runs/recipe/sft+rl_s* --renderer miniature/weights/sd3 --guidance 1

For each run of scripts/demo.py: the same rewrites of the held-out prompts as there, drawn by the other renderer and
read by the oracle. Prints and writes one table; a row a run, then mean and 95 % interval (Student's t) over the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from interfaces import Renderer
from miniature import build, world
from scripts.demo import SYSTEMS, draw, gap_closed, judged, read_options, rewrite_all, scores, written

LABELS = ("raw prompt", "policy before", "policy after", "written")


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the rewrites of trained policies with another renderer.")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders of scripts/demo.py")
    parser.add_argument("--renderer", type=Path, required=True, help="diffusers folder of the other renderer")
    parser.add_argument("--guidance", type=float, help="of it; miniature/weights/sd3 wants 1; unset: its own")
    parser.add_argument("--images", type=int, default=2, help="pictures per held-out prompt and column")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    runs = [run for run in args.runs if not run.is_file()]  # a pattern also finds the logs beside the folders
    for run in runs:
        if not (run / "run.json").is_file() or not (run / "report.html").is_file():
            parser.error(f"{run} is no finished run of scripts/demo.py")
    renderer = build.renderer(sdmodel_name=args.renderer.resolve(), guidance=args.guidance)
    rows = [measure(run, renderer, args.images) for run in tqdm(runs, desc="runs", unit="run")]
    text = table([run.name for run in runs], rows)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def measure(run: Path, renderer: Renderer, images: int) -> list[float]:
    """Oracle accuracy of each of SYSTEMS in front of `renderer`, then the share of the gap that is closed."""
    options, (_, prompts) = read_options(run), world.splits()
    lines = {"raw": [p.text for p in prompts], "written": written(prompts, options["seed"])}
    lines |= {name: [row.rewrite for row in rows] for name, rows in rewrite_all(run, options, prompts).items()}
    pictures = {system: draw(renderer, prompts, lines[system], options["seed"], images) for system in SYSTEMS}
    oracle = {system: scores(prompts, judged(prompts, rows)) for system, rows in pictures.items()}
    return [*(oracle[system]["mean"] for system in SYSTEMS), gap_closed(oracle)]


def table(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Markdown; the last row is the mean over runs, with an interval where there are two or more."""
    columns = (*LABELS, "gap_closed")
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{v:.3f}" for v in row) + " |" for name, row in zip(names, rows, strict=True)
    ]
    if len(rows) > 1:
        half = stats.t.ppf(0.975, len(rows) - 1) * stats.sem(rows, axis=0)
        cells = [f"{mean:.3f} ± {h:.3f}" for mean, h in zip(np.mean(rows, axis=0), half, strict=True)]
        lines.append("| mean ± 95 % | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
