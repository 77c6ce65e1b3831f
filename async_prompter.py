"""Train the rewriter while pictures are drawn on other machines: TRL's AsyncGRPOTrainer in place of its GRPOTrainer.

A vLLM server writes completions; a worker process has them drawn by render servers and scores them, one whole group
at a time; this trainer takes what is ready and sends its weights to the vLLM server. Nobody waits for anybody, so a
rollout may be older than the policy that it trains (`--max_staleness`); the ratio is to the log probabilities of the
version that wrote it. When that pays, and what it lacks: README, "Asynchronous training".

    accelerate launch --num_processes 2 async_prompter.py --data data/generation_prompts_1k_filterd.txt \\
        --sdmodel_name http://127.0.0.1:8001/v1 --vllm_server_base_url http://127.0.0.1:8000 --outdir runs/async

`rollouts/step_N` has the N-th groups in the order of scoring; step N or a later one learns from them, unless too old.
Guards (training/guard.py): checkpoints, signals, gradients, full disk and loggers as for the other trainers. Not exact
resume, since rollouts under way are lost and arrival is never the same twice; not the heartbeat of drawing, for which
TRL's own (`--heartbeat_stale_after_s`) and the time limits of servers stand in.

Options: configs/async.yaml < `--config` YAML < flags. Exit codes: those of r1_prompter.py.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, ModelConfig, get_peft_config
from trl.experimental.async_grpo import AsyncGRPOConfig

from data.prompts import DataError, load_prompts
from interfaces import Prompt, Renderer
from r1_prompter import (
    Options,
    ScriptArguments,
    check_rewards,
    conversations,
    load_frozen,
    make_scorer,
    resolved,
    watched,
)
from rendering import CheckpointError, RenderOptions
from rewards import RewardError, RewardOptions
from training.asynchronous import AsyncRewriteTrainer, GroupReward
from training.guard import Stopped
from training.options import UsageError, parse, set_renamed
from training.policy import PolicyError, is_adapter, load_tokenizer, name_base, trainee
from training.progress import RunLog, begin, finish
from training.run_folder import RunFolder, RunFolderError
from training.scoring import Scorer, ScoringError
from training.watch import Watch
from training.weights import locked

RECIPE = Path(__file__).resolve().parent / "configs" / "async.yaml"
NEEDED = ("aiohttp", "kernels", "vllm")  # packages that TRL's trainer imports late
NO_MODEL = ("format", "length", "judge", "preference")  # rewards that need no GPU of the worker
# TRL's worker takes answers apart by the tokenizer's template, thinking and tool calls; ours are text to the end.
PLAIN = {"start_anchor_pattern": r"\Z", "defaults": {"role": "assistant"}, "fields": {"content": {"content": "text"}}}
NO_GPU = "TRL hides all GPUs from the process that has rollouts drawn and scored"
SERVE = (
    "start render servers and give http://host:port/v1 (README, Asynchronous training), or train with r1_prompter.py"
)


# Options ---------------------------------------------------------------------------------------------------------


@dataclass
class AsyncArguments(ScriptArguments):
    """Ours, and what TRL's asynchronous trainer leaves to its reward functions."""

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Of --rewards, in their order; unset: 1 each."}
    )
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={
            "help": "Bring each reward to unit spread in its group first, or add them as they are.",
            "choices": ["normalize_then_sum", "sum_then_normalize"],
        },
    )


@dataclass
class AsyncConfig(AsyncGRPOConfig):
    """TRL's, without a `dtype` of its own: `ModelConfig` has that flag."""

    dtype: str = field(default="float32", init=False)


KINDS = (AsyncArguments, RenderOptions, RewardOptions, AsyncConfig, ModelConfig)
LACKING = dict.fromkeys(
    {one.name for one in fields(GRPOConfig)} - {one.name for kind in KINDS for one in fields(kind)},
    "TRL's AsyncGRPOTrainer has nothing like it; leave it out, or train with r1_prompter.py",
)


def parse_options(argv: Sequence[str]) -> Options:
    """Options of one run: the recipe, then the `--config` YAML, then flags.

    Raises:
        UsageError: an unknown key or flag, a missing or ill-typed value, or an option that has no meaning here.
    """
    options = Options(*parse(KINDS, RECIPE, argv, LACKING))
    script, training, model = options.script, options.training, options.model
    set_renamed(script.outdir, script.gpt_path, training, model)
    del training.model_init_kwargs["attn_implementation"]  # TRL gives its own
    for refused, why in (
        (script.dry_run, "dry_run: scripts/doctor.py knows r1_prompter.py alone; leave it out"),
        (options.reward.reward_offload, "reward_offload: the worker has no GPU to free; leave it out"),
        (options.reward.reward_device not in (None, "cpu"), f"reward_device {options.reward.reward_device}: {NO_GPU}"),
        (model.attn_implementation, f"attn_implementation {model.attn_implementation}: TRL's packing has its own"),
        (model.load_in_4bit or model.load_in_8bit, "load_in_4bit, load_in_8bit: the vLLM server gets whole weights"),
        (training.token_budget != 0, f"token_budget {training.token_budget} would cut groups in two: leave it at 0"),
        (not _is_url(options.render), f"sdmodel_name {options.render.sdmodel_name}: {NO_GPU}; {SERVE}"),
        (is_adapter(script.gpt_path), f"gpt_path {script.gpt_path} is an adapter: merge it into its base model"),
    ):
        if refused:
            raise UsageError(why)
    return options


def _is_url(render: RenderOptions) -> bool:
    return render.sdmodel_name.startswith(("http://", "https://"))


def plan(script: AsyncArguments, training: AsyncConfig, prompts: int) -> dict[str, int]:
    """The numbers that follow from the options; steps and rollouts under way are set where they were left to us.

    TRL would have `max_staleness` steps' rollouts under way. Where drawing is slow they then wait that long, come too
    old and are dropped, after having been drawn; so it is one step's.

    Raises:
        UsageError: a step that is not whole groups.
    """
    group = training.num_generations
    rollouts = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    if rollouts % group:
        raise UsageError(
            f"per_device_train_batch_size {training.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps} x {training.world_size} processes = {rollouts} is not a multiple "
            f"of num_generations {group}: a step would cut a group in two"
        )
    if training.max_steps <= 0:
        training.max_steps = math.ceil(training.num_train_epochs * prompts * group / rollouts)
    if training.max_inflight_tasks < 0:
        training.max_inflight_tasks = rollouts
    return {
        "processes": training.world_size,
        "prompts_per_step": rollouts // group,
        "completions_per_step": rollouts,
        "images_per_step": rollouts * script.images_per_rewrite,
        "optimizer_steps": training.max_steps,
        "images": training.max_steps * rollouts * script.images_per_rewrite,  # and those of rollouts that are dropped
    }


# The worker's part -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """What the frozen must know of TRL's options, which cannot be pickled: of one process without a GPU."""

    seed: int
    num_generations: int
    trust_remote_code: bool
    device: str = "cpu"
    process_index: int = 0
    world_size: int = 1


def build(options: Options, prompts: Sequence[Prompt]) -> tuple[PreTrainedTokenizerBase, Scorer]:
    """What the worker scores with, built there: renderer and rewards cannot be pickled."""
    tokenizer, *frozen = load_frozen(options, prompts)
    return tokenizer, make_scorer(options, {prompt.id: prompt for prompt in prompts}, *frozen)


# The method ------------------------------------------------------------------------------------------------------


def train(options: Options) -> None:
    """One run, from options to trained policy and report; raises what `r1_prompter.train` raises."""
    script, training, model = options.script, options.training, options.model
    check_rewards(options, script.reward_weights)
    prompts = list(load_prompts(script.data))
    numbers = plan(script, training, len(prompts))
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} not installed, which TRL needs here: pip install vllm==0.31.0 kernels")
    folder = RunFolder(script.outdir, resolved(options), resume=script.resume)
    folder.check(numbers["optimizer_steps"])
    tokenizer = load_tokenizer(script.gpt_path, model.model_revision, training.trust_remote_code)
    renderer = _reach(options.render)
    trainee(script.gpt_path, training, model.use_peft)  # checks the weights; the vLLM server knows them by gpt_path
    if model.model_revision == "main":
        training.model_init_kwargs["revision"] = locked(script.gpt_path).revision or "main"
    begin(folder, numbers, _announce(options, numbers, folder, renderer))
    worker = Worker(training.seed, training.num_generations, training.trust_remote_code)
    frozen = replace(options, training=worker, reward=replace(options.reward, reward_device="cpu"))
    shuffled = random.Random(training.seed).sample(prompts, len(prompts))  # TRL's worker goes through them in order
    trainer = AsyncRewriteTrainer(
        model=script.gpt_path,
        reward_funcs=GroupReward(
            partial(build, frozen, prompts),
            weights=script.reward_weights or [1.0] * len(script.rewards),
            normalise=script.multi_objective_aggregation == "normalize_then_sum",
            outdir=script.outdir,
            groups=numbers["prompts_per_step"],
            step=folder.resume_step + 1,
            images_every=script.save_images_every,
            images_max=script.save_images_max,
        ),
        args=training,
        train_dataset=conversations(shuffled, script.reasoning),
        processing_class=_plain(tokenizer),
        peft_config=get_peft_config(model),
        callbacks=[RunLog(folder, watched)],
        folder=folder,
        watch=Watch(folder.path, training.process_index, script.phase_budget),
    )
    trainer.processing_class = tokenizer  # the one to be saved
    name_base(trainer.model, script.gpt_path, model.model_revision)
    finish(trainer, folder)


def _plain(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    plain = copy.deepcopy(tokenizer)
    plain.response_template = PLAIN
    return plain


def _reach(render: RenderOptions) -> Renderer:
    """The render servers, asked once before anything is started."""
    try:
        return render.load("cpu")
    except (CheckpointError, ValueError) as error:
        raise UsageError(str(error)) from error


def _announce(options: Options, numbers: Mapping[str, int], folder: RunFolder, renderer: Renderer) -> list[str]:
    script, training = options.script, options.training
    slow = [name for name in (*script.rewards, *script.held_out) if name not in NO_MODEL]
    note = f"note: {', '.join(slow)} compute on the CPU of one worker process; judge and preference ask their server"
    return [
        f"{numbers['prompts_per_step']} prompts x {training.num_generations} completions = "
        f"{numbers['completions_per_step']} rollouts a step, {numbers['optimizer_steps']} steps; up to "
        f"{numbers['images']} pictures in all, and those of rollouts older than {training.max_staleness} versions",
        f"policy at {training.vllm_server_base_url}, renderer at {options.render.sdmodel_name} (reads "
        f"{renderer.max_tokens} tokens); rewards {', '.join(script.rewards)}; all options: {folder.path}/run.json",
        *([note] if slow else []),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    stops = (ScoringError, Stopped, TimeoutError)  # the last: no vLLM server
    try:
        train(parse_options(sys.argv[1:] if argv is None else argv))
    except (UsageError, DataError, PolicyError, RewardError, RunFolderError, *stops) as error:
        if PartialState().is_main_process:
            print(f"async_prompter: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, stops) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
