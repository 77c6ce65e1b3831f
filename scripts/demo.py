"""`make demo`: train a reprompter on the miniature, then show what the oracle says before and after.

    python scripts/demo.py [--outdir runs/demo] [--seed 0] [--processes 2] [any option of r1_prompter.py]

Trains with the real trainer (`r1_prompter.py --config configs/miniature.yaml`), data-parallel on two processes, which
share out the groups of a step: models this small gain more from a second process than from a second thread. Then
samples a rewrite of each of 240 held-out prompts from the policy before and after, at the temperature of training,
draws them, lets the oracle of the miniature world read the pictures, and writes `summary.json`, `gallery.jsonl`,
`before_after.png` and `report.html` into the run folder. Run again, it goes on where it stopped; what is complete is
only shown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from evaluation.sheet import Cell, contact_sheet
from inference import Reprompter, Rewrite
from interfaces import Prompt, Renderer
from miniature import build, world
from report.page import write_report
from report.terminal import oracle_table, sparkline
from run.folder import RunFolder
from run.seeds import render_seed

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "miniature.yaml"
GALLERY = 4  # prompts a category in the before/after gallery
BEFORE_AFTER = {"raw": "the prompt itself", "start": "rewrite before", "trained": "rewrite after"}
SYSTEMS = ("raw", "start", "trained", "written")
SHORT = {"single_object": "single", "two_object": "two", "color_attr": "attr"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a reprompter on the miniature and show what it learnt.")
    parser.add_argument("--outdir", type=Path, default=ROOT / "runs" / "demo", help="run folder")
    parser.add_argument("--seed", type=int, default=0, help="of training and of the noise that pictures start from")
    parser.add_argument("--images", type=int, default=2, help="pictures per held-out prompt and row of the table")
    parser.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), choices=[1, 2, 4], help="that train together"
    )
    args, trainer_options = parser.parse_known_args()
    started = time.time()
    if not (args.outdir / "summary.json").exists():
        if not (args.outdir / "report.html").exists():  # the last thing that the trainer writes
            code = _train(args.outdir, args.seed, args.processes, trainer_options)
            if code:
                return code
        summary = _evaluate(args.outdir, args.images, started)
        _draw_before_after(args.outdir)
        (args.outdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _show(args.outdir)
    return 0


def _train(outdir: Path, seed: int, processes: int, options: Sequence[str]) -> int:
    batch = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["per_device_train_batch_size"] // processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["r1_prompter.py", "--config", str(CONFIG.relative_to(ROOT)), "--outdir", str(outdir.resolve())]
    command += ["--per_device_train_batch_size", str(batch), "--seed", str(seed), *options]
    resume = ["--resume"] if any(outdir.glob("checkpoint-*")) else []
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.run([*command, *resume], cwd=ROOT, env=environment, check=False).returncode


def _evaluate(outdir: Path, images: int, started: float) -> dict:
    """Rewrite, draw and judge the held-out prompts; writes the gallery and returns the summary."""
    options, (_, prompts) = read_options(outdir), world.splits()
    rewritten = rewrite_all(outdir, options, prompts)
    lines = {"raw": [p.text for p in prompts], "written": written(prompts, options["seed"])}
    lines |= {name: [row.rewrite for row in rows] for name, rows in rewritten.items()}
    print(
        f"drawing {4 * images * len(prompts)} pictures of {len(prompts)} held-out prompts for the oracle", flush=True
    )
    renderer = build.renderer()
    pictures = {system: draw(renderer, prompts, lines[system], options["seed"], images) for system in SYSTEMS}
    correct = {system: judged(prompts, rows) for system, rows in pictures.items()}
    _write_gallery(outdir, prompts, rewritten, pictures, correct)
    oracle = {system: scores(prompts, hits) for system, hits in correct.items()}
    summary = {"oracle": oracle, "gap_closed": gap_closed(oracle), "seed": options["seed"]}
    return {**summary, **_costs(outdir, time.time() - started)}


def read_options(outdir: Path) -> dict:
    """The options with which the run in `outdir` was trained, as `run.json` has them."""
    return json.loads((outdir / "run.json").read_text(encoding="utf-8"))["config"]


def rewrite_all(outdir: Path, options: dict, prompts: list[Prompt]) -> dict[str, list[Rewrite]]:
    """Rewrites of the policy that training started from and of the one that it left, sampled as in training."""
    ends = {"start": str(ROOT / options["gpt_path"]), "trained": str(outdir)}
    sampling = {"temperature": 1.0, "seed": options["seed"], "max_new_tokens": options["max_completion_length"]}
    form = {"batch_size": 64, "dtype": "float32", "reasoning": options["reasoning"]}
    return {name: Reprompter(path, **sampling, **form)([p.text for p in prompts]) for name, path in ends.items()}


def written(prompts: list[Prompt], seed: int) -> list[str]:
    """A right layout caption of each prompt, by the world itself."""
    rng = random.Random(seed)
    return [world.describe(world.layout(prompt, rng)) for prompt in prompts]


def gap_closed(oracle: dict) -> float:
    """How much of the way from raw prompts to written layouts the trained policy has gone; 1 is all of it."""
    raw, whole = oracle["raw"]["mean"], oracle["written"]["mean"]
    return (oracle["trained"]["mean"] - raw) / (whole - raw)


def draw(renderer: Renderer, prompts: list[Prompt], lines: list[str], seed: int, images: int) -> list[list]:
    """`images` pictures of each line; step 0 is never a training step, so no training picture is drawn again."""
    seeds = [render_seed(seed, prompt.id, 0, k) for prompt in prompts for k in range(images)]
    flat = renderer([line for line in lines for _ in range(images)], seeds)
    return [flat[i : i + images] for i in range(0, len(flat), images)]


def judged(prompts: list[Prompt], pictures: list[list[Image.Image | None]]) -> np.ndarray:
    """(prompts, images) of bool: does the oracle say that the picture keeps the prompt?"""
    rows = zip(prompts, pictures, strict=True)
    return np.array([[image is not None and world.holds(p, world.see(image)) for image in row] for p, row in rows])


def scores(prompts: list[Prompt], hits: np.ndarray) -> dict:
    """Mean accuracy, its 95 % bootstrap interval over prompts, and the mean of each category."""
    per_prompt = hits.mean(axis=1)
    draws = np.random.default_rng(0).choice(per_prompt, size=(4000, len(per_prompt))).mean(axis=1)
    categories: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, per_prompt, strict=True):
        categories.setdefault(SHORT.get(prompt.task, prompt.task), []).append(value)
    low, high = np.quantile(draws, (0.025, 0.975))
    means = {category: float(np.mean(values)) for category, values in categories.items()}
    return {"mean": float(per_prompt.mean()), "ci95": [float(low), float(high)], **means}


def _costs(outdir: Path, total: float) -> dict:
    rows = _metrics(outdir)
    seconds = {
        phase: sum(row[f"seconds/{phase}"] for row in rows) for phase in ("generate", "render", "score", "train")
    }
    record = json.loads((outdir / "run.json").read_text(encoding="utf-8"))
    rollouts = len(rows) * record["derived"]["completions_per_generation"]
    return {
        "seconds": {"total": total, **seconds},
        "rollouts": rollouts,
        "rollouts_per_second": rollouts / sum(seconds.values()),
    }


def _metrics(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _write_gallery(outdir: Path, prompts: list[Prompt], rewrites: dict, pictures: dict, correct: dict) -> None:
    """The first prompts of each category, never chosen by outcome."""
    folder = RunFolder(outdir, {})
    taken: dict[str, int] = {}
    rows = []
    for i, prompt in enumerate(prompts):
        taken[prompt.task] = taken.get(prompt.task, 0) + 1
        if taken[prompt.task] <= GALLERY:
            row = {"prompt": prompt.text, "task": prompt.task}
            for system in ("raw", "start", "trained"):
                image = pictures[system][i][0]
                file = None if image is None else folder.save_image(image)
                row[system] = {"image": file, "correct": bool(correct[system][i][0])}
                if system in rewrites:
                    answer = rewrites[system][i]
                    text = answer.rewrite if answer.readable else None
                    row[system] |= {"rewrite": text, "reasoning": answer.reasoning}
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    (outdir / "gallery.jsonl").write_text("".join(rows), encoding="utf-8")


def _draw_before_after(outdir: Path) -> None:
    """One prompt of each category (its first, whatever came of it): pictures of the prompt and of both rewrites."""
    rows = [json.loads(line) for line in (outdir / "gallery.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = list({row["task"]: row for row in reversed(rows)}.values())[::-1]
    lines = {
        label: [
            Cell(
                outdir / row[system]["image"] if row[system]["image"] else None,
                row["prompt"] if system == "raw" else row[system]["rewrite"] or "(unreadable)",
                row[system]["correct"],
            )
            for row in shown
        ]
        for system, label in BEFORE_AFTER.items()
    }
    contact_sheet(outdir / "before_after.png", [row["task"] for row in shown], lines)


def _show(outdir: Path) -> None:
    summary = json.loads((outdir / "summary.json").read_text(encoding="utf-8"))
    rewards = [row["reward"] for row in _metrics(outdir)]
    tenth = max(1, len(rewards) // 10)
    print(f"\nreward   {sparkline(rewards)}   {np.mean(rewards[:tenth]):.3f} -> {np.mean(rewards[-tenth:]):.3f}\n")
    print(oracle_table(summary))
    seconds = summary["seconds"]
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total")
    print(f"\n{summary['rollouts']} rollouts at {summary['rollouts_per_second']:.0f} per second; {phases}; ", end="")
    print(f"the whole demo {seconds['total'] / 60:.1f} min")
    print(f"report: {write_report(outdir)}   (delete {outdir} to train again)")


if __name__ == "__main__":
    sys.exit(main())
