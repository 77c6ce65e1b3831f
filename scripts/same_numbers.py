"""Does the working tree compute what a commit computed? Three steps of the miniature in each, compared bit for bit.

    python scripts/same_numbers.py a5c5730           full fine-tuning
    python scripts/same_numbers.py a5c5730 --lora    LoRA

For a refactoring, which must change no number. The commit is checked out into a temporary folder, which is removed
afterwards; the same training runs there and in the working tree, one after the other, on the CPU, in float32, with one
process and one thread. The two run folders are compared: of every rollout the rewrite, each reward, each held-out
score and the advantage; of every step reward, loss and gradient norm; and the trained weights.

No expected numbers are kept in a file: processors round differently, so one machine has to make both runs.

Exit code 0: all is equal; 1: something differs or is there in one run only, or a run failed; 2: no such commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from report.terminal import print_anywhere

ROOT = Path(__file__).resolve().parent.parent
# 4 prompts x 4 completions a step; the held-out reward is there so that held-out scores are compared, too
TRAINING = """r1_prompter.py --config configs/miniature.yaml --max_steps 3 --per_device_train_batch_size 16
    --num_generations 4 --held_out imagereward --render_dtype float32 --orm_dtype float32""".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

Numbers = dict[str, dict[tuple[int, int], str]]  # what -> (step, rollout from 1, or 0) -> the value in full


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Three steps of the miniature, bit for bit against a commit.")
    parser.add_argument("commit", help="the state to compare with: a hash, a branch or a tag")
    parser.add_argument("--lora", action="store_true", help="train an adapter; else all weights")
    args = parser.parse_args()
    print_anywhere()
    commit = git("rev-parse", "--verify", "--quiet", f"{args.commit}^{{commit}}").stdout.strip()
    if not commit:
        print(f"same_numbers: error: {args.commit!r} is no commit of {ROOT}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the temporary folder, too
    options = ["--use_peft", "true"] if args.lora else []
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as name:
        folder = Path(name)
        try:
            if (done := git("worktree", "add", "--detach", str(folder / "tree"), commit)).returncode:
                sys.exit(f"same_numbers: error: git worktree add: {' '.join(done.stderr.split())}")
            before = train(f"commit {args.commit}", folder / "tree", folder / "before", options)
        finally:
            git("worktree", "remove", "--force", str(folder / "tree"))
        after = train("working tree", ROOT, folder / "after", options)
    return report(before, after)


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """Run git in this repository."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def train(name: str, tree: Path, outdir: Path, options: list[str]) -> Numbers:
    """Train in `tree`, with its modules even where another checkout is installed; returns the numbers."""
    print(f"== {name}", flush=True)
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)}
    command, log = [sys.executable, *TRAINING, *options, "--outdir", str(outdir)], outdir.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as errors:  # full of progress bars, so shown only if the run fails
        code = subprocess.run(command, cwd=tree, env=environment, stderr=errors, check=False).returncode
    if code:
        end = log.read_text(encoding="utf-8")[-3000:]
        sys.exit(f"{end}\nsame_numbers: error: {name}: the training ended with exit code {code}")
    return read(outdir)


def read(outdir: Path) -> Numbers:
    """The numbers of a run folder, in the order in which a step makes them."""
    found: Numbers = {}

    def add(what: str, step: float, rollout: int, value: object) -> None:
        found.setdefault(what, {})[int(step), rollout] = repr(value)  # as text -0.0 is not 0.0, and nan equals nan

    for file in sorted(outdir.glob("rollouts/step_*.jsonl")):
        for rollout, row in enumerate(rows(file), start=1):
            for kind in ("rewrite", "parts", "held_out", "advantage"):
                value = row.get(kind, {})
                for name, part in value.items() if isinstance(value, dict) else [("", value)]:
                    add(f"{kind} {name}".strip(), int(file.stem.removeprefix("step_")), rollout, part)
    steps = rows(outdir / "metrics.jsonl")
    for what in ("reward", "loss", "grad_norm"):
        for row in steps:
            if what in row:
                add(what, row["step"], 0, row[what])
    if weights := sorted(outdir.glob("*.safetensors")):
        sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
        add("weights (SHA-256)", steps[-1]["step"], 0, sha256)
    return found


def rows(file: Path) -> list[dict]:
    """The rows of a .jsonl file, whole numbers as floats: 1 and 1.0 are equal."""
    return [json.loads(line, parse_int=float) for line in file.read_text(encoding="utf-8").splitlines()]


def report(before: Numbers, after: Numbers) -> int:
    """Print a line for each kind of number, with the first value that differs; returns the exit code."""
    different = False
    for what in {**before, **after}:
        old, new = before.get(what, {}), after.get(what, {})
        places = [place for place in sorted(old | new) if old.get(place) != new.get(place)]
        said = f"{len(old)} values, all equal"
        if places:
            different, (step, rollout) = True, places[0]
            values = [numbers.get(places[0], "absent") for numbers in (old, new)]
            said = f"differs first at step {step}, rollout {rollout}: {values[0]} -> {values[1]}"
        print(f"{what:24s} {said}")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
