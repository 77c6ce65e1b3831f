"""Will this run work? What can be known before the queue: `examine` looks, `report` says it, `as_json` as data.

For python -m doctor and `r1_prompter.py --dry_run true`. Nothing is written and nothing is fetched. What can only be
estimated is called so (doctor/memory.py); what was not looked at is "not run", never "ok". Advice is a set of flags
whose own estimate fits: each is parsed and estimated again before it is given.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.prompts import load_prompts
from doctor import shapes
from doctor.memory import GB, Policy, Run, Table
from doctor.models import named_models, names_of
from doctor.probes import probe_all
from doctor.report import (
    NOT_RUN,
    OK,
    PROBLEM,
    WARNING,
    Check,
    Launch,
    Machine,
    Report,
    as_json,
    capacity,
    device_name,
    fits,
    readable,
    report,
)
from doctor.sizing import ELEMENT, Advisor, Parse, Plan, describe, tables_of
from errors import UserError
from interfaces import Prompt
from prompting import MAX_PROMPT_CHARS
from rewards import check
from run.folder import RunFolder
from run.options import may_differ
from run.progress import warn_if_bf16_loses_updates

if TYPE_CHECKING:
    from r1_prompter import Options

__all__ = ["Launch", "Machine", "as_json", "examine", "report", "this_machine"]

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "diffusers", "peft", "open_clip_torch")
NEED_NOUNS = ("git", "gdino")
PNG = 1.5  # bytes of a pixel: 64 pictures of 512 px are about 25 MB
PROBE_WITHOUT_GPU = 2 * GB  # weights above this are not loaded to look at them where there is no GPU


def examine(
    argv: Sequence[str],
    parse_options: Parse,
    plan: Plan,
    all_options: Callable[[Options], dict[str, Any]],
    machine: Machine,
    launch: Launch,
    probe: bool | None = None,
) -> Report:
    """Look at everything that can be looked at; a check that fails does not stop the others.

    Args:
        argv: the run's flags.
        parse_options, plan, all_options: the trainer's own: flags -> options, batch numbers, configuration.
        machine: what the run is planned for.
        launch: how it is started.
        probe: load the models and use each once; None: where they are on this disk and this machine is meant.

    Raises:
        UserError: `argv` cannot be parsed.
    """
    options, found = parse_options(argv), Report(machine, launch)
    script, training = options.script, options.training
    say = found.checks.extend
    say(versions())
    say(devices(machine, launch, training.bf16))
    data, prompts = read_data(options)
    say(data)
    batch, found.numbers = batch_numbers(options, plan, max(len(prompts), 1), launch)
    say(batch)
    say(outdir(options, all_options, found.numbers))
    say([Check("rounding", WARNING, line.removeprefix("note: ")) for line in rounded(options, launch)])
    say(rewards(options))
    models = named_models(options)
    there = [model.check() for model in models]
    say(there)
    say(memory(found, argv, parse_options, plan, options, prompts))
    if found.numbers:
        say(disk(options, launch, found.numbers, free=shutil.disk_usage(_existing(Path(script.outdir))).free))
    reason = _not_probed(machine, there, sum(model.bytes for model in models), probe)
    if reason:
        say([Check("probe", NOT_RUN, f"no model was loaded: {reason}")])
    say(probe_all(options, found.numbers, prompts or [Prompt("a photo of a red circle")], not reason))
    return found


def _not_probed(machine: Machine, models: Sequence[Check], size: int, asked: bool | None) -> str:
    """Why models, of `size` bytes together, are not loaded; "" if they are."""
    if asked is not None:
        return "" if asked else "--probe false"
    if any(model.state != OK for model in models):
        return "weights are missing"
    if not machine.here:
        return "this is not the machine that is planned for"
    if not machine.gpus and size > PROBE_WITHOUT_GPU:
        return f"{readable(size)} of weights and no GPU here; --probe true does it all the same"
    return ""


def this_machine() -> Machine:
    """What is here."""
    gpus = torch.cuda.device_count()
    memory = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=None)
    return Machine(
        gpus, memory, len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


# Versions, devices, options --------------------------------------------------------------------------------------


def versions(lock: Path = LOCK) -> list[Check]:
    """The packages that decide what a run does, against those that were tested together."""
    locked = {}
    if lock.is_file():
        lines = [line.split() for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line]
        locked = dict(words[0].split("==", 1) for words in lines if words and "==" in words[0])
    here, absent = {"python": platform.python_version()}, []
    for name in PACKAGES:
        try:
            here[name] = version(name)
        except PackageNotFoundError:
            absent.append(name)
    shown = ", ".join(f"{name} {value}" for name, value in here.items())
    differing = [
        f"{name} {value} (locked: {locked[key]})"
        for name, value in here.items()
        if (key := name.replace("_", "-")) in locked and value.split("+")[0] != locked[key]
    ]
    if absent:
        return [Check("versions", PROBLEM, f"not installed: {', '.join(absent)}", "install from requirements.lock")]
    if differing:
        return [
            Check("versions", WARNING, f"not those of {lock.name}: {', '.join(differing)}", "make test sets it up")
        ]
    return [Check("versions", OK, f"{shown}; {f'as in {lock.name}' if locked else f'no {lock.name} to compare with'}")]


def devices(machine: Machine, launch: Launch, bf16: bool) -> list[Check]:
    """GPUs, their memory and bfloat16; cores and threads; main memory."""
    checks = []
    ram = f"{machine.ram / GB:.0f} GB main memory"
    if not machine.here:
        size = f"{(machine.memory or 0) / GB:g} GB"
        checks.append(
            Check("devices", OK, f"planned for {machine.gpus} GPU(s) of {size}; this machine is not looked at")
        )
    elif machine.gpus:
        names = Counter(torch.cuda.get_device_name(i) for i in range(machine.gpus))
        shown = ", ".join(f"{count} x {name}" for name, count in names.items())
        checks.append(
            Check("devices", OK, f"{shown}, {machine.memory / GB:.1f} GB each; {machine.cores} cores, {ram}")
        )
        for i in range(machine.gpus):
            free, total = torch.cuda.mem_get_info(i)
            if total - free > 2 * GB:
                text = f"GPU {i}: {(total - free) / GB:.1f} of {total / GB:.1f} GB are taken by others"
                checks.append(Check("devices", WARNING, text, "see nvidia-smi; the estimate below assumes a free GPU"))
        if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            text = "bf16 is true, but a GPU here has no bfloat16"
            checks.append(Check("devices", PROBLEM, text, "give --bf16 false --dtype float32 --render_dtype float16"))
    else:
        checks.append(Check("devices", OK, f"no GPU, everything on {machine.cores} cores; {ram}"))
    if machine.gpus and launch.processes > machine.gpus:
        text = f"{launch.processes} processes for {machine.gpus} GPU(s)"
        checks.append(Check("devices", PROBLEM, text, f"launch {machine.gpus}, or raise --gpus"))
    return [*checks, *_threads(machine, launch)]


def _threads(machine: Machine, launch: Launch) -> list[Check]:
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    if not machine.here or launch.processes == 1 or launch.processes * (threads or machine.cores) <= machine.cores:
        return []
    text = (
        f"OMP_NUM_THREADS is {threads or 'unset'}: {launch.processes} processes x {threads or machine.cores} threads "
        f"on {machine.cores} cores"
    )
    return [Check("threads", WARNING, text, f"OMP_NUM_THREADS={max(1, machine.cores // launch.processes)}")]


def read_data(options: Options) -> tuple[list[Check], list[Prompt]]:
    """The prompt file, its tasks, and what of it cannot be judged or will be cut."""
    path = options.script.data
    try:
        prompts = load_prompts(path)
    except UserError as error:
        return [Check("data", PROBLEM, str(error))], []
    tasks = Counter(prompt.task or "unknown" for prompt in prompts)
    shown = ", ".join(f"{name} {count}" for name, count in tasks.most_common())
    checks = [Check("data", OK, f"{len(prompts)} prompts in {path}: {shown}")]
    judges = [name for name in NEED_NOUNS if name in names_of(options)]
    blank = sum(not prompt.nouns for prompt in prompts)
    if judges and blank:
        text = f"{blank} of {len(prompts)} prompts name no thing that {' and '.join(judges)} could look for"
        checks.append(Check("data", WARNING, text, "they score a constant there: give them as .jsonl with nouns"))
    long = sum(len(prompt.text) > MAX_PROMPT_CHARS for prompt in prompts)
    if long:
        text = f"{long} prompts are longer than {MAX_PROMPT_CHARS} characters; what is beyond is not read"
        checks.append(Check("data", WARNING, text, "shorten them"))
    return checks, prompts


def batch_numbers(options: Options, plan: Plan, prompts: int, launch: Launch) -> tuple[list[Check], dict[str, int]]:
    """The trainer's own arithmetic."""
    script, training = options.script, options.training
    try:
        numbers = plan(script, training, prompts)
    except UserError as error:
        return [Check("batch", PROBLEM, str(error))], {}
    weights = training.reward_weights
    if weights is not None and len(weights) != len(script.rewards):
        text = f"reward_weights {weights} for rewards {script.rewards}"
        return [Check("batch", PROBLEM, text, "give one weight for each reward")], numbers
    text = (
        f"{numbers['prompts_per_generation']} prompts x {training.num_generations} completions = "
        f"{numbers['completions_per_generation']} rollouts, up to {numbers['images_per_generation']} pictures a "
        f"generation, on {launch.processes} process(es); {numbers['optimizer_steps']} steps, "
        f"up to {numbers['images']} pictures in all"
    )
    return [Check("batch", OK, text)], numbers


def outdir(options: Options, all_options: Callable[[Options], dict[str, Any]], numbers: dict[str, int]) -> list[Check]:
    """Whether this run may write there. Reads only."""
    script = options.script
    folder = RunFolder(
        script.outdir, all_options(options), may_differ=may_differ(*vars(options).values()), resume=script.resume
    )
    refused = _refused("outdir", UserError, lambda: folder.plan(numbers.get("optimizer_steps")))
    if refused:
        return refused
    parent = _existing(Path(script.outdir))
    if not os.access(parent, os.W_OK):
        return [Check("outdir", PROBLEM, f"{parent} cannot be written to", "choose another --outdir")]
    resume_messages = ""
    return [Check("outdir", OK, f"{script.outdir} is free for this run{resume_messages}")]


def rewards(options: Options) -> list[Check]:
    """Names, and whether judges can hold a process for longer than the others wait."""
    script, training = options.script, options.training
    refused = _refused("rewards", UserError, lambda: check(names_of(options), options.reward, training.ddp_timeout))
    shown = f"{', '.join(script.rewards)}; held out {', '.join(script.held_out) or 'none'}"
    return refused or [Check("rewards", OK, f"{shown}; processes wait {training.ddp_timeout} s for each other")]


def rounded(options: Options, launch: Launch) -> list[str]:
    """The trainer's warning of steps that are too small for its weights; DeepSpeed may be only planned here."""
    return [] if launch.zero else warn_if_bf16_loses_updates(options.training, options.model)


def _refused(name: str, kind: type[Exception], attempt: Callable[[], object]) -> list[Check]:
    try:
        attempt()
    except kind as error:
        return [Check(name, PROBLEM, str(error))]
    return []


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


# Disk and memory -------------------------------------------------------------------------------------------------


def disk(options: Options, launch: Launch, numbers: dict[str, int], free: int) -> list[Check]:
    """Free space against two checkpoints and the pictures that are kept; `free` bytes are left."""
    script, training = options.script, options.training
    try:
        policy = shapes.policy(script.gpt_path)
    except shapes.UserError:
        policy = None
    if policy is None:
        return [Check("disk", NOT_RUN, f"{readable(free)} free; nothing is known of {script.gpt_path}'s size")]
    run = describe(options, launch, policy, prompt=0)
    checkpoint = _checkpoint(run, policy, training.save_only_model)
    steps, every = numbers["optimizer_steps"], max(1, script.save_images_every)
    side = options.render.resolution or 1024
    pictures = int(
        (steps // every + 2) * min(script.save_images_max, numbers["images_per_generation"]) * side**2 * PNG
    )
    saves = steps // max(1, int(training.save_steps)) if training.save_strategy == "steps" else 1
    most = min(training.save_total_limit or saves, saves) + 1  # a new one is whole before the oldest goes
    need, all_of_it = 2 * checkpoint + pictures, most * checkpoint + pictures
    text = (
        f"{readable(free)} free at {script.outdir}; 2 checkpoints of {readable(checkpoint)} and "
        f"{readable(pictures)} of pictures are {readable(need)}"
    )
    if free < need:
        return [Check("disk", PROBLEM, text, "free some, choose another --outdir, or lower --save_images_max")]
    if free < all_of_it:
        more = f"; the {most} that are there at once need {readable(all_of_it)}"
        return [Check("disk", WARNING, text + more, "lower --save_total_limit")]
    return [Check("disk", OK, text)]


def _checkpoint(run: Run, policy: Policy, weights_only: bool) -> int:
    """Bytes: weights as they are loaded, and what the optimiser holds of what is trained, of all processes."""
    trained = run.adapter or policy.parameters
    weights = 4 * run.adapter if run.adapter else policy.parameters * (2 if run.zero and run.mixed else run.size)
    states = 12 if run.zero else 8 if run.adapter else 2 * run.size
    return weights + (0 if weights_only else states * trained)


def memory(
    found: Report,
    argv: Sequence[str],
    parse_options: Parse,
    plan: Plan,
    options: Options,
    prompts: Sequence[Prompt],
) -> list[Check]:
    """Fills `found.tables`, and `found.advice` where they do not fit; one line for each device."""
    machine, launch = found.machine, found.launch
    try:
        tables = tables_of(options, machine, launch, prompts)
    except shapes.UserError as error:
        return [Check("memory", NOT_RUN, f"no estimate: {error}")]
    found.tables = tables
    checks = [*(_room(table, machine) for table in tables), *_loading(options, machine, launch)]
    if fits(tables, machine) or not found.numbers:  # what the trainer refuses is not improved
        return checks
    advisor = Advisor(argv, parse_options, plan, machine, launch, prompts)
    kept = advisor.improve()
    found.advice = [kept] if kept else []
    found.advice += advisor.other_renderers(options.render.sdmodel_name)
    if not kept:
        checks.append(_hopeless(options, machine, found.advice != []))
    return checks


def _room(table: Table, machine: Machine) -> Check:
    phase, most = table.fullest
    room = capacity(table, machine)
    text = f"{device_name(table)}: fullest in {phase}, {readable(most)}"
    if room is None:
        return Check("memory", NOT_RUN, f"{text} (estimate); what there is was not looked at")
    if most > room:
        return Check(
            "memory", PROBLEM, f"{text} of {readable(room)} (estimate): does not fit", "the flags below, if any"
        )
    return Check("memory", OK, f"{text} of {readable(room)} (estimate): fits")


def _loading(options: Options, machine: Machine, launch: Launch) -> list[Check]:
    """All processes load at once, and weights pass through main memory; the renderer's are the most."""
    pipeline = shapes.pipeline(options.render.sdmodel_name)
    most = launch.processes * pipeline.parameters * ELEMENT[options.render.render_dtype]
    text = f"{launch.processes} process(es) load the renderer at once, {readable(most)} of main memory (derived)"
    if not launch.gpu or options.render.remote:
        return []
    if machine.here and most > machine.ram:
        return [
            Check("loading", WARNING, f"{text} of {readable(machine.ram)}", "give the node more, or fewer processes")
        ]
    return [Check("loading", OK, text)]


def _hopeless(options: Options, machine: Machine, others: bool) -> Check:
    """Said plainly; `others`: whether another renderer fits."""
    if options.render.remote:
        return Check(
            "memory", PROBLEM, "no flags that were tried make the run fit, though servers draw", "larger GPUs"
        )
    name, pipeline = options.render.sdmodel_name, shapes.pipeline(options.render.sdmodel_name)
    weights = pipeline.parameters * ELEMENT[options.render.render_dtype]
    alone = f"its weights alone are {readable(weights)} in {options.render.render_dtype}"
    text = f"no flags that were tried make {name} fit: {alone}"
    if weights <= (machine.memory or 0):
        text += ", and what the rest needs at least does not fit beside them"
    else:
        text += f", the GPU has {readable(machine.memory or 0)}"
    return Check("memory", PROBLEM, text, "another renderer, as below, or a larger GPU" if others else "a larger GPU")
