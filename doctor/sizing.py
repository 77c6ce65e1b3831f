"""The memory of a run from its options, and which flags would make it fit. Estimates only: see doctor/memory.py.

Advice is never written down: levers are tried, mildest first, and each set of flags is parsed and estimated anew. What
is said to fit is what that estimate says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from doctor import shapes
from doctor.memory import EIGHT_BIT, FOUR_BIT, Policy, Run, Table, estimate, lora
from doctor.models import names_of, reward_path
from doctor.report import Advice, Launch, Machine, capacity, fits
from errors import UserError
from interfaces import Prompt
from prompting import MAX_PROMPT_CHARS, messages
from rendering import AUTO

if TYPE_CHECKING:
    from r1_prompter import Options

Parse = Callable[[Sequence[str]], "Options"]
Plan = Callable[..., dict[str, int]]
Levers = dict[str, tuple[str, ...]]  # first flag of each -> its words

AUTO_CHUNK = 8  # what a trial finds at 512 px on a GPU, by published figures (not run)
RENDERER_SIZE = {"fp8": EIGHT_BIT, "fp8_weights": EIGHT_BIT, "int8": EIGHT_BIT, "nf4": FOUR_BIT}
ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}
TARGETS = ("q_proj", "v_proj")  # PEFT's for Qwen2 and Llama where --lora_target_modules names none
CHARACTERS = 3  # of a token, at least: for prompts whose tokenizer is not here
OTHER_RENDERERS = 2  # shown
LORA_RANK = 64


def describe(options: Options, launch: Launch, policy: Policy, prompt: int) -> Run:
    """What of the options decides memory; `prompt` tokens are read before a completion."""
    training, model, render, reward = options.training, options.model, options.render, options.reward
    size = ELEMENT.get(model.dtype or "float32", 2)
    targets = model.lora_target_modules or TARGETS
    adapter = lora(policy, model.lora_r, [targets] if isinstance(targets, str) else targets) if model.use_peft else 0
    return Run(
        processes=launch.processes,
        gpu=launch.gpu,
        zero=launch.zero,
        size=size,
        mixed=training.bf16 or training.fp16 or size == 2,
        adapter=adapter or shapes.adapter(options.script.gpt_path),
        quantised=FOUR_BIT if model.load_in_4bit else EIGHT_BIT if model.load_in_8bit else 0.0,
        reference=training.beta != 0,
        checkpointing=training.gradient_checkpointing,
        generated=training.per_device_train_batch_size * training.steps_per_generation,
        trained=training.per_device_train_batch_size,
        prompt=prompt,
        completion=training.max_completion_length,
        vllm=training.vllm_gpu_memory_utilization if training.use_vllm and training.vllm_mode == "colocate" else 0.0,
        vllm_sleeps=training.vllm_enable_sleep_mode,
        chunk=_chunk(options),
        resolution=render.resolution or 1024,
        text=render.max_sequence_length or 512,
        render_size=ELEMENT[render.render_dtype],
        render_device=render.render_device,
        reward_batch=reward.reward_batch_size,
        reward_device=reward.reward_device,
        offload=reward.reward_offload,
        transformer_size=RENDERER_SIZE.get(render.render_quantization, 0.0),
        encoders_away=render.render_offload_text,
        sliced=render.render_slice_vae,
    )


def _chunk(options: Options) -> int:
    """Pictures a call; for auto an assumption, and the trial itself takes no more than half of what is free."""
    asked = options.render.render_batch_size
    return AUTO_CHUNK if asked == AUTO else asked


def tables_of(options: Options, machine: Machine, launch: Launch, prompts: Sequence[Prompt]) -> list[Table]:
    """The estimate of these options.

    Raises:
        UserError: a model of which nothing is known, or whose files are damaged.
    """
    script = options.script
    policy, pipeline = shapes.policy(script.gpt_path), shapes.pipeline(options.render.sdmodel_name)
    for path, shape in ((script.gpt_path, policy), (options.render.sdmodel_name, pipeline)):
        if shape is None:
            raise shapes.UserError(f"{path} is not on this disk and in no table of doctor/shapes.py")
    sizes = {"orm": ELEMENT[options.reward.orm_dtype]}
    scorers = [
        shapes.scorer(name, reward_path(name, options.reward), sizes.get(name, ELEMENT["float32"]))
        for name in dict.fromkeys(names_of(options))
        if name in shapes.SCORERS
    ]
    run = describe(options, launch, policy, prompt_tokens(options, prompts))
    return estimate(run, policy, pipeline, scorers, machine.memory)


def prompt_tokens(options: Options, prompts: Sequence[Prompt]) -> int:
    """Of the longest conversation, by its characters: CHARACTERS of them are a token at least."""
    longest = max(prompts, key=lambda prompt: len(prompt.text), default=Prompt("a" * 60))
    turns = messages(longest.text[:MAX_PROMPT_CHARS], options.script.reasoning)
    return sum(len(turn["content"]) for turn in turns) // CHARACTERS


class Advisor:
    """Looks for flags that make a run fit: each set is parsed and estimated anew, nothing is assumed to help."""

    def __init__(
        self,
        argv: Sequence[str],
        parse_options: Parse,
        plan: Plan,
        machine: Machine,
        launch: Launch,
        prompts: Sequence[Prompt],
    ):
        self.argv, self.parse, self.plan = argv, parse_options, plan
        self.machine, self.launch, self.prompts = machine, launch, prompts

    def improve(self, *given: str) -> Advice | None:
        """The flags `given` and the fewest more that fit, the mildest first; None if no flags do."""
        chosen: Levers = {"given": given}
        tables = self._tables(chosen)
        while tables is not None and not fits(tables, self.machine):
            chosen, tables = self._better(chosen, tables)
        if tables is None:
            return None
        for name in [name for name in chosen if name != "given"][::-1]:  # the harshest first: is it still needed?
            fewer = {other: words for other, words in chosen.items() if other != name}
            without = self._tables(fewer)
            if without is not None and fits(without, self.machine):
                chosen, tables = fewer, without
        words = _words(chosen)
        return Advice(tuple(words), tuple(tables), _note(words))

    def other_renderers(self, name: str) -> list[Advice]:
        """Smaller renderers of the table that fit, with the flags that each needs; the fewest flags first."""
        most = shapes.pipeline(name).parameters
        smaller = [other for other, shape in shapes.PIPELINES.items() if other != name and shape.parameters < most]
        fitting = [advice for other in smaller if (advice := self.improve("--sdmodel_name", other))]
        return sorted(fitting, key=lambda advice: len(advice.flags))[:OTHER_RENDERERS]

    def _better(self, chosen: Levers, tables: Sequence[Table]) -> tuple[Levers, list[Table] | None]:
        """With the first lever more that lessens what is too much; tables None if there is none."""
        excess = self._excess(tables)
        for lever in _levers(self._options(chosen), self.machine, self.launch):
            more = {**chosen, lever[0]: lever}
            after = self._tables(more)
            if after is not None and self._excess(after) < excess:
                return more, after
        return chosen, None

    def _excess(self, tables: Sequence[Table]) -> int:
        """Bytes above what each device has, over all of its phases."""
        rooms = [(table, capacity(table, self.machine)) for table in tables]
        return sum(max(0, total - room) for table, room in rooms if room is not None for total in table.totals)

    def _tables(self, chosen: Levers) -> list[Table] | None:
        """The estimate with these levers; None where the trainer would refuse them."""
        try:
            options = self._options(chosen)
            self.plan(options.script, options.training, max(len(self.prompts), 1))
        except UserError:
            return None
        return tables_of(options, self.machine, self.launch, self.prompts)

    def _options(self, chosen: Levers) -> Options:
        return self.parse([*self.argv, *_words(chosen)])


def _levers(options: Options, machine: Machine, launch: Launch) -> Iterator[tuple[str, ...]]:
    """Flags with their values that could be changed next, from what costs time to what changes the run."""
    script, training, model = options.script, options.training, options.model
    render, reward = options.render, options.reward
    if not training.gradient_checkpointing:
        yield "--gradient_checkpointing", "true"
    if reward.reward_batch_size > 1:
        yield "--reward_batch_size", str(reward.reward_batch_size // 2)
    if _chunk(options) > 1:
        yield "--render_batch_size", str(_chunk(options) // 2)
    if not reward.reward_offload:
        yield "--reward_offload", "true"
    if not render.render_offload_text:
        yield "--render_offload_text", "true"
    rows, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if rows % 2 == 0 and training.steps_per_generation == accumulation:
        halved, doubled = str(rows // 2), str(2 * accumulation)
        yield "--per_device_train_batch_size", halved, "--gradient_accumulation_steps", doubled
    if launch.processes == 1 and machine.gpus > 1 and render.render_device is None:
        yield "--render_device", "cuda:1"
    if not model.use_peft and not shapes.base_of(script.gpt_path):
        yield "--use_peft", "true", "--lora_r", str(LORA_RANK)
    if model.use_peft and not model.load_in_4bit:
        yield "--load_in_4bit", "true"
    if reward.reward_device != "cpu":
        yield "--reward_device", "cpu"
    if training.max_completion_length > 256:
        yield "--max_completion_length", str(training.max_completion_length * 3 // 4)
    side = (render.resolution or 1024) * 3 // 4 // 16 * 16  # a whole number of patches
    if side >= 384:
        yield "--resolution", str(side)
    heavy = [name for name in script.rewards if name in shapes.SCORERS]
    if len(heavy) > 1 and training.reward_weights is None:
        most = max(heavy, key=lambda name: shapes.SCORERS[name].weights)
        yield "--rewards", *[name for name in script.rewards if name != most]
    policy = shapes.policy(script.gpt_path)
    smaller = [path for path, shape in shapes.POLICIES.items() if shape.parameters < policy.parameters]
    if smaller:
        yield "--gpt_path", max(smaller, key=lambda path: shapes.POLICIES[path].parameters)


def _words(chosen: Levers) -> list[str]:
    return [word for words in chosen.values() for word in words]


def _note(words: Sequence[str]) -> str:
    notes = []
    if "--load_in_4bit" in words and importlib.util.find_spec("bitsandbytes") is None:
        notes.append("needs the package bitsandbytes, which is not installed")
    if "--reward_device" in words:
        notes.append("rewards on the CPU are slow")
    if "--use_peft" in words:
        notes.append("LoRA usually wants a higher --learning_rate")
    return "; ".join(notes)
