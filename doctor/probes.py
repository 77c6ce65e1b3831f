"""Each model of a run loaded and used once: answers of the policy, two pictures, a score of each reward.

Judges and servers that draw have no weights here; they are asked one real question each in any case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from doctor.report import OK, PROBLEM, WARNING, Check
from errors import UserError, one_line
from inference import Reprompter
from interfaces import Prompt, Renderer, Sample
from models.frozen import without_zero3_init
from prompting import completion, messages
from r1_prompter import Options
from rendering import load_renderer
from rewards import RewardContext, build
from run.seeds import render_seed

JUDGES = ("judge", "preference")
CANNOT = (UserError, ValueError, torch.OutOfMemoryError)


def probe_all(options: Options, prompts: Sequence[Prompt], load: bool) -> list[Check]:
    """One check for each model; where `load` is false only for judges and servers."""
    prompts = sorted(prompts, key=lambda prompt: not prompt.nouns)  # the first is tried
    renderer, checks = None, []
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]  # if none is drawn
    with without_zero3_init():
        if load:
            checks.append(probe_policy(options, prompts[0]))
        if load or options.render.remote:
            check, renderer, drawn = probe_renderer(options, prompts[0])
            checks.append(check)
            pictures = drawn or pictures
        for name in dict.fromkeys([*options.script.rewards, *options.script.held_out]):
            if (load or name in JUDGES) and (name != "length" or renderer is not None):
                checks.append(probe_reward(name, options, renderer, prompts, pictures))
    return checks


def probe_policy(options: Options, prompt: Prompt) -> Check:
    """As many answers to one prompt as a group has: can they be read?"""
    script, training = options.script, options.training
    conversation = messages(prompt.text, script.reasoning)
    how = {"seed": training.seed, "device": str(training.device), "reasoning": script.reasoning}
    variables = training.chat_template_kwargs
    try:
        policy = Reprompter(script.gpt_path, 1, training.max_completion_length, template_kwargs=variables, **how)
        answers, seconds = _timed(
            lambda: policy.sample(prompt.text, conversation, training.num_generations, training.temperature)
        )
    except CANNOT as error:
        return Check("answers", PROBLEM, one_line(error, 400))
    read = [answer.rewrite for answer in answers if answer.readable]
    text = f"{len(read)} of {len(answers)} to {prompt.text!r} can be read, {seconds:.1f} s"
    if not read:
        return Check("answers", WARNING, text, "cold start first (sft.py): an answer that cannot be read is not drawn")
    return Check("answers", OK, f"{text}; the first: {read[0]!r}")


def probe_renderer(options: Options, prompt: Prompt) -> tuple[Check, Renderer | None, list[Image.Image]]:
    """Two pictures of one prompt, drawn twice; returned are those of the second time.

    Both times they must be the same, or else the pictures of a group differ by more than their texts.
    """
    render, training = options.render, options.training
    seeds = [render_seed(training.seed, prompt.id, 1, index) for index in (0, 1)]
    try:
        renderer = load_renderer(render, str(training.device), measuring=True)
        before = renderer([prompt.text] * 2, seeds)
        pictures, seconds = _timed(lambda: renderer([prompt.text] * 2, seeds))
    except CANNOT as error:
        return Check("pictures", PROBLEM, one_line(error, 400)), None, []
    if None in (*before, *pictures):
        why = ", ".join(f"{reason} ({count})" for reason, count in renderer.failures.items())
        return Check("pictures", PROBLEM, f"could not be drawn: {why}", "see README, --render_dtype"), renderer, []
    text = f"2 of {pictures[0].width} x {pictures[0].height} px from {render.sdmodel_name} in {seconds:.2f} s"
    if [one.tobytes() for one in before] != [one.tobytes() for one in pictures]:
        text += "; the same text and seed gave another picture the second time"
        return Check("pictures", WARNING, text, "groups will differ by more than words"), renderer, pictures
    return Check("pictures", OK, text), renderer, pictures


def probe_reward(
    name: str, options: Options, renderer: Renderer | None, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]
) -> Check:
    """The reward built as the trainer builds it, and asked about one picture (about two if it compares them)."""
    prompt = prompts[0]
    device = options.reward.reward_device or options.render.render_device or str(options.training.device)
    context = RewardContext(device, renderer, prompts, options.training.seed)
    try:
        (reward,) = build([name], replace(options.reward, judge_cache=None), context)
        anchors = tuple(pictures[-1:]) if reward.needs_baseline_images else ()
        shown = pictures[:2] if name == "preference" and not anchors else pictures[:1]
        text = completion("What is asked for, plainly.", prompt.text)
        samples = [Sample(prompt, text, prompt.text, (picture,), anchors) for picture in shown]
        scores, seconds = _timed(lambda: reward(samples))
    except CANNOT as error:
        return Check(f"score {name}", PROBLEM, one_line(error, 400))
    where = f" from {options.reward.judge_model} at {options.reward.judge_url}" if name in JUDGES else ""
    if None in scores:
        why = next(filter(None, reward.client.reasons)) if where else reward.metrics or "not finite"
        action = "mend what the judge names, or read its log" if where else "try float32"
        return Check(f"score {name}", PROBLEM, f"no score{where} in {seconds:.1f} s: {why}", action)
    return Check(f"score {name}", OK, "; ".join([f"{scores[0]:.4g}{where}, {seconds:.2f} s", *reward.limits(prompts)]))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started
