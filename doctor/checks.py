"""Everything that can be known of a run before it starts. Nothing is written; only `--probe true` may fetch a model.

A check that fails does not stop the others; what was not looked at is "not run", never "ok".
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError

from data.prompts import load_prompts
from doctor.memory import checkpoint_bytes, estimate, scorers_of
from doctor.probes import probe_all
from doctor.report import GB, NOT_RUN, OK, PROBLEM, WARNING, Check, Plan, Report
from errors import UserError
from interfaces import Prompt
from models.hub import base_of, is_adapter, on_disk
from models.weights import absent_shards, locked, verify
from prompting import MAX_PROMPT_CHARS
from r1_prompter import Options
from run.files import size_text
from run.folder import RunFolder
from run.options import may_differ
from run.trainer import warn_if_bf16_loses_updates

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "diffusers", "peft")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
PNG = 1.5  # bytes of a pixel: 64 pictures of 512 px are about 25 MB
PROBE_WITHOUT_GPU = 4 * GB  # a run that needs more is not probed where there is no GPU


def examine(trainer: ModuleType, options: Options, plan: Plan, probe: bool | None) -> Report:
    """Check all that can be checked of a run; `probe` None loads models where all are here and small or on a GPU."""
    training, found = options.training, Report(plan)
    say = found.checks.extend
    say([versions(), *devices(plan, training.bf16)])
    data, prompts = read_data(options)
    say(data)
    if prompts:
        say([_checked("batch", lambda: batch(trainer, options, found, len(prompts)))])
        say([_checked("outdir", lambda: outdir(trainer, options, found))])
    say([_checked("rewards", lambda: rewards(trainer, options))])
    if not plan.zero:
        say(Check("rounding", WARNING, line) for line in warn_if_bf16_loses_updates(training, options.model))
    checkpoints = [checkpoint(role, path) for role, path in named_models(options)]
    say(checkpoints)
    if checkpoints[0].state == OK:
        say([_checked("template", lambda: template(trainer, options))])
    say(memory_and_disk(found, options))
    if probe is None:
        complete = all(check.state == OK for check in checkpoints)
        probe = complete and plan.here and (plan.gpus > 0 or 0 < sum(found.memory.values()) < PROBE_WITHOUT_GPU)
    if not probe:
        text = "no model was loaded: weights are missing, this machine is not meant, or it has no GPU for them"
        say([Check("probe", NOT_RUN, text, "--probe true loads them all the same")])
    say(probe_all(options, prompts or [Prompt("a photo of a red circle")], probe))
    return found


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, OK, check())
    except UserError as error:
        return Check(name, PROBLEM, str(error))


def this_machine() -> Plan:
    if gpus := torch.cuda.device_count():
        return Plan(gpus, min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus)))
    return Plan(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def versions(lock: Path = LOCK) -> Check:
    """The packages that decide what a run does, against those that were tested together."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    locked = dict(line.split()[0].split("==") for line in lines if "==" in line)
    here = {name: version(name).split("+")[0] for name in PACKAGES}
    wanted = {name: locked.get(name, value) for name, value in here.items()}
    if differing := [f"{name} {here[name]} ({wanted[name]})" for name in here if here[name] != wanted[name]]:
        return Check("versions", WARNING, f"not as in {lock.name}: {', '.join(differing)}", "make test sets it up")
    return Check("versions", OK, ", ".join(f"{name} {value}" for name, value in here.items()))


def devices(plan: Plan, bf16: bool) -> list[Check]:
    """The GPUs, their free memory and their bfloat16."""
    device, checks = f"{plan.gpus} GPU(s)" if plan.gpus else "the CPU", []
    text = f"{plan.processes} process(es) on {device} with {size_text(plan.memory)}"
    if plan.processes > plan.gpus > 0:
        return [Check("devices", PROBLEM, text, "launch one process for each GPU")]
    if not plan.here or not plan.gpus:
        return [Check("devices", OK, text if plan.here else f"{text}, which are not those of this machine")]
    for i in range(plan.gpus):
        free, total = torch.cuda.mem_get_info(i)
        if total - free > 2 * GB:
            used = f"{size_text(total - free)} of GPU {i} are in use, which the estimate does not count"
            checks.append(Check("devices", WARNING, used, "see nvidia-smi"))
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        action = "give --bf16 false --dtype float32"
        checks.append(Check("devices", PROBLEM, "--bf16 true, but a GPU here has no bfloat16", action))
    return checks or [Check("devices", OK, f"{text}, {torch.cuda.get_device_name()}")]


def read_data(options: Options) -> tuple[list[Check], list[Prompt]]:
    """The prompt file, its tasks, and its prompts that cannot be judged or will be cut."""
    path = options.script.data
    try:
        prompts = load_prompts(path)
    except UserError as error:
        return [Check("data", PROBLEM, str(error))], []
    tasks = Counter(prompt.task or "unknown" for prompt in prompts)
    shown = ", ".join(f"{name} {count}" for name, count in tasks.most_common())
    checks = [Check("data", OK, f"{len(prompts)} prompts in {path}: {shown}")]
    blank = sum(not prompt.nouns for prompt in prompts)
    if blank and {"git", "gdino"}.intersection(scorers_of(options)):
        text = f"{blank} of {len(prompts)} prompts have no nouns, so git and gdino give each a constant score"
        checks.append(Check("data", WARNING, text, "give them as .jsonl with nouns"))
    if long := sum(len(prompt.text) > MAX_PROMPT_CHARS for prompt in prompts):
        checks.append(Check("data", WARNING, f"{long} prompts are cut after {MAX_PROMPT_CHARS} characters"))
    return checks, prompts


def batch(trainer: ModuleType, options: Options, found: Report, prompts: int) -> str:
    """The trainer's own numbers; fills `found.batch`."""
    found.batch = trainer.plan(options.script, options.training, prompts)
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found.batch.items())


def rewards(trainer: ModuleType, options: Options) -> str:
    """Names, weights and time limits that the trainer accepts."""
    trainer.check_rewards(options, options.training.reward_weights)
    return f"{', '.join(options.script.rewards)}; held out {', '.join(options.script.held_out) or 'none'}"


def template(trainer: ModuleType, options: Options) -> str:
    """What the policy is shown of a request."""
    found = trainer.load_template(options)
    turn = "" if found.has_system_turn else ", in one turn, because the template has none for instructions"
    return f"it shows instructions and request{turn}; it writes {found.opening!r} at the head of an answer"


def outdir(trainer: ModuleType, options: Options, found: Report) -> str:
    """Whether this run may write there, and whether it can."""
    path, allowed = options.script.outdir, may_differ(*vars(options).values())
    folder = RunFolder(path, trainer.all_options(options), may_differ=allowed, resume=options.script.resume)
    resume = folder.plan(found.batch.get("optimizer_steps"))
    if not os.access(_existing(path), os.W_OK):
        raise UserError(f"{_existing(path)} cannot be written to: choose another --outdir")
    return f"{path} is free for this run" + (f", after step {resume.step}" if resume.step else "")


def _existing(path: str) -> Path:
    """`path`, or the nearest folder above it that exists."""
    absolute = Path(path).absolute()
    return next(one for one in (absolute, *absolute.parents) if one.is_dir())


def named_models(options: Options) -> list[tuple[str, str]]:
    """Role and path of every model that the options name and whose weights must be on this disk."""
    policy, render = options.script.gpt_path, options.render
    return [
        ("policy", policy),
        *([("base model", base_of(policy, None)[0])] if is_adapter(policy) else []),
        *([] if render.remote else [("renderer", render.sdmodel_name)]),
        *[(f"reward {name}", path) for name, path in scorers_of(options).items()],
    ]


def checkpoint(role: str, path: str) -> Check:
    """Whether a checkpoint is on this disk, complete, and as it is locked."""
    known, folder = locked(path), on_disk(path)
    facts = "".join(f", {fact}" for fact in (known.size, known.licence) if fact)
    action = known.command if path.count("/") == 1 else "check the path"
    if folder is None:
        return Check(role, PROBLEM, f"{path} is not on this disk{facts}", action)
    try:
        if lacking := missing_files(folder):
            return Check(role, PROBLEM, f"{path} lacks {', '.join(lacking)}", action)
        verify(folder)
    except (UserError, ValueError) as error:
        return Check(role, PROBLEM, str(error), action)
    size = sum(file.stat().st_size for file in (folder, *folder.rglob("*")) if file.is_file())
    return Check(role, OK, f"{path} is here, {size_text(size)}{facts}")


def missing_files(folder: Path) -> list[str]:
    """What a checkpoint lacks: parts of a pipeline, files that an index names, or any weights."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    named = [name for name, kind in parts.items() if isinstance(kind, list) and kind[0]]
    lacking = [f"{name}/" for name in named if not (folder / name).is_dir()]
    lacking += [shard for part in (folder, *folder.glob("*/")) for shard in absent_shards(part)]
    weights = any(file.suffix in WEIGHTS for file in (folder, *folder.rglob("*")))
    return lacking if weights else [*lacking, "weights"]


def memory_and_disk(found: Report, options: Options) -> list[Check]:
    """Fills `found.memory`; a line for it and one for the disk."""
    try:
        found.memory = estimate(options, found.plan)
        size = checkpoint_bytes(options, found.plan)
    except (UserError, OSError, ValueError, KeyError, SafetensorError) as error:  # of a model's files
        return [Check("memory", NOT_RUN, f"no estimate, the size of a model is not known: {error}")]
    total, room = sum(found.memory.values()), found.plan.memory
    state = PROBLEM if total > room else WARNING if 1.2 * total > room else OK
    text = f"about {size_text(total)} and activations, of {size_text(room)}"
    memory = Check("memory", state, text, "" if state == OK else "see docs/speed.md")
    return [memory, _disk(options, found.batch, size)] if found.batch else [memory]


def _disk(options: Options, numbers: dict[str, int], size: int) -> Check:
    """Free space against the pictures that are kept and the checkpoints, of `size` bytes each."""
    script, training, steps = options.script, options.training, numbers["optimizer_steps"]
    free = shutil.disk_usage(_existing(script.outdir)).free
    kept = min(script.save_images_max, numbers["images_per_generation"]) * (2 + steps // script.save_images_every)
    pictures = int(kept * (options.render.resolution or 1024) ** 2 * PNG)
    saves = steps // max(1, int(training.save_steps)) if training.save_strategy == "steps" else 1
    most = min(training.save_total_limit or saves, saves) + 1  # a new one is written before the oldest is deleted
    need = f"{most} checkpoints of {size_text(size)} and {size_text(pictures)} of pictures"
    state = OK if free > most * size + pictures else WARNING if free > 2 * size + pictures else PROBLEM
    action = "free some, choose another --outdir, or lower --save_total_limit or --save_images_max"
    return Check("disk", state, f"{size_text(free)} free for {need}", "" if state == OK else action)
