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

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from data.prompts import load_prompts
from errors import UserError
from group_training import Batch, GroupArguments, GroupMethod, Row, Setup, processes, run, set_up
from interfaces import Sample
from models import flow
from models.trained import Shadow, average, make_trainable, save_trained_alone
from rendering import RenderOptions, renderer_contents
from rendering.trajectory import FlowRenderer, Sampling, Step, Trajectory, check_method
from rewards import RewardOptions
from run.files import Contents
from run.loop import Loop
from run.loop_options import LoopArguments
from run.options import option, parse, run_main
from run.seeds import render_seed
from scoring.diagnostics import means
from scoring.progress import WatchArguments

RECIPE = Path(__file__).resolve().parent / "configs" / "pref_grpo_flux.yaml"
LAG = 0.001  # by which the old policy's decay grows with each step, up to --old_decay; DiffusionNFT's


# Options ---------------------------------------------------------------------------------------------------------


@dataclass
class FlowArguments:
    """The method. Groups, loop, evaluation, renderer and rewards have options of their own beside these."""

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


@dataclass(frozen=True)
class Options:
    """The options of one run."""

    groups: GroupArguments
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
    kinds = (GroupArguments, FlowArguments, LoopArguments, WatchArguments, RenderOptions, RewardOptions)
    return Options(*parse(kinds, RECIPE, argv))


def plan(options: Options, prompts: int, processes: int) -> dict[str, int]:
    """The numbers that follow from the options; those that cut a group or a batch in two are refused.

    Raises:
        UserError: with the numbers that do not fit.
    """
    groups, script, render = options.groups, options.script, options.render
    batch, steps, parts = render.render_batch_size, render.render_steps, groups.updates_per_rollout
    if not isinstance(batch, int) or steps is None or steps < 2 or render.remote:
        raise UserError(
            f"--render_batch_size {batch}, --render_steps {steps}, --sdmodel_name {render.sdmodel_name}: give two "
            "numbers, the second 2 or more, and a pipeline on this machine"
        )
    local = groups.local_pictures(prompts, options.watch.eval_prompts, processes, batch, "render_batch_size")
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


# The method ------------------------------------------------------------------------------------------------------


Passes = Iterator[tuple[Tensor, dict[str, float]]]


class PrefGRPO(GroupMethod):
    """Rollouts and updates.

    Attributes:
        net: the transformer as accelerate prepared it; `renderer` draws with what is inside.
        ema, old, start: copies of the trained weights: the average that is evaluated, the old policy of nft and awm,
            and the reference of the penalty, which for awm is the old policy.
    """

    def __init__(self, options: Options, setup: Setup, renderer: FlowRenderer):
        pairs = options.reward.preference_pairs
        super().__init__(options.groups, options.loop, pairs, setup)
        self.options, self.script, self.renderer = options, options.script, renderer
        self.chunk, accelerator = renderer.chunk_size, setup.accelerator
        published = flow.CLIP[self.script.loss]
        self.clip = published if self.groups.clip_range is None else self.groups.clip_range
        self.is_forward = self.script.loss in flow.FORWARD
        self.is_checked = self.is_forward  # whether replayed log-probabilities were compared with the sampled ones
        trained = make_trainable(renderer.denoiser, options.loop)
        if options.loop.gradient_checkpointing:
            renderer.denoiser.enable_gradient_checkpointing()
        save_trained_alone(accelerator, renderer.denoiser)
        optimizer = torch.optim.AdamW(trained, options.loop.learning_rate, weight_decay=options.loop.weight_decay)
        self.net, self.optimizer = accelerator.prepare(renderer.denoiser, optimizer)
        renderer.pipe.transformer = accelerator.unwrap_model(self.net)
        self.ema = average(renderer.denoiser, options.loop.ema_decay)
        self.old = Shadow(renderer.denoiser) if self.is_forward else self.ema
        self.start = Shadow(renderer.denoiser, None) if self.groups.beta and self.script.loss != "awm" else self.old
        accelerator.register_for_checkpointing(*dict.fromkeys((self.ema, self.old, self.start)))

    # Rollouts

    def draw(self, step: int, rows: Sequence[Row]) -> tuple[list[Sample], Trajectory]:
        """Pictures, and how each was drawn."""
        script, steps = self.script, self.options.render.render_steps
        window = () if self.is_forward else flow.window(script.sde_window, steps, script.sde_steps, step, self.seed)
        sampling = Sampling(script.sde, script.eta, window, script.train_guidance == "cfg")
        group = self.groups.num_generations
        common = [render_seed(self.seed, row.prompt.id, step, 0) for row in rows]
        noises = [render_seed(self.seed, row.prompt.id, step, group + row.member) for row in rows]
        seeds = [row.seed for row in rows] if script.init_noise == "own" else common
        path = self.renderer.sample([row.prompt.text for row in rows], seeds, noises, sampling)
        drawn = zip(rows, path.images, strict=True)
        return [Sample(row.prompt, "", row.prompt.text, (image,)) for row, image in drawn], path

    def drawing_policy(self):
        """DiffusionNFT draws with the old policy, the others with the newest."""
        return self.old.in_place() if self.script.loss == "nft" else super().drawing_policy()

    # Updates: what scored above its group's mean becomes likelier

    def update(self, step: int, batch: Batch, advantages: Tensor, loop: Loop) -> dict[str, float]:
        """The optimiser steps of one rollout; returns means of what was seen, by denoising step or noise level."""
        paths, parts, seen = batch.drawn, self.groups.updates_per_rollout, {}
        first = self.accelerator.process_index * len(paths)  # batches are counted over all processes
        chunks = advantages.to(self.accelerator.device).split(self.chunk)
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
        return means(seen)

    def _passes(self, step: int, rows: Sequence[tuple[int, Trajectory, Tensor]]) -> Passes:
        """The forward passes of one optimiser step, each inside accelerate's accumulation."""
        for number, path, advantage in rows:
            for one in self._noised(step, number, path) if self.is_forward else path.steps:
                with self.accelerator.accumulate(self.net):
                    yield (self._forward_pass if self.is_forward else self._path_pass)(path, one, advantage)

    def _path_pass(self, path: Trajectory, step: Step, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        """One random step of a path, taken again."""
        start = self._velocity_of(self.start, path, step.x, step.timestep) if self.groups.beta else None
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
        unit = advantage / self.groups.advantage_clip
        found = flow.forward_loss(script.loss, noised, v, old, unit, clip=self.clip, strength=script.strength)
        return self._finish(found, v, start, f"level_{number:02d}", flow.velocity_error(v, old), {})

    def _finish(
        self, found: flow.Loss, v: Tensor, start: Tensor | None, name: str, kl: Tensor, metrics: dict[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a pass with its penalty, and its metrics; the gradient at the velocity joins them later."""
        loss = found.loss.mean()
        if self.groups.beta:
            penalty = flow.velocity_error(v, start).mean()
            loss = loss + self.groups.beta * penalty
            metrics["penalty"] = float(penalty.detach())
        metrics |= {
            f"ratio/{name}": float(found.ratio.detach().mean()),
            f"clipped/{name}": float(found.clipped.float().mean()),
            f"kl/{name}": float(kl.detach().mean()),
            "output_norm": float(v.detach().float().pow(2).mean().sqrt()),
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
    """One run, from options to trained weights and report; see `group_training.run`."""
    setup, renderer = prepare(options)
    method, side = PrefGRPO(options, setup, renderer), options.watch.eval_resolution
    run(setup, method, lambda *rows: renderer.draw(*rows, side), renderer.denoiser)


def prepare(options: Options) -> tuple[Setup, FlowRenderer]:
    """All that a run needs but its method; bad input is refused before any model is loaded where that is possible."""
    groups, script, render, watch = options.groups, options.script, options.render, options.watch
    groups.check_rewards(options.reward)
    prompts = load_prompts(groups.data)
    watched = watch.prompts(prompts)
    numbers = plan(options, len(prompts), processes())
    check_method(render.sdmodel_name, script.loss, script.train_guidance)
    parts = tuple(vars(options).values())

    def render_contents(device: str) -> Contents:
        render.settle(device)
        return renderer_contents(render)

    setup = set_up(
        parts, numbers, render.render_batch_size, render_contents, announce(options, numbers), prompts, watched
    )
    renderer = FlowRenderer(render, setup.device, setup.folder.path / "cache" / "texts")
    texts = list(dict.fromkeys(prompt.text for prompt in (*prompts, *watched)))
    state = setup.accelerator
    renderer.encode(texts[state.process_index :: state.num_processes], script.train_guidance == "cfg")
    state.wait_for_everyone()
    return setup, renderer


def announce(options: Options, numbers: Mapping[str, int]) -> list[str]:
    """What is about to run, in lines."""
    groups, script, loop, side, other = (
        options.groups, options.script, options.loop, options.render.resolution, options.watch.eval_resolution
    )  # fmt: skip
    return [
        *groups.announce(numbers, f"{numbers['trained_steps_per_picture']} steps of each are trained"),
        f"loss {script.loss}; {f'a LoRA of rank {loop.lora_r}' if loop.use_peft else 'all weights'} in float32 on a "
        f"pipeline in {options.render.render_dtype}; seed {loop.seed}; all options: {loop.outdir}/run.json",
        *([f"note: trained at {side} pixels but evaluated at {other}"] if other not in (None, side) else []),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("pref_grpo", lambda: train(parse_options(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
