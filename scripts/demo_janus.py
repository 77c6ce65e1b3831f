"""`make demo-janus`: teach the miniature Janus to plan and to draw, then show what the oracle says of its pictures.

    python scripts/demo_janus.py [--outdir runs/demo_janus] [--seed 0] [--processes 2] [any option of t2i_r1.py]

Trains with the real trainer (`t2i_r1.py --config configs/miniature_janus.yaml`), data-parallel on two processes. Then
the oracle of the miniature world reads pictures of 240 held-out prompts: drawn without a plan, after plans of the
untrained and of the trained model, and after layouts that the world itself wrote, each from the same noise. What the
run folder gets, and what the same command does when it is given again, is as in scripts/demo.py.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

import t2i_r1
from inference import Rewrite
from miniature import world
from miniature.held_out import HeldOut, look
from models.janus import Settings, load_janus
from rendering.janus import JanusRenderer
from run.options import option
from scripts.demo import ROOT, Demo, DemoOptions

CONFIG = ROOT / "configs" / "miniature_janus.yaml"
SYSTEMS = {
    "raw": "no plan, before", "start": "own plans, before", "trained": "own plans, after",
    "written": "ideal plans, before",
}  # fmt: skip
BATCH = 60


@dataclass
class JanusOptions(DemoOptions):
    """As the other demo's, in another folder."""

    outdir: str = option(str(ROOT / "runs" / "demo_janus"), "Run folder.", changes="nothing")


class Told:
    """Draws prompts after plans, given ones or the model's own, and keeps the plan of each prompt's first picture."""

    def __init__(self, renderer: JanusRenderer, given: Mapping[str, str] | None = None):
        self.renderer, self.given, self.plans = renderer, given, dict(given or {})

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """See `interfaces.Renderer`."""
        found, janus, how = [], self.renderer.janus, self.renderer.settings
        for i in range(0, len(texts), BATCH):
            some, noise = texts[i : i + BATCH], seeds[i : i + BATCH]
            if self.given is None:
                pictures = self.renderer.sample(some, noise)
                for text, picture in zip(some, pictures, strict=True):
                    self.plans.setdefault(text, picture.text)
                found += [picture.image for picture in pictures]
            else:
                prefixes = [janus.image_prefix(text, self.given[text]) for text in some]
                found += janus.pictures(janus.draw(prefixes, noise, how.guidance, how.image_temperature).tokens)
        return found

    def rewrites(self, texts: Sequence[str]) -> list[Rewrite]:
        """The plans, as the demo shows what a picture was drawn from."""
        count = self.renderer.count_tokens
        rows = [(text, self.plans[text]) for text in texts]
        return [Rewrite(text, "", plan, True, plan, count(text), count(plan)) for text, plan in rows]


def measure(outdir: Path, samples: int) -> HeldOut:
    """Draw the held-out prompts with each of SYSTEMS, and judge the pictures."""
    config = json.loads((outdir / "run.json").read_text(encoding="utf-8"))["config"]
    how = Settings(*(config[name] for name in Settings._fields))
    before, after = (load_janus(str(path), "float32", "cpu") for path in (ROOT / config["model_path"], outdir))
    prompts, rng = world.splits()[1], random.Random(config["seed"])
    texts = [prompt.text for prompt in prompts]
    ideal = {prompt.text: world.describe(world.layout(prompt, rng)) for prompt in prompts}
    untrained = JanusRenderer(before, how, True, BATCH)
    planned = {
        "start": Told(untrained), "trained": Told(JanusRenderer(after, how, True, BATCH)),
        "written": Told(untrained, ideal),
    }  # fmt: skip
    drawn = {"raw": (JanusRenderer(before, how, False, BATCH), texts)}
    drawn |= {name: (draw, texts) for name, draw in planned.items()}
    found = look(prompts, SYSTEMS, drawn, config["seed"], samples)
    return replace(found, rewrites={name: draw.rewrites(texts) for name, draw in planned.items()})


def told(found: HeldOut) -> dict[str, Any]:
    """Accuracy with its own plans before and after, and how much of the way to ideal plans it has gone."""
    start, trained, ideal = (found.mean(system) for system in ("start", "trained", "written"))
    gap = (trained - start) / (ideal - start)
    figures = {
        "oracle accuracy, before → after": f"{start:.2f} → {trained:.2f}",
        "of the gap to ideal plans closed": f"{gap:.0%}",
    }
    return {"figures": figures, "gap_to_ideal_plans": gap}


main = Demo(
    t2i_r1, JanusOptions, lambda options: ["--config", str(CONFIG)], "ema", "pictures_per_rollout", measure, told,
    SYSTEMS,
).main  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
