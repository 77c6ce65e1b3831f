"""What did a run learn? The oracle reads pictures of the held-out prompts, as each of several systems drew them.

Those of a reprompter are four texts. raw: the prompt itself. start, trained: rewrites by the policy before and after
training, sampled as in training. written: a right layout caption by the world, which is what the renderer can do at
best. A prompt's pictures start from the same noise for all systems; step 0 is never a training step, so no picture of
the training is drawn again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from inference import Reprompter, Rewrite
from interfaces import Prompt, Renderer
from miniature import world
from miniature.fit import ROOT
from run.seeds import render_seed

SYSTEMS = {"raw": "raw prompt", "start": "policy before", "trained": "policy after", "written": "written by the world"}
CATEGORIES = {
    "single_object": "single", "two_object": "two", "colors": "colors", "counting": "counting",
    "position": "position", "color_attr": "attr",
}  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of one run, and for each system, such as those in SYSTEMS, what came of them.

    Attributes:
        labels: system -> what the table calls it.
        pictures: as many for each prompt; None where nothing could be drawn.
        correct: (prompts, samples) of bool: does the picture keep its prompt?
        surplus: mean number of things in a picture that nobody asked for.
        rewrites: of those that rewrite.
    """

    prompts: list[Prompt]
    labels: Mapping[str, str]
    pictures: dict[str, list[list[Image.Image | None]]]
    correct: dict[str, np.ndarray]
    surplus: dict[str, float]
    rewrites: dict[str, list[Rewrite]] = field(default_factory=dict)

    def mean(self, system: str) -> float:
        """Share of right pictures."""
        return float(self.correct[system].mean(axis=1).mean())

    def gap_closed(self) -> float:
        """How much of the way from raw prompts to written captions the trained policy has gone; 1 is all of it."""
        raw, best = self.mean("raw"), self.mean("written")
        return (self.mean("trained") - raw) / (best - raw)


def measure(run: Path, renderer: Renderer, samples: int) -> HeldOut:
    """Rewrite, draw with `renderer` and judge the held-out prompts, with `samples` pictures a prompt and system.

    Args:
        run: a finished run folder; its options are those of its `run.json`.
    """
    options = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    seed, (_, prompts) = options["seed"], world.splits()
    sampling = {"temperature": 1.0, "seed": seed, "max_new_tokens": options["max_completion_length"]}
    form = {"batch_size": 64, "dtype": "float32", "reasoning": options["reasoning"]}
    texts, rng = [prompt.text for prompt in prompts], random.Random(seed)
    rewrites = {
        "start": Reprompter(str(ROOT.parent / options["gpt_path"]), **sampling, **form)(texts),
        "trained": Reprompter(str(run), **sampling, **form)(texts),
    }
    drawn_from = {"raw": texts, "written": [world.describe(world.layout(prompt, rng)) for prompt in prompts]}
    drawn_from |= {name: [row.rewrite for row in rows] for name, rows in rewrites.items()}
    drawn = {system: (renderer, drawn_from[system]) for system in SYSTEMS}
    return replace(look(prompts, SYSTEMS, drawn, seed, samples), rewrites=rewrites)


def look(
    prompts: list[Prompt], labels: Mapping[str, str], drawn: Mapping[str, tuple[Renderer, Sequence[str]]],
    seed: int, samples: int,
) -> HeldOut:  # fmt: skip
    """Draw and judge the prompts, with `samples` pictures a prompt and system.

    Args:
        labels: see `HeldOut`.
        drawn: system -> what draws, and a text for each prompt.
    """
    many = len(labels) * samples
    print(f"drawing {many} pictures of each of {len(prompts)} held-out prompts for the oracle", flush=True)
    seeds = [render_seed(seed, prompt.id, 0, k) for prompt in prompts for k in range(samples)]
    pictures, correct, surplus = {}, {}, {}
    for system in labels:
        renderer, texts = drawn[system]
        flat = renderer([text for text in texts for _ in range(samples)], seeds)
        pictures[system] = [flat[i : i + samples] for i in range(0, len(flat), samples)]
        seen = [
            (prompt, None if image is None else world.see(image))
            for prompt, row in zip(prompts, pictures[system], strict=True)
            for image in row
        ]
        holds = [things is not None and world.holds(prompt, things) for prompt, things in seen]
        correct[system] = np.array(holds).reshape(len(prompts), samples)
        more = [max(0, len(things) - world.asked_for(prompt)) for prompt, things in seen if things is not None]
        surplus[system] = float(np.mean(more))
    return HeldOut(prompts, labels, pictures, correct, surplus)


def table(found: HeldOut) -> dict:
    """The oracle's table as a run's `summary.json` carries it: see report/page.py."""
    rows = []
    for system, label in found.labels.items():
        per_prompt = found.correct[system].mean(axis=1)
        draws = np.random.default_rng(0).choice(per_prompt, size=(4000, len(per_prompt))).mean(axis=1)
        of_task = {task: [] for task in CATEGORIES}
        for prompt, value in zip(found.prompts, per_prompt, strict=True):
            of_task[prompt.task].append(value)
        rows.append({
            "name": system, "label": label, "main": system == "trained", "mean": found.mean(system),
            "ci95": [float(end) for end in np.quantile(draws, (0.025, 0.975))],
            "cells": [*(float(np.mean(values)) for values in of_task.values()), found.surplus[system]],
        })  # fmt: skip
    note = (
        "Accuracy of the held-out oracle, which no reward may use; 95 % intervals. Surplus: things in a picture that "
        "nobody asked for."
    )
    return {"title": "oracle accuracy", "note": note, "columns": [*CATEGORIES.values(), "surplus"], "rows": rows}
