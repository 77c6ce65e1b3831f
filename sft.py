"""The cold start: teach a language model the form, and what a teacher knows of the content, before GRPO.

Arrow of the design: examples (`scripts/make_sft.py`) -> policy. Each is what `r1_prompter.py` shows the policy at
rollout, token for token (same template, `prompting.messages`; same answer, `prompting.completion`), and only the
answer is learnt. The optimiser is TRL's `SFTTrainer`.

Left out: several turns, mixing with other data, assistant masks (a prompt and an answer need none).

    accelerate launch --config_file=deepspeed_2.yaml sft.py --data cold_start.jsonl \\
        --gpt_path Qwen/Qwen2.5-3B-Instruct --outdir cold_start
    ... --resume                                   the same command again: go on from the newest good checkpoint
    python sft.py --help                           every option, ours and TRL's, with its reason

Options: configs/cold_start.yaml < `--config` YAML < flags. Exit code 2 and one line on stderr for whatever is wrong
with the input. The run folder is that of r1_prompter.py, which then takes it as its `--gpt_path`.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from data.text import json_rows, normalize
from errors import UserError
from models.policy import ChatTemplate, load_tokenizer, policy_contents, prepare_policy, record_base_model
from prompting import completion, messages
from run.files import file_hash
from run.folder import RunFolder
from run.heartbeat import Heartbeat
from run.options import may_differ, option, parse, resume_option, run_main, set_renamed, template_option
from run.progress import start_run
from run.trainer import RunTrainer, warn_if_bf16_loses_updates

RECIPE = Path(__file__).resolve().parent / "configs" / "cold_start.yaml"
FLASH = ("flash_attention_2", "flash_attention_3", "kernels-community/")  # they keep packed examples apart


@dataclass
class ScriptArguments:
    """What TRL has no name for. Everything else (`--learning_rate`, `--use_peft`, `--packing`, ...) is TRL's own."""

    data: str = option(help="Examples: .jsonl with prompt, reasoning, rewrite (scripts/make_sft.py).", changes="run")
    outdir: str = option(
        help="Run folder, new or this run's own; the trained policy is saved there.", changes="nothing"
    )
    gpt_path: str = option(
        "Qwen/Qwen2.5-3B-Instruct", "Model to start from: folder or hub name of an instruct model.", changes="run"
    )
    reasoning: bool = option(True, "Think first; false: teach the rewrite alone.", changes="run")
    chat_template_kwargs: dict | str | None = template_option()
    validation_share: float = option(
        0.1, "Share of the prompts, 0 to below 1, whose examples are only evaluated.", changes="run", least=0, below=1
    )
    phase_budget: float = option(
        1800.0, "Seconds of one step or save after which all stacks are written down.", changes="nothing", above=0
    )
    resume: str | None = resume_option()


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to be learnt."""

    prompt: str
    answer: str


def parse_options(argv: Sequence[str]) -> tuple[ScriptArguments, SFTConfig, ModelConfig]:
    """Options of one run: the recipe, then the `--config` YAML, then flags.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a missing or ill-typed value, or options that
            do not go together.
    """
    script, training, model = parse((ScriptArguments, SFTConfig, ModelConfig), RECIPE, argv)
    set_renamed(script.outdir, script.gpt_path, training, model)
    if (training.packing or training.padding_free) and not str(model.attn_implementation).startswith(FLASH):
        raise UserError(
            f"packing and padding_free let examples see each other with --attn_implementation "
            f"{model.attn_implementation}: give flash_attention_2, or leave them out"
        )
    if script.validation_share == 0:
        training.eval_strategy = "no"
    return script, training, model


# Examples --------------------------------------------------------------------------------------------------------


def load_examples(path: str | Path, reasoning: bool) -> list[Example]:
    """The examples of a `.jsonl`, in its order.

    Raises:
        UserError: no such file, no example in it, or a row that is none; with the line and what is wrong.
    """
    wanted = ("prompt", "rewrite", "reasoning") if reasoning else ("prompt", "rewrite")
    found = []
    for place, row in json_rows(Path(path), *wanted):
        try:
            found.append(Example(row["prompt"], completion(row["reasoning"] if reasoning else None, row["rewrite"])))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    return found


def split(examples: Sequence[Example], validation_share: float) -> tuple[list[Example], list[Example]]:
    """(training, validation); a prompt's examples are all on one side, which depends on nothing but the prompts."""
    order = sorted({example.prompt for example in examples}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = {normalize(text) for text in order[: math.ceil(validation_share * len(order))]}
    sides = tuple([e for e in examples if (normalize(e.prompt) in held_out) == side] for side in (False, True))
    if not sides[0]:
        raise UserError(f"{len(order)} prompts, all held out by validation_share {validation_share}: give more")
    return sides


def tokens(example: Example, template: ChatTemplate) -> dict[str, list[int]]:
    """`input_ids` as the policy sees them at rollout, end token included; `labels`, -100 over the prompt."""
    asked = template.encode(messages(example.prompt, template.reasoning))
    answered = template.encode_answer(example.answer)
    return {"input_ids": asked + answered, "labels": [-100] * len(asked) + answered}


def _dataset(examples: Sequence[Example], template: ChatTemplate, longest: int | None) -> tuple[Dataset, int]:
    """The tokenised examples, and how many were left out: an answer that is cut would teach never to stop."""
    rows = [tokens(example, template) for example in examples]
    kept = [row for row in rows if longest is None or len(row["input_ids"]) <= longest]
    return Dataset.from_list(kept), len(rows) - len(kept)


# The cold start --------------------------------------------------------------------------------------------------


class ColdStart(RunTrainer, SFTTrainer):
    """TRL's SFT with the house's checkpoints, signals and gates."""


def train(script: ScriptArguments, training: SFTConfig, model: ModelConfig) -> None:
    """One run, from examples to trained policy and report.

    Raises:
        UserError: bad input, found before the model is loaded.
        Stopped: the run cannot go on.
        Leave: a signal told it to.
    """
    examples = load_examples(script.data, script.reasoning)
    data_hash = file_hash(Path(script.data))
    config = {**training.to_dict(), **asdict(model), **asdict(script), "data_hash": data_hash}
    config["num_processes"] = training.world_size
    folder = RunFolder(script.outdir, config, may_differ=may_differ(script, training, model), resume=script.resume)
    tokenizer = load_tokenizer(
        script.gpt_path, model.model_revision, training.trust_remote_code, script.chat_template_kwargs
    )
    template, longest = ChatTemplate(tokenizer, script.reasoning), training.max_length
    (train_rows, too_long), (eval_rows, too_long_to_evaluate) = (
        _dataset(side, template, longest) for side in split(examples, script.validation_share)
    )
    if not len(train_rows):
        raise UserError(f"all {too_long} examples are longer than max_length {longest} tokens: raise it")
    if training.padding_free:
        training.max_length = None  # TRL's condition; what is too long has been left out
    numbers = _plan(training, len(train_rows), len(eval_rows), too_long + too_long_to_evaluate)
    resume = folder.plan(numbers["optimizer_steps"])
    folder.contents = policy_contents(script.gpt_path, model.model_revision)
    resume = start_run(
        folder, numbers, [*_announce(numbers, train_rows, folder), *warn_if_bf16_loses_updates(training, model)]
    )
    heartbeat = Heartbeat(folder.path, training.process_index, script.phase_budget)
    trainer = ColdStart(
        model=prepare_policy(script.gpt_path, training, model.use_peft),
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows if len(eval_rows) else None,
        processing_class=tokenizer,
        folder=folder,
        resume=resume,
        heartbeat=heartbeat,
        shown=progress_metrics,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    record_base_model(trainer.model, script.gpt_path, model.model_revision)
    trainer.run_to_end()


def _plan(training: SFTConfig, train_rows: int, eval_rows: int, too_long: int) -> dict[str, int]:
    batch = training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps
    per_epoch = math.ceil(train_rows / batch)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    return {
        "processes": training.world_size,
        "examples": train_rows,
        "validation_examples": eval_rows,
        "examples_too_long": too_long,
        "examples_per_step": batch,
        "optimizer_steps_per_epoch": per_epoch,  # fewer where examples are packed
        "optimizer_steps": steps,
    }


def _announce(numbers: Mapping[str, int], train_rows: Dataset, folder: RunFolder) -> list[str]:
    lengths = [len(ids) for ids in train_rows["input_ids"]]
    return [
        f"{numbers['examples']} examples of {min(lengths)} to {max(lengths)} tokens to learn, "
        f"{numbers['validation_examples']} to validate on, {numbers['examples_too_long']} left out as too long",
        f"{numbers['examples_per_step']} a step on {numbers['processes']} process(es), {numbers['optimizer_steps']} "
        f"steps; all options: {folder.path}/run.json",
    ]


def progress_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a step's metrics those that its progress line shows."""
    return {
        "loss": row.get("loss"),
        "validation": row.get("eval_loss"),
        "accuracy": row.get("mean_token_accuracy", row.get("eval_mean_token_accuracy")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("sft", lambda: train(*parse_options(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
