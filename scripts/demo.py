"""`make demo`: train a reprompter on the miniature, then show what the oracle says before and after.

    python scripts/demo.py [--outdir runs/demo] [--seed 0] [--processes 2] [any option of r1_prompter.py]

Trains with the real trainer (`r1_prompter.py --config configs/miniature.yaml`), data-parallel on two processes, which
share out the groups of a step: models this small gain more from a second process than from a second thread. Then the
oracle of the miniature world reads pictures of 240 held-out prompts (miniature/held_out.py), and `summary.json`,
`gallery.jsonl`, `before_after.png` and `report.html` are written into the run folder. The same command again goes on
where it stopped; a run that is complete is only shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml

import r1_prompter
from evaluation.sheet import Cell, contact_sheet
from miniature import build
from miniature.held_out import HeldOut, measure, table
from report.page import Folder, write_report
from report.plots import PHASES
from report.terminal import sparkline, text_table
from run.files import save_png
from run.options import SEED, option, parse_known, run_main

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "miniature.yaml"
GALLERY = 4  # prompts a category in the before/after gallery
SHEET = {"raw": "the prompt itself", "start": "rewrite before", "trained": "rewrite after"}


@dataclass
class DemoOptions:
    """The demo's own options; all others are the trainer's."""

    outdir: str = option(str(ROOT / "runs" / "demo"), "Run folder.", changes="nothing")
    seed: int = option(0, "Of training and of the noise that pictures start from.", changes="run", **SEED)
    samples: int = option(2, "Pictures per held-out prompt and row of the table.", changes="pictures", least=1)
    processes: int = option(min(2, os.cpu_count() or 1), "That train together.", changes="run", choices=[1, 2, 4])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words, others = sys.argv[1:] if argv is None else argv, "All other options are the trainer's."
    return run_main("demo", lambda: run(*parse_known((DemoOptions,), words, epilog=others)))


def run(options: DemoOptions, trainer_options: Sequence[str]) -> int:
    """Train, measure and show; returns the trainer's exit code if it failed."""
    started = time.time()
    outdir = Path(options.outdir)
    words = trainer_words(outdir, options, trainer_options)
    r1_prompter.parse_options(words)  # or a mistake is told by each process, and by what launched them
    summary_file = outdir / "summary.json"
    if not summary_file.exists() or "table" not in json.loads(summary_file.read_text(encoding="utf-8")):
        if not (outdir / "report.html").exists():  # the last thing that the trainer writes
            code = train(outdir, options.processes, words)
            if code:
                return code
        found = measure(outdir, build.renderer(), options.samples)
        gallery = write_gallery(outdir, found)
        draw_before_after(outdir, gallery)
        summary = summarise(outdir, found, started)
        summary_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(outdir)
    return 0


def trainer_words(outdir: Path, options: DemoOptions, others: Sequence[str]) -> list[str]:
    """The trainer's command line."""
    batch = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["per_device_train_batch_size"] // options.processes
    words = ["--config", str(CONFIG), "--outdir", str(outdir.resolve())]
    return [*words, "--per_device_train_batch_size", str(batch), "--seed", str(options.seed), *others]


def train(outdir: Path, processes: int, words: Sequence[str]) -> int:
    """Train, or go on from the newest checkpoint; returns the trainer's exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["r1_prompter.py", *words]
    resume = ["--resume"] if any(outdir.glob("checkpoint-*")) else []
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.run([*command, *resume], cwd=ROOT, env=environment, check=False).returncode


def write_gallery(outdir: Path, found: HeldOut) -> list[dict]:
    """Write `gallery.jsonl`, the first prompts of each category whatever came of them; returns its rows."""
    (outdir / "images").mkdir(exist_ok=True)
    taken: Counter[str] = Counter()
    rows = []
    for i, prompt in enumerate(found.prompts):
        taken[prompt.task] += 1
        if taken[prompt.task] > GALLERY:
            continue
        row = {"prompt": prompt.text, "task": prompt.task}
        for system in SHEET:
            image, name = found.pictures[system][i][0], f"images/held_out_{i:03}_{system}.png"
            if image is not None:
                save_png(image, outdir / name)
            row[system] = {"image": name if image else None, "correct": bool(found.correct[system][i][0])}
            if system in found.rewrites:
                answer = found.rewrites[system][i]
                text = answer.rewrite if answer.readable else None
                row[system] |= {"rewrite": text, "reasoning": answer.reasoning}
        rows.append(row)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (outdir / "gallery.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows


def draw_before_after(outdir: Path, gallery: Sequence[dict]) -> None:
    """One prompt of each category, its first: pictures of the prompt and of both rewrites."""
    shown = list({row["task"]: row for row in reversed(gallery)}.values())[::-1]

    def cell(row: dict, system: str) -> Cell:
        side = row[system]
        text = row["prompt"] if system == "raw" else side["rewrite"] or "(unreadable)"
        return Cell(outdir / side["image"] if side["image"] else None, text, side["correct"])

    lines = {label: [cell(row, system) for row in shown] for system, label in SHEET.items()}
    contact_sheet(outdir / "before_after.png", [row["task"] for row in shown], lines)


def summarise(outdir: Path, found: HeldOut, started: float) -> dict:
    """What `summary.json` holds: the oracle's table, the figures to be read first, and the costs."""
    rows, record = Folder(outdir).rows("metrics.jsonl"), json.loads((outdir / "run.json").read_text(encoding="utf-8"))
    seconds = {phase: sum(row[f"seconds/{phase}"] for row in rows) for phase in PHASES}
    rollouts = len(rows) * record["derived"]["completions_per_generation"]
    return {
        "table": table(found),
        "figures": {
            "oracle accuracy, before → after": f"{found.mean('start'):.2f} → {found.mean('trained'):.2f}",
            "of the gap to the ideal rewrite closed": f"{found.gap_closed():.0%}",
        },
        "gap_closed": found.gap_closed(),
        "seed": record["config"]["seed"],
        "seconds": {"total": time.time() - started, **seconds},
        "rollouts": rollouts,
        "rollouts_per_second": rollouts / sum(seconds.values()),
    }


def show(outdir: Path) -> None:
    """Print the reward's course, the table and the costs; write the report."""
    summary = json.loads((outdir / "summary.json").read_text(encoding="utf-8"))
    rewards = [row["reward"] for row in Folder(outdir).rows("metrics.jsonl")]
    tenth = max(1, len(rewards) // 10)
    print(f"\nreward   {sparkline(rewards)}   {fmean(rewards[:tenth]):.3f} -> {fmean(rewards[-tenth:]):.3f}\n")
    print(text_table(summary["table"]))
    print(f"\ngap closed, (after - raw) / (written - raw): {summary['gap_closed']:.2f}")
    seconds = summary["seconds"]
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total")
    print(f"\n{summary['rollouts']} rollouts at {summary['rollouts_per_second']:.0f} per second; {phases}; ", end="")
    print(f"the whole demo {seconds['total'] / 60:.1f} min")
    print(f"report: {write_report(outdir)}   (delete {outdir} to train again)")


if __name__ == "__main__":
    sys.exit(main())
