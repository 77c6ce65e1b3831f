"""Train a language model to think about an image prompt and rewrite it: GRPO through a frozen text-to-image model.

For each user prompt the policy writes G completions, `<think>...</think> <answer>rewrite</answer>`; a frozen pipeline
draws each rewrite, all of a group from the same noise; frozen rewards compare picture and ORIGINAL prompt; what scores
above its group's mean becomes likelier. Only the policy learns. RePrompt (arXiv 2505.17540) is the nearest published
system; the optimiser is TRL's `GRPOTrainer`, which this file feeds and records but does not change.

Left out: training the image model, a value model, asynchronous rendering, evaluation (see evaluation/).

    accelerate launch --config_file=deepspeed_2.yaml r1_prompter.py --data data/generation_prompts_1k_filterd.txt \\
        --gpt_path Qwen/Qwen2.5-3B-Instruct --sdmodel_name black-forest-labs/FLUX.1-dev --outdir r1_prompter_with_flux

    python r1_prompter.py --help                        every option, ours and TRL's, with its reason
    python r1_prompter.py --config configs/some.yaml    what differs from the recipe, configs/flux_dev.yaml
    ... --resume                                        the same command again: go on from the newest good checkpoint

Options: configs/flux_dev.yaml < `--config` YAML < flags. Exit code 2 and one line on stderr for whatever is wrong with
the input; 1 if a run had to stop (pictures, scores, numbers, disk); 143 and 130 after SIGTERM and Ctrl-C, once saved.
What happens to a run that is killed, starved or lied to: docs/reliability.md.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import RepeatSampler

from data.prompts import load_prompts
from errors import UserError
from interfaces import Prompt, Renderer, Reward
from models.devices import has_bfloat16, pick_device
from models.frozen import without_zero3_init
from models.policy import (
    ChatTemplate,
    load_tokenizer,
    policy_contents,
    prepare_policy,
    record_base_model,
    sample_as_asked,
)
from prompting import messages
from rendering import AUTO, RenderOptions, load_renderer, renderer_contents
from report.plots import progressing
from rewards import REWARDS, RewardContext, RewardOptions, build, check, reward_contents
from rewards.offload import describe
from run.files import file_hash
from run.folder import Resume, RunFolder
from run.heartbeat import Heartbeat
from run.options import SHARE, may_differ, option, parse, resume_option, run_main, set_renamed
from run.progress import start_run
from run.trainer import EpochOrder, RunTrainer, warn_if_bf16_loses_updates
from scoring.cache import PictureCache
from scoring.diagnostics import diagnose, mean_of_processes
from scoring.drawing import Drawer
from scoring.judge import Watchdog
from scoring.rollouts import Rollout, Scorer, rollout_rows

RECIPE = Path(__file__).resolve().parent / "configs" / "flux_dev.yaml"


# Options ---------------------------------------------------------------------------------------------------------


@dataclass
class ScriptArguments:
    """What TRL has no name for. Everything else (`--learning_rate`, `--use_peft`, `--use_vllm`, ...) is TRL's own."""

    data: str = option(help="User prompts: .txt, one a line, or .jsonl (data/README.md).", changes="run")
    outdir: str = option(
        help="Run folder, new or this run's own; the trained policy is saved there.", changes="nothing"
    )
    gpt_path: str = option(
        "Qwen/Qwen2.5-3B-Instruct", "Policy: folder or hub name of an instruct model.", changes="run"
    )
    rewards: list[str] = option(
        [], f"Rewards, of: {', '.join(REWARDS)}; weighted by --reward_weights in this order (1 each).", changes="run"
    )
    held_out: list[str] = option(
        [], "Rewards that are scored and logged, never trained on; they show reward hacking.", changes="run"
    )
    reasoning: bool = option(
        True, "Think before rewriting; false: the rewrite alone is asked for and read.", changes="run"
    )
    common_seeds: bool = option(
        True, "All members of a group start from the same noise; false: each from its own.", changes="run"
    )
    images_per_rewrite: int = option(
        1, "Pictures per rewrite, averaged; another prompt often teaches more at that cost.", changes="run", least=1
    )
    picture_cache: float = option(
        4.0, "GB on disk for the raw prompts' pictures, which some rewards compare with.", changes="nothing", least=0
    )
    max_absent_share: float = option(
        0.5, "Readable samples without score that stop the run after three batches.", changes="nothing", **SHARE
    )
    save_images_every: int = option(
        10, "Optimiser steps between steps whose pictures are kept; first and last always.", changes="nothing", least=1
    )
    save_images_max: int = option(
        64, "Pictures kept of such a step; 64 of 512 px are about 25 MB.", changes="nothing", least=0
    )
    phase_budget: float = option(
        1800.0, "Seconds of one phase after which all stacks are written down.", changes="nothing", above=0
    )
    resume: str | None = resume_option()


@dataclass(frozen=True)
class Options:
    """The options of one run: ours, the renderer's, the rewards', TRL's."""

    script: ScriptArguments
    render: RenderOptions
    reward: RewardOptions
    training: GRPOConfig
    model: ModelConfig


def parse_options(argv: Sequence[str], training: type[GRPOConfig] = GRPOConfig) -> Options:
    """Options of one run: the recipe, then the `--config` YAML, then flags; TRL's in a class that may be `training`.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a missing or ill-typed value.
    """
    kinds = (ScriptArguments, RenderOptions, RewardOptions, training, ModelConfig)
    options = Options(*parse(kinds, RECIPE, argv))
    set_renamed(options.script.outdir, options.script.gpt_path, options.training, options.model)
    options.render.fit_text(options.training.max_completion_length, options.script.reasoning)
    return options


def plan(script: ScriptArguments, training: GRPOConfig, prompts: int) -> dict[str, int]:
    """The numbers that follow from the options; options that cut a group, a step or a checkpoint in two are refused.

    Raises:
        UserError: with the numbers that do not fit.
    """
    group, micro_batches = training.num_generations, training.steps_per_generation
    local = training.per_device_train_batch_size * micro_batches
    if local % group:
        raise UserError(
            f"per_device_train_batch_size {training.per_device_train_batch_size} x steps_per_generation "
            f"{micro_batches} = {local} is not a multiple of num_generations {group}: a group must not be split"
        )
    passes, accumulation = micro_batches * training.num_iterations, training.gradient_accumulation_steps
    if passes % accumulation:
        raise UserError(
            f"steps_per_generation {micro_batches} x num_iterations {training.num_iterations} = {passes} is not a "
            f"multiple of gradient_accumulation_steps {accumulation}: an optimiser step would mix two generations"
        )
    cycle = passes // accumulation
    if training.save_strategy == "steps" and training.save_steps % cycle:
        raise UserError(
            f"save_steps {training.save_steps} is not a multiple of the {cycle} optimiser steps that one generation "
            "serves: a checkpoint in between would draw its pictures again on --resume"
        )
    per_generation = training.generation_batch_size // group
    if prompts < per_generation:
        raise UserError(f"{script.data} has {prompts} prompts, fewer than the {per_generation} of one generation")
    per_epoch = prompts // per_generation * cycle
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    pictures = training.generation_batch_size * script.images_per_rewrite
    return {
        "processes": training.world_size,
        "prompts_per_generation": per_generation,
        "completions_per_generation": training.generation_batch_size,
        "images_per_generation": pictures,  # at most: equal rewrites are drawn once
        "optimizer_steps_per_generation": cycle,
        "optimizer_steps_per_epoch": per_epoch,
        "optimizer_steps": steps,
        "images": math.ceil(steps / cycle) * pictures,
    }


# The frozen ------------------------------------------------------------------------------------------------------


def check_rewards(options: Options, weights: Sequence[float] | None) -> None:
    """Refuse rewards, weights and time limits that cannot be meant.

    Raises:
        UserError: with the names or the numbers.
    """
    script = options.script
    check([*script.rewards, *script.held_out], options.reward, options.training.ddp_timeout)
    if weights is not None and len(weights) != len(script.rewards):
        raise UserError(f"reward_weights {weights} for rewards {script.rewards}: give one for each")
    waiting, most = options.render.render_batch_timeout, options.training.ddp_timeout
    if options.render.remote and waiting >= most / 2:
        raise UserError(
            f"render_batch_timeout {waiting:g} s is not below half of ddp_timeout {most} s, when processes that wait "
            "take each other for dead: lower the first or raise the second"
        )


def conversations(prompts: Iterable[Prompt], template: ChatTemplate) -> Dataset:
    """What TRL is given of each prompt: the policy's instructions with it, and its id."""
    asked = [(template.fit(messages(prompt.text, template.reasoning)), prompt.id) for prompt in prompts]
    return Dataset.from_list([{"prompt": conversation, "prompt_id": id} for conversation, id in asked])


def load_template(options: Options) -> ChatTemplate:
    """The policy's tokenizer, with the chat template as the run uses it."""
    path, revision, training = options.script.gpt_path, options.model.model_revision, options.training
    tokenizer = load_tokenizer(path, revision, training.trust_remote_code, training.chat_template_kwargs)
    return ChatTemplate(tokenizer, options.script.reasoning)


def load_frozen(
    options: Options, prompts: Sequence[Prompt]
) -> tuple[ChatTemplate, Renderer, list[Reward], list[Reward]]:
    """Tokenizer with its template, renderer, rewards and held-out scorers; one error names all that is missing.

    Raises:
        UserError: with each missing checkpoint's name, size, licence and the command that fetches it.
    """
    script, training, missing, template, renderer = options.script, options.training, [], None, None
    names = [*script.rewards, *script.held_out]
    for device in (options.render.render_device, options.reward.reward_device):
        pick_device(device or "auto")
    with without_zero3_init():
        try:
            template = load_template(options)
        except UserError as error:
            missing.append(str(error))
        try:
            renderer = load_renderer(options.render, str(training.device), measuring=True)
        except UserError as error:
            missing.append(str(error))
            names = [name for name in names if name != "length"]  # it counts the tokens of the renderer
        device = options.reward.reward_device or options.render.render_device or str(training.device)
        verdicts = Path(script.outdir) / f"verdicts_{training.process_index}.sqlite"
        context = RewardContext(device, renderer, prompts, training.seed, verdicts)
        try:
            rewards = build(names, options.reward, context)
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; and ".join(missing))
    return template, renderer, rewards[: len(script.rewards)], rewards[len(script.rewards) :]


def make_scorer(
    options: Options,
    prompts: Mapping[str, Prompt],
    renderer: Renderer,
    rewards: Sequence[Reward],
    held_out: Sequence[Reward],
    enter: Callable[[str, int], None] = lambda phase, step: None,
) -> Scorer:
    """What draws and scores this run's rollouts."""
    script, training = options.script, options.training
    drawer = Drawer(
        renderer,
        group=training.num_generations,
        images_per_rewrite=script.images_per_rewrite,
        run_seed=training.seed,
        common_seeds=script.common_seeds,
        cache=PictureCache(Path(script.outdir) / "cache", script.picture_cache * 1e9, training.world_size),
    )
    return Scorer(drawer, rewards, prompts, held_out=held_out, reasoning=script.reasoning, enter=enter)


# The method ------------------------------------------------------------------------------------------------------


class RewardColumns:
    """The seam between rewards and TRL: completions are scored once, and each reward is a column of the result.

    Attributes:
        rollouts: of the last batch.
    """

    def __init__(self, scorer: Scorer, whole: Callable[[str], str] = str):
        self.scorer, self.whole = scorer, whole
        self.rollouts: list[Rollout] = []
        self._completions: list | None = None

    def functions(self) -> list[Callable[..., list[float | None]]]:
        """One plain function per reward, named after it: TRL gives each its own column, weight and curve."""
        return [self._function(reward.name) for reward in self.scorer.rewards]

    def _function(self, name: str) -> Callable[..., list[float | None]]:
        def column(*, completions, prompt_id, trainer_state, **_) -> list[float | None]:
            if completions is not self._completions:  # the first reward of this batch: draw and score it
                texts = [self.whole(turns[0]["content"]) for turns in completions]
                self.rollouts = self.scorer.score_together(texts, prompt_id, trainer_state.global_step + 1)
                self._completions = completions
            return [rollout.parts[name] for rollout in self.rollouts]

        column.__name__ = name
        return column


def _without_conversation(record: logging.LogRecord) -> bool:
    """Shorten TRL's warning of a rollout that has no score, which holds the rollout's whole conversation."""
    if "All reward functions returned None" in str(record.msg):
        record.msg = "rollouts without a score are left out of this step: absent/ in metrics.jsonl has the causes"
    return True


class RewriteTrainer(RunTrainer, GRPOTrainer):
    """TRL's GRPO, which also times its phases and writes down every rollout with the advantage it was given."""

    def __init__(self, *args: Any, columns: RewardColumns, script: ScriptArguments, **kwargs: Any):
        super().__init__(*args, reward_funcs=columns.functions(), **kwargs)
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_without_conversation)
        self.columns, self.script, self.watchdog = columns, script, Watchdog(script.max_absent_share, script.reasoning)
        sample_as_asked(self.model, self.args)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        self.add_callback(EpochOrder(sampler))
        return sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.heartbeat.enter("generate", self.state.global_step + 1)
        started = time.perf_counter()
        batch = super()._generate_and_score_completions(inputs)  # sample, draw, score, advantages
        seconds = time.perf_counter() - started
        metrics = self.columns.scorer.metrics
        drawing = metrics["seconds/render"] + metrics["seconds/score"]
        measured = mean_of_processes(gather_object([{**metrics, "seconds/generate": seconds - drawing}]))
        rows = gather_object(self._rows(batch["advantages"].tolist()))
        found = diagnose(rows, self.args.num_generations, self.columns.scorer.drawer.renderer.max_tokens)
        for name, value in {**measured, **found}.items():
            self._metrics["train"][name].append(value)
        if self.accelerator.is_main_process:
            self.folder.write_rows("rollouts", self.state.global_step + 1, rows)
        completions = [row["completion"] for row in rows]
        self.watchdog.check({**measured, **found}, completions)  # the same verdict on every rank
        return batch

    def _rows(self, advantages: list[float]) -> list[dict[str, Any]]:
        """This process's rollouts as rows; keeps pictures where it is their step."""
        room = self.script.save_images_max // self.accelerator.num_processes if self._keeps_images() else 0
        return rollout_rows(self.columns.rollouts, advantages, self.reward_weights.tolist(), self.folder, room)

    def _keeps_images(self) -> bool:
        step, cycle = self.state.global_step, self.cycle
        return (
            step + cycle >= self.state.max_steps or step // cycle % max(1, self.script.save_images_every // cycle) == 0
        )


def progress_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a step's metrics those that its progress line shows."""
    return {"reward": row.get("reward"), **{name: row[f"rewards/{name}/mean"] for name in progressing(row)}}


def train(options: Options) -> None:
    """One run, from options to trained policy and report.

    Raises:
        UserError: bad input, found before any model is loaded where that is possible.
        ScoringError, Stopped: the run cannot go on.
        Leave: a signal told it to.
    """
    script, training, model = options.script, options.training, options.model
    options.render.settle(str(training.device))
    options.reward.settle(options.render.render_device or str(training.device))
    check_rewards(options, training.reward_weights)
    prompts = {prompt.id: prompt for prompt in load_prompts(script.data)}
    numbers = plan(script, training, len(prompts))
    folder = RunFolder(
        script.outdir, all_options(options), may_differ=may_differ(*vars(options).values()), resume=script.resume
    )
    resume = folder.plan(numbers["optimizer_steps"])
    template, renderer, rewards, held_out = load_frozen(options, list(prompts.values()))
    numbers["render_batch_size"] = choose_run_batch_size(renderer, options.render.render_batch_size, resume)
    folder.contents = {
        **policy_contents(script.gpt_path, model.model_revision),
        **renderer_contents(options.render),
        **reward_contents([*script.rewards, *script.held_out], options.reward),
    }
    resume = start_run(
        folder, numbers, _announce(options, numbers, folder, [*rewards, *held_out], [*prompts.values()])
    )
    heartbeat = Heartbeat(folder.path, training.process_index, script.phase_budget)
    scorer = make_scorer(options, prompts, renderer, rewards, held_out, heartbeat.enter)
    trainer = RewriteTrainer(
        model=prepare_policy(script.gpt_path, training, model.use_peft),
        args=training,
        train_dataset=conversations(prompts.values(), template),
        processing_class=template.tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
        columns=RewardColumns(scorer, template.whole),
        folder=folder,
        resume=resume,
        heartbeat=heartbeat,
        shown=progress_metrics,
        cycle=numbers["optimizer_steps_per_generation"],
        script=script,
    )
    record_base_model(trainer.model, script.gpt_path, model.model_revision)
    trainer.run_to_end()


def choose_run_batch_size(renderer: Renderer, asked: int | str, resume: Resume) -> int:
    """Pictures a call: as asked for; for auto the number that the run began with, or else what a trial finds now."""
    if asked != AUTO:
        return asked
    before = resume.derived.get("render_batch_size")
    if before is not None:
        renderer.chunk_size = before
        return before
    return renderer.choose_batch_size()


def all_options(options: Options) -> dict[str, Any]:
    """All options in one, as `run.json` has them."""
    ours = {**asdict(options.script), **asdict(options.render), **asdict(options.reward)}
    return {
        **options.training.to_dict(),
        **asdict(options.model),
        **ours,
        "num_processes": options.training.world_size,
        "data_hash": file_hash(Path(options.script.data)),
    }


def _announce(
    options: Options, numbers: dict[str, int], folder: RunFolder, scorers: Sequence[Reward], prompts: Sequence[Prompt]
) -> list[str]:
    script, training, render = options.script, options.training, options.render
    why = "" if has_bfloat16(render.render_device or str(training.device)) else " (no bfloat16 instructions here)"
    return [
        f"{numbers['prompts_per_generation']} prompts x {training.num_generations} completions = "
        f"{numbers['completions_per_generation']} rollouts and up to {numbers['images_per_generation']} pictures per "
        f"generation, on {numbers['processes']} process(es)",
        f"{numbers['optimizer_steps_per_generation']} optimiser step(s) per generation, "
        f"{numbers['optimizer_steps_per_epoch']} per epoch, {numbers['optimizer_steps']} in all; up to "
        f"{numbers['images']} pictures in all",
        f"rewards {', '.join(script.rewards)}; held out {', '.join(script.held_out) or 'none'}; seed {training.seed}; "
        f"all options: {folder.path}/run.json",
        f"numbers: renderer {render.render_dtype}, ORM {options.reward.orm_dtype}, policy {options.model.dtype}{why}",
        *[f"  {describe(scorer, prompts)}" for scorer in scorers],
        *warn_if_bf16_loses_updates(training, options.model),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("r1_prompter", lambda: train(parse_options(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
