"""Evaluate a policy on the miniature: `scripts/evaluate.py` with two benchmarks more, judged without any model.

    python -m miniature.evaluate --benchmark miniature --out runs/eval --gpt_path runs/demo [as scripts/evaluate.py]

    miniature          the oracle says whether a picture keeps its prompt (world.holds)
    miniature-geneval  the rules of evaluation/geneval.py, fed with what the oracle sees: the two agree

Prompts are the world's held-out ones, in GenEval's format, which it writes to OUT-metadata.jsonl. Defaults of the
renderer and the policy are the miniature's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from evaluation.benchmark import Benchmark, Item, Verdict
from evaluation.benchmarks import BENCHMARKS, BenchmarkOptions
from evaluation.geneval import Detection, GenEval, Question
from evaluation.run import main
from interfaces import Prompt
from miniature import world
from miniature.fit import ROOT
from rewards import RewardOptions

RENDERER = ("sdmodel_name", "render_steps", "resolution", "max_sequence_length", "render_dtype", "render_batch_size")
REWARDS = ("hps_path", "git_path", "gdino_path", "orm_path", "imagereward_path", "pickscore_path")


class Oracle(GenEval):
    """The world's own eyes as a benchmark over the same prompts."""

    name = "miniature"
    images_per_prompt = 2

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """1.0 where the oracle says that the picture keeps the prompt."""
        rows = [(item, world.see(image)) for item, image in zip(items, images, strict=True)]
        return [
            Verdict(
                {item.category: [float(world.holds(item.prompt, seen))]},
                {"seen": [[thing.color, thing.shape, thing.place] for thing in seen]},
            )
            for item, seen in rows
        ]


def detections(images: Sequence[Image.Image]) -> list[list[Detection]]:
    """The things of known shape that the oracle sees, as a certain detector would give them."""
    return [[_detection(one, image.size) for one in world.see(image) if one.shape in world.SHAPES] for image in images]


def _detection(thing: world.Seen, size: tuple[int, int]) -> Detection:
    x0, y0, x1, y1 = map(int, thing.box)  # the oracle's boxes are of full pixels
    mask = np.zeros((size[1], size[0]), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return Detection(thing.shape, 1.0, thing.box, mask)


def colours(questions: Sequence[Question]) -> list[str | None]:
    """The oracle's colour of the thing with that box."""
    return [
        next((thing.color for thing in world.see(image) if tuple(thing.box) == tuple(asked.box)), None)
        for image, asked in questions
    ]


def geneval_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt of the world in GenEval's format; in a position prompt the reference comes first."""
    include: list[dict[str, Any]] = [{"class": noun, "count": 1} for noun in prompt.nouns]
    for thing, attr_noun in zip(include, prompt.attr_nouns, strict=False):
        thing["color"] = attr_noun.split()[0]
    if prompt.task == "counting":
        include = [{"class": noun, "count": number} for noun, number in prompt.counts]
        exclude = [{"class": noun, "count": number + 1} for noun, number in prompt.counts]
        return {"tag": prompt.task, "include": include, "exclude": exclude, "prompt": prompt.text}
    if prompt.spatial:
        subject, relation, reference = prompt.spatial
        include = [{"class": reference, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
    return {"tag": prompt.task, "include": include, "prompt": prompt.text}


def _judged_by(kind: type[GenEval], title: str) -> Any:
    def build(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
        settings = {"judge": "the oracle of miniature/world.py"}
        return kind(detections, colours, title=title, settings=settings, class_names=tuple(world.SHAPES))

    return build


MINIATURE = {
    "miniature": _judged_by(Oracle, "miniature, oracle"),
    "miniature-geneval": _judged_by(GenEval, "miniature, GenEval's rules"),
}


def defaults() -> list[str]:
    """The miniature's own options."""
    config = yaml.safe_load((ROOT.parent / "configs" / "miniature.yaml").read_text(encoding="utf-8"))
    flags = {f"--{name}": config[name] for name in (*RENDERER, *REWARDS)}
    flags |= {"--max_new_tokens": config["max_completion_length"], "--dtype": "float32"}
    return [word for flag, value in flags.items() for word in (flag, str(value))]


def prompts(out: Path) -> Path:
    """The held-out prompts beside the folder `out`, in GenEval's format."""
    path = out.with_name(f"{out.name}-metadata.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(geneval_row(prompt)) + "\n" for prompt in world.splits()[1]), encoding="utf-8")
    return path


def run(argv: Sequence[str]) -> int:
    """Fill in the miniature's defaults and evaluate; returns the exit code."""
    words = list(argv)
    if "--metadata" not in words and "--out" in words[:-1]:
        words += ["--metadata", str(prompts(Path(words[words.index("--out") + 1])))]
    return main([*defaults(), *words], {**BENCHMARKS, **MINIATURE})


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
