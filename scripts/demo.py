"""`make demo`: train a reprompter on the miniature, then show what the oracle says before and after.

    python scripts/demo.py [--outdir runs/demo] [--seed 0] [--processes 2] [any option of r1_prompter.py]

Trains with the real trainer (`r1_prompter.py --config configs/miniature.yaml`), data-parallel on two processes, which
share out the groups of a step: models this small gain more from a second process than from a second thread. Then the
oracle of the miniature world reads pictures of 240 held-out prompts (miniature/held_out.py), and `summary.json`,
`gallery.jsonl`, `before_after.png` and `report.html` are written into the run folder. The same command again goes on
where it stopped; a run that is complete is only shown. scripts/demo_flow.py does the same with another trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

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


@dataclass
class DemoOptions:
    """The demo's own options; all others are the trainer's."""

    outdir: str = option(str(ROOT / "runs" / "demo"), "Run folder.", changes="nothing")
    seed: int = option(0, "Of training and of the noise that pictures start from.", changes="run", **SEED)
    samples: int = option(2, "Pictures per held-out prompt and row of the table.", changes="pictures", least=1)
    processes: int = option(min(2, os.cpu_count() or 1), "That train together.", changes="run", choices=[1, 2, 4])


@dataclass(frozen=True)
class Demo:
    """What a demo does in its own way.

    Attributes:
        trainer: its module.
        options: the kind of the demo's own options.
        words: what these add to the trainer's command line.
        last: what a finished training has left in its run folder.
        rollouts: the derived number of `run.json` that counts those of a step.
        measure: run folder, number of pictures -> what the oracle saw.
        told: of that, what `summary.json` says beside the table.
        sheet: system -> label of its row in `before_after.png`.
    """

    trainer: ModuleType
    options: type[DemoOptions]
    words: Callable[[DemoOptions], list[str]]
    last: str
    rollouts: str
    measure: Callable[[Path, int], HeldOut]
    told: Callable[[HeldOut], dict[str, Any]]
    sheet: Mapping[str, str]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line; returns the exit code."""
        words, others = sys.argv[1:] if argv is None else argv, "All other options are the trainer's."
        return run_main("demo", lambda: run(self, *parse_known((self.options,), words, epilog=others)))


def run(demo: Demo, options: DemoOptions, others: Sequence[str]) -> int:
    """Train, measure and show; returns the trainer's exit code if it failed."""
    started = time.time()
    outdir = Path(options.outdir)
    words = ["--outdir", str(outdir.resolve()), "--seed", str(options.seed), *demo.words(options), *others]
    demo.trainer.parse_options(words)  # or a mistake is told by each process, and by what launched them
    summary_file = outdir / "summary.json"
    if not summary_file.exists() or "table" not in json.loads(summary_file.read_text(encoding="utf-8")):
        if not (outdir / demo.last).exists():
            code = train(demo.trainer.__name__, outdir, options.processes, words)
            if code:
                return code
        trained = time.time() - started
        found = demo.measure(outdir, options.samples)
        gallery = write_gallery(outdir, found, demo.sheet)
        draw_before_after(outdir, gallery, demo.sheet)
        summary = summarise(outdir, demo, found)
        earlier = sum(summary["seconds"].values()) - trained  # seconds of training that calls before this one took
        summary["seconds"] = {"total": time.time() - started + max(0, earlier), **summary["seconds"]}
        summary_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(outdir)
    return 0


def train(trainer: str, outdir: Path, processes: int, words: Sequence[str]) -> int:
    """Train, or go on from the newest checkpoint; returns the trainer's exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [f"{trainer}.py", *words]
    resume = ["--resume"] if any(outdir.glob("checkpoint-*")) else []
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.run([*command, *resume], cwd=ROOT, env=environment, check=False).returncode


def write_gallery(outdir: Path, found: HeldOut, systems: Mapping[str, str]) -> list[dict]:
    """Write `gallery.jsonl`, the first prompts of each category whatever came of them; returns its rows."""
    (outdir / "images").mkdir(exist_ok=True)
    taken: Counter[str] = Counter()
    rows = []
    for i, prompt in enumerate(found.prompts):
        taken[prompt.task] += 1
        if taken[prompt.task] > GALLERY:
            continue
        row = {"prompt": prompt.text, "task": prompt.task}
        for system in systems:
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


def draw_before_after(outdir: Path, gallery: Sequence[dict], systems: Mapping[str, str]) -> None:
    """One prompt of each category, its first: a picture of each system, above the text that it was drawn from."""
    shown = list({row["task"]: row for row in reversed(gallery)}.values())[::-1]

    def cell(row: dict, system: str) -> Cell:
        side = row[system]
        text = side.get("rewrite", row["prompt"]) or "(unreadable)"
        return Cell(outdir / side["image"] if side["image"] else None, text, side["correct"])

    lines = {label: [cell(row, system) for row in shown] for system, label in systems.items()}
    contact_sheet(outdir / "before_after.png", [row["task"] for row in shown], lines)


def steps_of(outdir: Path) -> list[dict]:
    """The metrics of each training step; not those of the last evaluation."""
    return [row for row in Folder(outdir).rows("metrics.jsonl") if "reward" in row]


def summarise(outdir: Path, demo: Demo, found: HeldOut) -> dict:
    """What `summary.json` holds: the oracle's table, the figures to be read first, and the costs."""
    rows, record = steps_of(outdir), json.loads((outdir / "run.json").read_text(encoding="utf-8"))
    phases = [phase for phase in PHASES if f"seconds/{phase}" in rows[0]]
    seconds = {phase: sum(row[f"seconds/{phase}"] for row in rows) for phase in phases}
    rollouts = len(rows) * record["derived"][demo.rollouts]
    return {
        "table": table(found),
        **demo.told(found),
        "seed": record["config"]["seed"],
        "seconds": seconds,
        "rollouts": rollouts,
        "rollouts_per_second": rollouts / sum(seconds.values()),
    }


def show(outdir: Path) -> None:
    """Print the reward's course, the table and the costs; write the report."""
    summary = json.loads((outdir / "summary.json").read_text(encoding="utf-8"))
    rewards = [row["reward"] for row in steps_of(outdir)]
    tenth = max(1, len(rewards) // 10)
    print(f"\nreward   {sparkline(rewards)}   {fmean(rewards[:tenth]):.3f} -> {fmean(rewards[-tenth:]):.3f}\n")
    print(text_table(summary["table"]))
    if "gap_closed" in summary:
        print(f"\ngap closed, (after - raw) / (written - raw): {summary['gap_closed']:.2f}")
    seconds = summary["seconds"]
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total")
    print(f"\n{summary['rollouts']} rollouts at {summary['rollouts_per_second']:.0f} per second; {phases}; ", end="")
    print(f"the whole demo {seconds['total'] / 60:.1f} min")
    print(f"report: {write_report(outdir)}   (delete {outdir} to train again)")


def trainer_words(options: DemoOptions) -> list[str]:
    """The configuration, its batch shared out among the processes."""
    batch = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["per_device_train_batch_size"] // options.processes
    return ["--config", str(CONFIG), "--per_device_train_batch_size", str(batch)]


def told(found: HeldOut) -> dict[str, Any]:
    """Accuracy of the policy before and after, and how much of the way to ideal rewrites it has gone."""
    return {
        "figures": {
            "oracle accuracy, before → after": f"{found.mean('start'):.2f} → {found.mean('trained'):.2f}",
            "of the gap to the ideal rewrite closed": f"{found.gap_closed():.0%}",
        },
        "gap_closed": found.gap_closed(),
    }


main = Demo(
    r1_prompter, DemoOptions, trainer_words, "report.html", "completions_per_generation",
    lambda outdir, samples: measure(outdir, build.renderer(), samples), told,
    {"raw": "the prompt itself", "start": "rewrite before", "trained": "rewrite after"},
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
