"""`make demo-flow`: train the miniature's image model itself, then show what the oracle says of its pictures.

    python scripts/demo_flow.py [--outdir runs/demo_flow] [--seed 0] [--processes 2] [any option of pref_grpo.py]

Trains with the real trainer (`pref_grpo.py --config configs/miniature_flow.yaml`), data-parallel on two processes.
Then the oracle of the miniature world reads pictures of 240 held-out prompts, without any rewriting: drawn by the
untrained model, by the trained weights and by their average over the training, from the same noise. What the run
folder gets, and what the same command does when it is given again, is as in scripts/demo.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pref_grpo
from evaluation.run import with_tuned
from interfaces import Renderer
from miniature import world
from miniature.held_out import HeldOut, look
from rendering import RenderOptions, load_renderer
from run.options import option
from scripts.demo import ROOT, Demo, DemoOptions

CONFIG = ROOT / "configs" / "miniature_flow.yaml"
SYSTEMS = {"start": "untrained model", "trained": "trained weights", "ema": "averaged weights"}


@dataclass
class FlowOptions(DemoOptions):
    """As the other demo's, in another folder."""

    outdir: str = option(str(ROOT / "runs" / "demo_flow"), "Run folder.", changes="nothing")


def measure(outdir: Path, samples: int) -> HeldOut:
    """Draw the held-out prompts as they are with each of SYSTEMS, and judge the pictures."""
    config = json.loads((outdir / "run.json").read_text(encoding="utf-8"))["config"]
    weights = {"start": None, "trained": outdir, "ema": outdir / "ema"}
    prompts = world.splits()[1]
    texts = [prompt.text for prompt in prompts]
    drawn = {system: (renderer(config, weights[system]), texts) for system in SYSTEMS}
    return look(prompts, SYSTEMS, drawn, config["seed"], samples)


def renderer(config: dict[str, Any], weights: Path | None) -> Renderer:
    """Draws as in that training: with what a folder holds, a LoRA or a whole pipeline, or untrained if it is None."""
    render = RenderOptions(**{one.name: config[one.name] for one in fields(RenderOptions) if one.name in config})
    return load_renderer(render if weights is None else with_tuned(render, str(weights)), "cpu")


def told(found: HeldOut) -> dict[str, Any]:
    """Accuracy of the untrained model and of both trained ones."""
    start, trained, ema = (f"{found.mean(system):.2f}" for system in SYSTEMS)
    label = "oracle accuracy, untrained → trained"
    return {"figures": {label: f"{start} → {trained}", "oracle accuracy, averaged weights": ema}}


main = Demo(
    pref_grpo, FlowOptions, lambda options: ["--config", str(CONFIG)], "ema", "pictures_per_rollout", measure, told,
    SYSTEMS,
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
