"""Each model of a run loaded and used once: answers of the policy, a chunk of pictures, a score of each reward.

A judge, which has no weights here, is asked one real question, servers that draw for a picture. Nothing is written
into the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from doctor.models import names_of
from doctor.report import OK, PROBLEM, WARNING, Check
from errors import UserError
from interfaces import Prompt, Renderer, Reward, Sample
from models.frozen import without_zero3_init
from models.policy import load_policy, load_tokenizer
from prompting import completion, messages, parse
from rendering import AUTO
from rendering.levers import smallest_good_batch
from rewards import RewardContext, build
from run.seeds import render_seed

if TYPE_CHECKING:
    from r1_prompter import Options

JUDGES = ("judge", "preference")


def probe_all(options: Options, numbers: dict[str, int], prompts: Sequence[Prompt], wanted: bool) -> list[Check]:
    """Each model loaded and used once: answers of the policy, one chunk of pictures, a score of each reward.

    Judges and servers that draw, which have no weights here, are asked one real question each in any case.
    """
    prompt = next((one for one in prompts if one.nouns), prompts[0])
    judges = [name for name in dict.fromkeys(names_of(options)) if name in JUDGES]
    pictures, renderer, checks = _sketches(), None, []
    with without_zero3_init():
        if wanted:
            checks += probe_policy(options, prompt)
        if wanted or options.render.remote:
            seen, renderer, drawn = probe_renderer(options, numbers, prompt)
            checks += seen
            pictures = drawn or pictures
        others = [name for name in dict.fromkeys(names_of(options)) if name not in JUDGES] if wanted else []
        for name in [*others, *judges]:
            if name != "length" or renderer is not None:
                checks.append(probe_reward(name, options, renderer, prompt, pictures))
    return checks


def probe_policy(options: Options, prompt: Prompt) -> list[Check]:
    """As many answers to one prompt as a group has: can they be read?"""
    script, training = options.script, options.training
    started = time.perf_counter()
    try:
        tokenizer = load_tokenizer(script.gpt_path)
        policy = load_policy(script.gpt_path, device=str(training.device))
        turns = messages(prompt.text, script.reasoning)
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(policy.device)
        torch.manual_seed(training.seed)
        with torch.inference_mode():
            rows = policy.generate(
                **inputs,
                max_new_tokens=training.max_completion_length,
                do_sample=True,
                temperature=training.temperature,
                num_return_sequences=training.num_generations,
                pad_token_id=tokenizer.pad_token_id,
            )
    except (UserError, torch.OutOfMemoryError) as error:
        return [Check("answers", PROBLEM, _one_line(error))]
    texts = tokenizer.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [answer for text in texts if (answer := parse(text, script.reasoning))]
    text = f"{len(answers)} of {len(texts)} to {prompt.text!r} can be read, {time.perf_counter() - started:.1f} s"
    if not answers:
        return [Check("answers", WARNING, text, "cold start first (sft.py): what cannot be read is not drawn")]
    return [Check("answers", OK, f"{text}; the first: {answers[0].rewrite!r}")]


def probe_renderer(
    options: Options, numbers: dict[str, int], prompt: Prompt
) -> tuple[list[Check], Renderer | None, list[Image.Image]]:
    """Two pictures of one prompt in one chunk, twice if that is quick; from the last time, that of a generation.

    The second time they must be the same: a seed means a picture, or members of a group differ by more than words.
    """
    training, seeds = options.training, [render_seed(options.training.seed, prompt.id, 1, index) for index in (0, 1)]
    try:
        renderer = options.render.load(str(training.device), measuring=True)
        chunk = _batch_size(renderer, options.render.render_batch_size)
        drawn = 2 if chunk > 1 else 1
        pictures, seconds = _timed(lambda: renderer([prompt.text] * drawn, seeds[:drawn]))
        before = pictures
        if seconds < 20:  # the first call also warms up
            pictures, seconds = _timed(lambda: renderer([prompt.text] * drawn, seeds[:drawn]))
    except (UserError, ValueError, torch.OutOfMemoryError) as error:
        return [Check("picture", PROBLEM, _one_line(error))], None, []
    if None in pictures:
        why = ", ".join(f"{reason} ({count})" for reason, count in renderer.failures.items())
        return [Check("picture", PROBLEM, f"could not be drawn: {why}", "see README, --render_dtype")], renderer, []
    width, height = pictures[0].size
    where = f"from {options.render.sdmodel_name}" if options.render.remote else f"a chunk of {chunk}"
    text = f"{width} x {height} px in {seconds:.2f} s {where}"
    if None not in before and [one.tobytes() for one in before] != [one.tobytes() for one in pictures]:
        text += "; the same text and seed gave another picture the second time"
        return [Check("picture", WARNING, text, "groups will differ by more than words")], renderer, pictures
    if not numbers or options.render.remote:  # how many a server draws at once is not known here
        return [Check("picture", OK, text)], renderer, pictures
    local = numbers["images_per_generation"] // numbers["processes"]
    drawing = -(-local // chunk) * seconds
    text += f"; {local} pictures a process and generation: about {drawing:.0f} s of drawing (derived)"
    timeout = training.ddp_timeout
    if numbers["processes"] > 1 and drawing > timeout / 2:
        action = f"raise --ddp_timeout to {4 * drawing:.0f}, or draw fewer pictures at once"
        state = PROBLEM if drawing > timeout else WARNING
        return [Check("picture", state, f"{text}, of a ddp_timeout of {timeout} s", action)], renderer, pictures
    return [Check("picture", OK, text)], renderer, pictures


def _batch_size(renderer: Renderer, asked: int | str) -> int:
    """As asked; for auto what a trial on this process alone finds: the other ones of a launch are not here."""
    if asked != AUTO:
        return asked
    renderer.chunk_size = smallest_good_batch(renderer.trial)
    return renderer.chunk_size


def probe_reward(
    name: str, options: Options, renderer: Renderer | None, prompt: Prompt, pictures: Sequence[Image.Image]
) -> Check:
    """The reward built as the trainer builds it, and asked about the pictures; of a judge, one real question."""
    device = options.reward.reward_device or options.render.render_device or str(options.training.device)
    context = RewardContext(device, renderer, (prompt,), options.training.seed)
    try:
        (reward,) = build([name], replace(options.reward, judge_cache=None), context)
        samples = _samples(reward, prompt, pictures)
        scores, seconds = _timed(lambda: reward(samples))
    except (UserError, ValueError, torch.OutOfMemoryError) as error:
        return Check(f"score {name}", PROBLEM, _one_line(error))
    if name in JUDGES and None in scores:
        said = {key.partition("/")[2]: value for key, value in reward.metrics.items()}
        what = "no answer" if said.get("failed") else "an answer without a verdict"
        text = f"{options.reward.judge_model} at {options.reward.judge_url} gave {what} in {seconds:.1f} s"
        return Check(f"score {name}", PROBLEM, text, "see its log; --judge_model and --judge_url name it")
    if None in scores:
        return Check(f"score {name}", PROBLEM, f"no finite score for a picture of {prompt.text!r}", "try float32")
    where = f" from {options.reward.judge_url}" if name in JUDGES else ""
    return Check(f"score {name}", OK, f"{scores[0]:.4g}{where}, {seconds:.2f} s for {len(samples)} sample(s)")


def _samples(reward: Reward, prompt: Prompt, pictures: Sequence[Image.Image]) -> list[Sample]:
    """One sample; two, if a reward compares a group's. A readable answer with a picture, and one as its anchor."""
    text = completion("What is asked for, plainly.", prompt.text)
    baseline_images = tuple(pictures[-1:]) if reward.needs_baseline_images else ()
    shown = pictures[:2] if reward.name == "preference" and not reward.needs_baseline_images else pictures[:1]
    return [Sample(prompt, text, prompt.text, (picture,), baseline_images) for picture in shown]


def _sketches() -> list[Image.Image]:
    """Two plain pictures to ask a judge about where none was drawn."""
    pictures = [Image.new("RGB", (64, 64), "white") for _ in range(2)]
    for picture, colour in zip(pictures, ("red", "blue"), strict=True):
        ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=colour)
    return pictures


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
