"""A training of an image model, and whether it gets better: the same prompts from the same noise, again and again.

A group's mean win rate is 0.5 whatever the model does, and a reward that is trained on rises when it is hacked. So
pictures of the averaged weights are compared with those that the untrained model drew from the same noise, by each
scorer: the share of prompts in which the new picture wins.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from data.prompts import load_prompts
from errors import Stopped, UserError
from interfaces import Prompt, Reward, Sample
from models.trained import Shadow
from report.page import write_report
from run.folder import RunFolder
from run.loop import Loop
from run.options import option
from run.seeds import render_seed
from scoring.cache import PictureCache
from scoring.judge import Watchdog, score_column
from scoring.rollouts import together

logger = logging.getLogger(__name__)

FALLEN = 0.25  # win rate against the untrained model below which the model has collapsed
WARNED = 0.1  # fall of a held-out scorer's win rate from its best that is worth a warning
Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image | None]]


@dataclass
class WatchArguments:
    """How an image model that learns is watched."""

    eval_data: str | None = option(None, "Prompts that are drawn again and again; unset: of --data.", changes="run")
    eval_prompts: int = option(16, "So many of them, evenly spaced in the file.", changes="run", least=1)
    eval_every: int = option(20, "Rollouts from one evaluation to the next.", changes="run", least=1)
    eval_resolution: int | None = option(None, "Side of its pictures; unset: --resolution.", changes="run", least=1)
    max_drift: float = option(
        3.0, "Change of the norm of what the model gives out that stops the run.", changes="run", above=1
    )

    def prompts(self, data: Sequence[Prompt]) -> list[Prompt]:
        """Those that are drawn; UserError if there are too few."""
        prompts = load_prompts(self.eval_data) if self.eval_data else list(data)
        if len(prompts) < self.eval_prompts:
            raise UserError(f"--eval_prompts {self.eval_prompts}: there are {len(prompts)}; give fewer")
        return [prompts[i * len(prompts) // self.eval_prompts] for i in range(self.eval_prompts)]


class Evaluator:
    """Draws and scores the evaluation's prompts, shared out among the processes.

    Args:
        draw: texts and seeds -> pictures.
        prompts: a multiple of the number of processes.
        rewards: that are trained on, and others that compare with `Sample.baseline_images`.
        held_out: these decide which weights are best, if there are any; else the rewards do.
        cache: of the untrained model's pictures.
        measures: further metrics of the model as it is; the same on every process.
    """

    def __init__(
        self,
        draw: Draw,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        held_out: Sequence[Reward],
        folder: RunFolder,
        cache: PictureCache,
        seed: int,
        measures: Sequence[Callable[[], Mapping[str, float]]] = (),
    ):
        state = PartialState()
        share = len(prompts) // state.num_processes
        self.prompts = prompts[state.process_index * share : (state.process_index + 1) * share]
        self.seeds = [render_seed(seed, prompt.id, 0, 0) for prompt in self.prompts]
        self.draw, self.rewards, self.held_out, self.folder, self.cache = draw, rewards, held_out, folder, cache
        self.measures = measures
        self._before: dict[str, list[float | None]] = {}

    def __call__(self, step: int) -> dict[str, float]:
        """`eval/NAME/mean` and `win_rate/NAME` of each scorer; writes the pictures to `evaluations/`."""
        rows = gather_object(together(lambda: self._rows(step), step))
        if PartialState().is_main_process:
            self.folder.write_rows("evaluations", step, rows)
        metrics = {}
        for scorer in (*self.rewards, *self.held_out):
            for kind, key in (("scores", f"eval/{scorer.name}/mean"), ("wins", f"win_rate/{scorer.name}")):
                known = [row[kind][scorer.name] for row in rows if row[kind][scorer.name] is not None]
                if known and (kind == "wins" or not scorer.needs_baseline_images):
                    metrics[key] = float(np.mean(known))
        rates = {one.name: metrics.get(f"win_rate/{one.name}") for one in (*self.rewards, *self.held_out)}
        known = [rate for rate in rates.values() if rate is not None]
        deciding = [rates[one.name] for one in self.held_out or self.rewards if rates[one.name] is not None]
        if known and deciding:
            means = {"win_rate": float(np.mean(deciding)), "win_rate_of_all": float(np.mean(known))}
            metrics |= {**means, "eval/pictures": float(len(rows))}
        for measure in self.measures:
            metrics |= measure()
        return metrics

    def _rows(self, step: int) -> list[dict[str, Any]]:
        texts = [prompt.text for prompt in self.prompts]
        images = self.draw(texts, self.seeds)
        before = [self.cache.get(*key) for key in zip(texts, self.seeds, strict=True)]
        if step == 0:
            before = images
            for text, seed, image in zip(texts, self.seeds, images, strict=True):
                if image is not None:
                    self.cache.put(text, seed, image)
        rows = [
            {"prompt_id": p.id, "prompt": p.text, "task": p.task, "scores": {}, "wins": {},
             "image": image and self.folder.save_image(image)}
            for p, image in zip(self.prompts, images, strict=True)
        ]  # fmt: skip
        for scorer in (*self.rewards, *self.held_out):
            samples = [
                Sample(p, "", p.text, (image,), (old,))
                for p, image, old in zip(self.prompts, images, before, strict=True)
            ]
            scores = score_column(scorer, samples)
            for row, score, win in zip(rows, scores, self._wins(scorer, scores, before), strict=True):
                row["scores"][scorer.name], row["wins"][scorer.name] = score, win
        return rows

    def _wins(
        self, scorer: Reward, scores: Sequence[float | None], before: Sequence[Image.Image | None]
    ) -> list[float | None]:
        """1, 0.5 or 0 of each picture against the untrained model's; None where one of them has no score."""
        if scorer.needs_baseline_images:  # it has compared them itself
            return list(scores)
        if scorer.name not in self._before:
            old = [Sample(p, "", p.text, (image,)) for p, image in zip(self.prompts, before, strict=True)]
            self._before[scorer.name] = score_column(scorer, old)
        pairs = zip(scores, self._before[scorer.name], strict=True)
        return [None if None in pair else (np.sign(pair[0] - pair[1]) + 1) / 2 for pair in pairs]


class Collapse:
    """Stops a run whose model falls apart, warns of one that cheats, and knows the best evaluation. Has a state.

    Args:
        max_drift: largest factor by which the output's norm may have grown or shrunk.
    """

    def __init__(self, max_drift: float):
        self.max_drift = max_drift
        self.norm, self.best, self.best_step, self.held = 0.0, 0.0, 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"norm": self.norm, "best": self.best, "best_step": self.best_step, "held": self.held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def check_norm(self, step: int, norm: float) -> None:
        """Raise Stopped if the output's norm is not what it was at the start; all processes see the same number."""
        self.norm = self.norm or norm
        if not self.norm / self.max_drift <= norm <= self.norm * self.max_drift:
            raise Stopped(
                f"step {step}: the norm of the model's output is {norm:.3g}, was {self.norm:.3g}, beyond --max_drift "
                f"{self.max_drift:g}: the model falls apart; {self._advice()}"
            )

    def check_evaluation(self, step: int, metrics: Mapping[str, float], held_out: Sequence[Reward]) -> bool:
        """Whether this evaluation is the best so far; Stopped if by all scorers the model is worse than untrained."""
        rate = metrics.get("win_rate")
        if rate is None:
            return False
        for scorer in held_out:
            now = metrics.get(f"win_rate/{scorer.name}")
            if now is None:
                continue
            self.held[scorer.name] = max(now, self.held.get(scorer.name, 0.0))
            if step and now < self.held[scorer.name] - WARNED:
                logger.warning(
                    "step %d: the held-out %s falls (wins %.2f, had won %.2f): the rewards are being hacked",
                    step, scorer.name, now, self.held[scorer.name],
                )  # fmt: skip
        of_all, chance = metrics["win_rate_of_all"], metrics["eval/pictures"] ** -0.5  # two standard errors of a coin
        if step and of_all < min(FALLEN, 0.5 - chance):
            raise Stopped(
                f"step {step}: pictures win {of_all:.2f} of comparisons with the untrained model's: {self._advice()}"
            )
        if step and rate >= self.best:
            self.best, self.best_step = rate, step
            return True
        return False

    def _advice(self) -> str:
        best = f"best/ has the weights of step {self.best_step}; " if self.best_step else ""
        return f"{best}lower --learning_rate, give more pictures a rollout, or --beta above 0"


class Method(Protocol):
    """What learns.

    Attributes:
        ema: the average of its weights.
        held_out: scorers that nothing is trained on.
    """

    ema: Shadow
    held_out: Sequence[Reward]

    def learn(self, step: int, loop: Loop) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One rollout and its updates; metrics, with `output_norm`, and rollouts of all processes."""
        ...

    def write(self, folder: Path) -> None:
        """The weights of now, as others load them; every process calls it, one writes."""
        ...


def in_words(metrics: Mapping[str, float]) -> str:
    """Means of an evaluation's scorers, and how often they prefer it to the untrained model."""
    means = [f"{key.split('/')[1]} {value:.4g}" for key, value in metrics.items() if key.startswith("eval/")]
    wins = [f"wins {metrics['win_rate']:.2f} of comparisons"] if "win_rate" in metrics else []
    return "  ".join([*wins, *(one for one in means if not one.startswith("pictures"))])


class Training:
    """A run around a method: watches it, writes it down, publishes what it learnt.

    Args:
        max_absent_share: of the pictures, see `Watchdog`.
    """

    def __init__(
        self, method: Method, loop: Loop, evaluator: Evaluator, watch: WatchArguments, max_absent_share: float
    ):
        self.method, self.loop, self.evaluator, self.watch, self.folder = method, loop, evaluator, watch, loop.folder
        self.collapse, self.watchdog = Collapse(watch.max_drift), Watchdog(max_absent_share)
        self.accelerator = loop.accelerator
        self.accelerator.register_for_checkpointing(self.collapse)

    def to_end(self) -> None:
        """All steps; then the weights and the report."""
        with self.loop:
            for step in self.loop.steps():
                watched = self.evaluate(step - 1) if (step - 1) % self.watch.eval_every == 0 else {}
                metrics, rows = self.method.learn(step, self.loop)
                self.loop.log({**metrics, **watched}, rows)
                self.watchdog.check(metrics, [])
                self.collapse.check_norm(step, metrics["output_norm"])
            last = self.evaluate(self.loop.done)
            self.loop.saver.publish(self.loop.done, self.publish)
        if self.accelerator.is_main_process:
            self.folder.log(self.loop.done, last)
            print(f"weights: {self.folder.path}\nreport: {write_report(self.folder.path)}", flush=True)

    def evaluate(self, step: int) -> dict[str, float]:
        """Of the averaged weights; they are kept in best/ if they are the best so far."""
        self.loop.heartbeat.enter("evaluate", step)
        with self.method.ema.in_place():
            metrics = self.evaluator(step)
            if self.accelerator.is_main_process:
                print(f"evaluation after {step} step(s): {in_words(metrics)}", flush=True)
            if self.collapse.check_evaluation(step, metrics, self.method.held_out):
                aside, best = self.folder.path / ".best", self.folder.path / "best"
                self.method.write(aside)
                if self.accelerator.is_main_process:
                    shutil.rmtree(best, ignore_errors=True)
                    aside.replace(best)
        return metrics

    def publish(self, path: Path) -> None:
        """The trained weights, and the averaged ones beside them."""
        self.method.write(path)
        with self.method.ema.in_place():
            self.method.write(path / "ema")
