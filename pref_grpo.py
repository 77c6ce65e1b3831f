"""Train a flow-matching image model by what its pictures are worth: GRPO over its own denoising, pairwise preference.

For each user prompt the model draws a group of G pictures; frozen rewards compare each with the prompt; what scores
above its group's mean becomes likelier. `--loss grpo|guard|dppo` treats denoising as a sequence of random steps and
trains some of them; `nft|awm` train on the finished pictures, noised again (models/flow.py has the formulas). With
`--rewards preference` a VLM compares pictures in pairs, and a picture's reward is its win rate: Pref-GRPO, arXiv
2508.20751. Text encoders and VAE stay frozen. Left out: training the language model (r1_prompter.py), video.

    accelerate launch --config_file=deepspeed_2.yaml pref_grpo.py --config configs/pref_grpo_flux.yaml

    python pref_grpo.py --help           every option with its reason
    ... --resume                         the same command again: go on from the newest good checkpoint

The run folder holds what others load: `pytorch_lora_weights.safetensors`, or a whole pipeline where no LoRA was
trained; `ema/` and `best/` hold the same of the averaged weights, at the end and where the evaluation was best.
Options: configs/pref_grpo_flux.yaml < `--config` YAML < flags. Exit codes: as r1_prompter.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.prompts import load_prompts, prompts_of_step
from errors import UserError
from interfaces import Prompt, Reward, Sample
from models import flow
from models.trained import Shadow, make_trainable, save_trained_alone
from rendering import RenderOptions, renderer_contents
from rendering.trajectory import FlowRenderer, Sampling, Step, Trajectory, check_method
from rewards import REWARDS, RewardContext, RewardOptions, build, check, reward_contents
from rewards.offload import describe
from run.files import file_hash
from run.folder import RunFolder
from run.heartbeat import Heartbeat
from run.loop import Loop, make_accelerator
from run.loop_options import LoopArguments
from run.options import may_differ, option, parse, run_main
from run.progress import start_run
from run.seeds import render_seed
from run.signals import Leave, leaving
from scoring import diagnostics
from scoring.advantages import mix, spread_by_chance
from scoring.cache import PictureCache
from scoring.judge import Judged, judge
from scoring.prefetch import Prefetcher
from scoring.progress import Evaluator, Training, WatchArguments
from scoring.rollouts import Rollout, rollout_rows, together

RECIPE = Path(__file__).resolve().parent / "configs" / "pref_grpo_flux.yaml"
NEEDS_REWRITE = ("format", "length")
LAG = 0.001  # by which the old policy's decay grows with each step, up to --old_decay; DiffusionNFT's
CACHE = 1e9  # bytes of pictures of the untrained model


# Options ---------------------------------------------------------------------------------------------------------


@dataclass
class FlowArguments:
    """The method. Loop, evaluation, renderer and rewards have options of their own beside these."""

    data: str = option(help="User prompts: .txt, one a line, or .jsonl (data/README.md).", changes="run")
    rewards: list[str] = option([], f"Rewards, of: {', '.join({*REWARDS} - {*NEEDS_REWRITE})}.", changes="run")
    reward_weights: list[float] = option([], "Of their advantages, in their order; unset: 1 each.", changes="run")
    held_out: list[str] = option([], "Scorers that are logged and never trained on.", changes="run")
    prompts_per_step: int = option(8, "Groups of a rollout, of all processes together.", changes="run", least=1)
    num_generations: int = option(8, "Pictures of a prompt: its group.", changes="run", least=2)
    updates_per_rollout: int = option(1, "Optimiser steps that share out a rollout.", changes="run", least=1)
    init_noise: str = option(
        "common", "A group's pictures start from it, or each from its own.", changes="run", choices=["common", "own"]
    )
    train_guidance: str = option(
        "none", "True guidance (a second pass) in training.", changes="run", choices=["none", "cfg"]
    )
    loss: str = option("grpo", "See models/flow.py.", changes="run", choices=[*flow.ON_PATH, *flow.FORWARD])
    sde: str = option("flow", "Random steps of grpo, guard and dppo.", changes="run", choices=[*flow.SDES])
    eta: float = option(0.7, "Strength of their noise.", changes="run", above=0)
    sde_window: str = option("first_half", "Which steps are random.", changes="run", choices=[*flow.WINDOWS])
    sde_steps: int = option(4, "Size of a sliding or random window.", changes="run", least=1)
    timesteps: int = option(3, "Noise levels at which nft and awm train on a picture.", changes="run", least=1)
    highest_noise: float = option(1.0, "They lie below this.", changes="run", above=0, most=1)
    strength: float = option(1.0, "nft's β; awm's weight of the velocity error.", changes="run", above=0)
    old_decay: float = option(
        0.5, "Of nft's and awm's old policy, at most; 0: newest.", changes="run", least=0, below=1
    )
    clip_range: float | None = option(None, "Unset: the loss's published one; dppo's is a KL.", changes="run", above=0)
    advantage_clip: float = option(5.0, "Bounds advantages; nft and awm divide by it.", changes="run", above=0)
    spread_floor: float = option(0.3, "Least spread of a group, as share of the batch's.", changes="run", least=0)
    beta: float = option(
        0.0,
        "Penalty: squared distance of velocities from the start's (awm: the old policy's).",
        changes="run",
        least=0,
    )


@dataclass(frozen=True)
class Options:
    """The options of one run."""

    script: FlowArguments
    loop: LoopArguments
    watch: WatchArguments
    render: RenderOptions
    reward: RewardOptions


def parse_options(argv: Sequence[str]) -> Options:
    """Options of one run: the recipe, then the `--config` YAML, then flags.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a missing or ill-typed value.
    """
    kinds = (FlowArguments, LoopArguments, WatchArguments, RenderOptions, RewardOptions)
    return Options(*parse(kinds, RECIPE, argv))


def plan(options: Options, prompts: int, processes: int) -> dict[str, int]:
    """The numbers that follow from the options; those that cut a group or a batch in two are refused.

    Raises:
        UserError: with the numbers that do not fit.
    """
    script, render, group = options.script, options.render, options.script.num_generations
    batch, steps, parts = render.render_batch_size, render.render_steps, script.updates_per_rollout
    if not isinstance(batch, int) or steps is None or steps < 2 or render.remote:
        raise UserError(
            f"--render_batch_size {batch}, --render_steps {steps}, --sdmodel_name {render.sdmodel_name}: give two "
            "numbers, the second 2 or more, and a pipeline on this machine"
        )
    for name, count in (("prompts_per_step", script.prompts_per_step), ("eval_prompts", options.watch.eval_prompts)):
        if count % processes:
            raise UserError(f"{name} {count} is not a multiple of the {processes} processes: no group may be split")
    if script.prompts_per_step > prompts:
        raise UserError(f"prompts_per_step {script.prompts_per_step}: {script.data} has {prompts} prompts")
    local = script.prompts_per_step // processes * group
    if local % (batch * parts):
        raise UserError(
            f"prompts_per_step {script.prompts_per_step} / {processes} process(es) x num_generations {group} = "
            f"{local} pictures are not a multiple of render_batch_size {batch} x updates_per_rollout {parts}"
        )
    if script.loss in flow.ON_PATH and script.sde_window in ("sliding", "random") and script.sde_steps >= steps:
        raise UserError(f"sde_steps {script.sde_steps}: of {steps} render_steps at most {steps - 1} can be random")
    window = flow.window(script.sde_window, steps, script.sde_steps, 1, options.loop.seed)
    trained = script.timesteps if script.loss in flow.FORWARD else len(window)
    return {
        "processes": processes,
        "pictures_per_rollout": local * processes,
        "pictures": options.loop.max_steps * local * processes,
        "trained_steps_per_picture": trained,
        "optimizer_steps": options.loop.max_steps * parts,
        "pictures_per_optimizer_step": local * processes // parts,
        "passes_per_optimizer_step": local // batch // parts * trained,
    }


def check_rewards(options: Options) -> None:
    """Refuse rewards and weights that cannot be meant.

    Raises:
        UserError: with the names or the numbers.
    """
    script = options.script
    names = [*script.rewards, *script.held_out]
    check(names, options.reward)
    if odd := [name for name in names if name in NEEDS_REWRITE]:
        raise UserError(f"reward {odd[0]!r} judges a rewrite, and there is none here: leave it out")
    if options.reward.preference_pairs == "anchor":
        raise UserError("--preference_pairs anchor compares with pictures that training does not draw: give all, or 3")
    if not script.rewards or len(script.reward_weights) not in (0, len(script.rewards)):
        raise UserError(f"--rewards {script.rewards} --reward_weights {script.reward_weights}: name rewards, and give "
                        "each a weight or none of them")  # fmt: skip


# The method ------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """This process's part of a rollout."""

    samples: list[Sample]
    paths: list[Trajectory]
    seeds: list[int]
    judged: Judged
    seconds: dict[str, float]


Passes = Iterator[tuple[Tensor, dict[str, float]]]


class PrefGRPO:
    """Rollouts and updates.

    Attributes:
        net: the transformer as accelerate prepared it; `renderer` draws with what is inside.
        ema, old, start: copies of the trained weights: the average that is evaluated, the old policy of nft and awm,
            and the reference of the penalty, which for awm is the old policy.
    """

    def __init__(
        self, options: Options, accelerator: Accelerator, renderer: FlowRenderer, prompts: Sequence[Prompt],
        rewards: Sequence[Reward], held_out: Sequence[Reward],
    ):  # fmt: skip
        self.options, self.script, self.accelerator, self.renderer = options, options.script, accelerator, renderer
        self.prompts, self.rewards, self.held_out = prompts, rewards, held_out
        self.weights = self.script.reward_weights or [1.0] * len(rewards)
        published, self.seed = flow.CLIP[self.script.loss], options.loop.seed
        self.clip = published if self.script.clip_range is None else self.script.clip_range
        self.is_forward = self.script.loss in flow.FORWARD
        self.is_checked = self.is_forward  # whether replayed log-probabilities were compared with the sampled ones
        trained = make_trainable(renderer.denoiser, options.loop)
        save_trained_alone(accelerator, renderer.denoiser)
        optimizer = torch.optim.AdamW(trained, options.loop.learning_rate, weight_decay=options.loop.weight_decay)
        self.net, self.optimizer = accelerator.prepare(renderer.denoiser, optimizer)
        renderer.pipe.transformer = accelerator.unwrap_model(self.net)
        self.ema = Shadow(renderer.denoiser)
        self.old = Shadow(renderer.denoiser) if self.is_forward else self.ema
        self.start = Shadow(renderer.denoiser) if self.script.beta and self.script.loss != "awm" else self.old
        accelerator.register_for_checkpointing(*dict.fromkeys((self.ema, self.old, self.start)))

    def learn(self, step: int, loop: Loop) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Rollout, advantages, update; metrics and rollouts of all processes."""
        batch = together(lambda: self.rollout(step, loop.heartbeat), step)
        loop.heartbeat.enter("train", step)
        started, count, judged = time.perf_counter(), len(batch.samples), batch.judged
        advantages, said = self.advantages(gather_object(judged.parts))
        mine = advantages[self.accelerator.process_index * count :][:count]
        learnt = self.update(step, batch.paths, torch.tensor(mine, dtype=torch.float32), loop)
        measured = {**learnt, **batch.seconds, "seconds/train": time.perf_counter() - started, **judged.metrics}
        rollouts = [
            Rollout(sample, None, (seed,), None, *scores)
            for sample, seed, *scores in zip(batch.samples, batch.seeds, judged.parts, judged.held_out, strict=True)
        ]
        room = self.options.loop.pictures_to_keep(step) // self.accelerator.num_processes
        rows = gather_object(rollout_rows(rollouts, mine, self.weights, loop.folder, room))
        found = diagnostics.of_pictures(rows, self.script.num_generations)
        return {**diagnostics.mean_of_processes(gather_object([measured])), **said, **found}, rows

    # Rollouts: draw groups, score them, compare their members

    def rollout(self, step: int, heartbeat: Heartbeat) -> Batch:
        """Draw and score this process's groups."""
        script, group, size = self.script, self.script.num_generations, self.renderer.chunk_size
        share = script.prompts_per_step // self.accelerator.num_processes
        mine = prompts_of_step(step, self.prompts, script.prompts_per_step, self.seed)
        mine = mine[self.accelerator.process_index * share :][:share]
        rows = [(prompt, member) for prompt in mine for member in range(group)]
        own = script.init_noise == "own"
        seeds = [render_seed(self.seed, prompt.id, step, member if own else 0) for prompt, member in rows]
        noises = [render_seed(self.seed, prompt.id, step, group + member) for prompt, member in rows]
        heartbeat.enter("render", step)
        started, paths, samples, sampling = time.perf_counter(), [], [], self._sampling(step)
        with Prefetcher([*self.rewards, *self.held_out]) as prefetcher, self._drawing_policy():
            for first in range(0, len(rows), size):
                if code := leaving():
                    raise Leave(code)
                some, whole = slice(first, first + size), len(samples) // group
                texts = [prompt.text for prompt, _ in rows[some]]
                paths.append(self.renderer.sample(texts, seeds[some], noises[some], sampling))
                drawn = zip(rows[some], paths[-1].images, strict=True)
                samples += [Sample(prompt, "", prompt.text, (image,)) for (prompt, _), image in drawn]
                for number in range(whole, len(samples) // group):
                    prefetcher.ready(samples[number * group :][:group])
        rendered = time.perf_counter()
        judged = judge(
            samples, self.rewards, self.held_out, group=group, on_phase=lambda phase: heartbeat.enter(phase, step)
        )
        seconds = {"seconds/render": rendered - started, "seconds/score": time.perf_counter() - rendered}
        return Batch(samples, paths, seeds, judged, seconds)

    def _sampling(self, step: int) -> Sampling:
        script, steps = self.script, self.options.render.render_steps
        window = () if self.is_forward else flow.window(script.sde_window, steps, script.sde_steps, step, self.seed)
        return Sampling(script.sde, script.eta, window, script.train_guidance == "cfg")

    def _drawing_policy(self):
        """DiffusionNFT draws with the old policy, the others with the newest."""
        return self.old.in_place() if self.script.loss == "nft" else nullcontext()

    def advantages(self, parts: Sequence[Mapping[str, float | None]]) -> tuple[list[float], dict[str, float]]:
        """From the scores of the whole rollout: advantages, clamped, and what there is to say of them."""
        script, group, pairs = self.script, self.script.num_generations, self.options.reward.preference_pairs
        columns = {reward.name: [part[reward.name] for part in parts] for reward in self.rewards}
        chance = {"preference": spread_by_chance(group, group - 1 if pairs == "all" else min(pairs, group - 1))}
        mixed = mix(columns, self.weights, group, floor=script.spread_floor, chance=chance)
        clamped = np.clip(mixed.advantages, -script.advantage_clip, script.advantage_clip).tolist()
        return clamped, {f"groups/{name}_by_chance": share for name, share in mixed.by_chance.items()}

    # Updates: what scored above its group's mean becomes likelier

    def update(self, step: int, paths: Sequence[Trajectory], advantages: Tensor, loop: Loop) -> dict[str, float]:
        """The optimiser steps of one rollout; returns means of what was seen, by denoising step or noise level."""
        parts, seen = self.script.updates_per_rollout, {}
        first = self.accelerator.process_index * len(paths)  # batches are counted over all processes
        chunks = advantages.to(self.accelerator.device).split(self.renderer.chunk_size)
        rows = list(zip(range(first, first + len(paths)), paths, chunks, strict=True))
        for part in range(parts):
            for loss, metrics in self._passes(step, rows[part::parts]):
                self.accelerator.backward(loss)
                for name, value in {"loss": float(loss.detach()), **metrics}.items():
                    seen.setdefault(name, []).append(value)
            self._compare_with_sampled(seen)
            loop.optimizer_step(self.optimizer, self.options.loop.max_grad_norm)
            self.ema.follow(self.options.loop.ema_decay)
        if self.is_forward:
            self.old.follow(min(LAG * step, self.script.old_decay))
        return {name: float(np.mean(values)) for name, values in seen.items()}

    def _passes(self, step: int, rows: Sequence[tuple[int, Trajectory, Tensor]]) -> Passes:
        """The forward passes of one optimiser step, each inside accelerate's accumulation."""
        for number, path, advantage in rows:
            for one in self._noised(step, number, path) if self.is_forward else path.steps:
                with self.accelerator.accumulate(self.net):
                    yield (self._forward_pass if self.is_forward else self._path_pass)(path, one, advantage)

    def _path_pass(self, path: Trajectory, step: Step, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        """One random step of a path, taken again."""
        start = self._velocity_of(self.start, path, step.x, step.timestep) if self.script.beta else None
        v = path.velocity(self.net, step.x, step.timestep)
        new, old = path.retake(step, v), step.taken
        found = flow.policy_loss(self.script.loss, new, old, advantage, self.clip)
        kl, gap = flow.divergence(new.step, old.step), (new.log_prob - old.log_prob).detach().abs().max()
        return self._finish(found, v, start, f"step_{step.index:02d}", kl, {"replay_gap": float(gap)})

    def _forward_pass(
        self, path: Trajectory, level: tuple[int, flow.Noised], advantage: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Finished pictures at one noise level."""
        script, (number, noised) = self.script, level
        timestep, x = path.timestep(noised.sigma), noised.x
        old = self._velocity_of(self.old, path, x, timestep)
        start = old if self.start is self.old else self._velocity_of(self.start, path, x, timestep)
        v = path.velocity(self.net, x, timestep)
        unit = advantage / script.advantage_clip
        found = flow.forward_loss(script.loss, noised, v, old, unit, clip=self.clip, strength=script.strength)
        return self._finish(found, v, start, f"level_{number:02d}", flow.velocity_error(v, old), {})

    def _finish(
        self, found: flow.Loss, v: Tensor, start: Tensor | None, name: str, kl: Tensor, metrics: dict[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a pass with its penalty, and its metrics; the gradient at the velocity joins them later."""
        loss = found.loss.mean()
        if self.script.beta:
            penalty = flow.velocity_error(v, start).mean()
            loss = loss + self.script.beta * penalty
            metrics["penalty"] = float(penalty.detach())
        metrics |= {
            f"ratio/{name}": float(found.ratio.detach().mean()),
            f"clipped/{name}": float(found.clipped.float().mean()),
            f"kl/{name}": float(kl.detach().mean()),
            "velocity_norm": float(v.detach().float().pow(2).mean().sqrt()),
        }
        v.register_hook(lambda gradient: metrics.update({f"gradient/{name}": float(gradient.float().norm())}))
        return loss, metrics

    def _noised(self, step: int, number: int, path: Trajectory) -> Iterator[tuple[int, flow.Noised]]:
        """Finished pictures at each of `timesteps` noise levels, from a generator of their own."""
        latents, count = path.latents, self.script.timesteps
        generator = torch.Generator("cpu").manual_seed(render_seed(self.seed, "noise levels", step, number))
        levels = flow.noise_levels(len(latents), count, self.script.highest_noise, generator)
        for level in range(count):
            noise = torch.randn(latents.shape, generator=generator)
            yield level, flow.Noised(latents, levels[level].to(latents.device), noise.to(latents.device))

    @torch.no_grad()
    def _velocity_of(self, copy: Shadow, path: Trajectory, x: Tensor, timestep: Tensor) -> Tensor:
        with copy.in_place():
            return path.velocity(self.renderer.denoiser, x, timestep)

    def write(self, folder: Path) -> None:
        """The weights of now, as others load them; every process calls it, one writes."""
        state = self.accelerator.get_state_dict(self.net)
        if self.accelerator.is_main_process:
            self.renderer.save(folder, state, self.options.loop.use_peft)

    def _compare_with_sampled(self, seen: Mapping[str, Sequence[float]]) -> None:
        """Before the first update of a process: the log-probabilities that were sampled must come again."""
        if self.is_checked:
            return
        self.is_checked = True
        gap, allowed = max(gather_object(seen["replay_gap"])), 0.0 if self.accelerator.device.type == "cpu" else 1e-4
        if not gap <= allowed:
            raise UserError(
                f"replayed log-probabilities differ by {gap:.2g} from the sampled ones (allowed: {allowed:g}), so the "
                "ratio is not 1 before the first update: leave out --render_compile, --render_attention and "
                "--render_quantization, or the pipeline combines its guidance otherwise: --train_guidance none"
            )


# One run ---------------------------------------------------------------------------------------------------------


def train(options: Options) -> None:
    """One run, from options to trained weights and report.

    Raises:
        UserError: bad input, found before any model is loaded where that is possible.
        ScoringError, Stopped: the run cannot go on.
        Leave: a signal told it to.
    """
    script, loop, watch, render, reward = vars(options).values()
    check_rewards(options)
    prompts = load_prompts(script.data)
    watched = watch.prompts(prompts)
    numbers = plan(options, len(prompts), int(os.environ.get("WORLD_SIZE", "1")))
    check_method(render.sdmodel_name, script.loss, script.train_guidance)
    accelerator = make_accelerator(numbers["passes_per_optimizer_step"], render.render_batch_size, loop.max_grad_norm)
    device, rank = str(accelerator.device), accelerator.process_index
    render.settle(device)
    reward.settle(reward.reward_device or device)
    folder = RunFolder(
        loop.outdir, all_options(options), may_differ=may_differ(*vars(options).values()), resume=loop.resume
    )
    folder.plan()
    if (folder.path / "ema").exists():
        raise UserError(f"--outdir {folder.path} is complete: it holds the trained weights")
    renderer = FlowRenderer(render, device, folder.path / "cache" / "texts")
    verdicts = folder.path / f"verdicts_{rank}.sqlite"
    context = RewardContext(reward.reward_device or device, None, prompts, loop.seed, verdicts)
    names = [*script.rewards, *script.held_out]
    scorers = build(names, reward, context)
    rewards, held_out = scorers[: len(script.rewards)], scorers[len(script.rewards) :]
    folder.contents = {**renderer_contents(render), **reward_contents(names, reward)}
    resume = start_run(folder, numbers, announce(options, numbers, scorers, prompts))
    texts = list(dict.fromkeys(prompt.text for prompt in (*prompts, *watched)))
    renderer.encode(texts[rank :: accelerator.num_processes], script.train_guidance == "cfg")
    accelerator.wait_for_everyone()
    method = PrefGRPO(options, accelerator, renderer, prompts, rewards, held_out)
    steps = Loop(
        accelerator, folder, resume, Heartbeat(folder.path, rank, loop.phase_budget), total=loop.max_steps,
        save_every=loop.save_steps, model=renderer.denoiser, keep=loop.save_total_limit, shown=progress_metrics,
    )  # fmt: skip
    anchored = replace(reward, preference_pairs="anchor")  # in a group the mean win rate is one half
    compared = [build([r.name], anchored, context)[0] if r.name == "preference" else r for r in rewards]
    evaluator = Evaluator(
        lambda *rows: renderer.draw(*rows, watch.eval_resolution), watched, compared, held_out, folder,
        PictureCache(folder.path / "cache", CACHE), loop.seed,
    )  # fmt: skip
    Training(method, steps, evaluator, watch, loop.max_absent_share).to_end()


def all_options(options: Options) -> dict[str, Any]:
    """All options in one, as `run.json` has them."""
    every = {name: value for part in vars(options).values() for name, value in asdict(part).items()}
    own = {"num_processes": int(os.environ.get("WORLD_SIZE", "1")), "data_hash": file_hash(Path(options.script.data))}
    return {**every, **own}


def announce(
    options: Options, numbers: Mapping[str, int], scorers: Sequence[Reward], prompts: Sequence[Prompt]
) -> list[str]:
    """What is about to run, in lines."""
    script, loop, side, other = options.script, options.loop, options.render.resolution, options.watch.eval_resolution
    return [
        f"{script.prompts_per_step} prompts x {script.num_generations} pictures = {numbers['pictures_per_rollout']} a "
        f"rollout, on {numbers['processes']} process(es); {numbers['trained_steps_per_picture']} steps of each are "
        f"trained; {script.updates_per_rollout} update(s) of {numbers['pictures_per_optimizer_step']} pictures, each "
        f"in {numbers['passes_per_optimizer_step']} passes; {numbers['pictures']} pictures in all",
        f"loss {script.loss}; {f'a LoRA of rank {loop.lora_r}' if loop.use_peft else 'all weights'} in float32 on a "
        f"pipeline in {options.render.render_dtype}; seed {loop.seed}; all options: {loop.outdir}/run.json",
        *[f"  {describe(scorer, prompts)}" for scorer in scorers],
        *([f"note: trained at {side} pixels but evaluated at {other}"] if other not in (None, side) else []),
    ]


def progress_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a step's metrics those that its progress line shows."""
    return {"reward": row.get("reward"), "win_rate": row.get("win_rate"), "grad_norm": row.get("grad_norm")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("pref_grpo", lambda: train(parse_options(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
