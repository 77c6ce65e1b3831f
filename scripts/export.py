"""Make a folder of what a run has trained that others use without this project, with a model card; share it.

    python scripts/export.py --run runs/mine --out exported [--adapter true] [--push_to_hub organisation/name]

A rewriter becomes a model whose chat template carries the system prompt, so that a plain user message is answered as
in training; its LoRA is merged, or kept with `--adapter true`. An image model becomes a LoRA that
`FluxPipeline.load_lora_weights` takes, or a whole pipeline; a Janus a folder of transformers. Nothing is uploaded
unasked; an upload is one commit, so that it is there whole or not at all.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from transformers import GenerationConfig, PreTrainedTokenizerBase

from errors import Stopped, UserError, one_line
from models.hub import HUB_NAME, is_adapter
from models.policy import ChatTemplate, load_tokenizer, merged_policy
from models.weights import check_folder, locked
from prompting import DIRECT_PROMPT, SYSTEM_PROMPT
from report.page import Folder, write_card
from run.options import option, parse, run_main

KINDS = {"gpt_path": "rewriter", "model_path": "janus", "sdmodel_name": "image model"}  # by what a run starts from
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")
NOT_MODEL = ("run.json", "summary.json", "heartbeat_*.json")
MEAN_OF = 5  # values, where there are so many
PICTURE, SHOWN = "before_after.png", 6  # prompts of a picture that is made of evaluations
MEASURES = ("win_rate", "eval/", "reward", "held_out/")  # of metrics.jsonl that a card shows, by their beginnings


@dataclass
class ExportOptions:
    """What is exported, and where it goes."""

    run: str = option(help="Folder of a run that is complete.", changes="run")
    out: str = option(help="Folder to make.", changes="run")
    weights: str = option(
        "last", "Of an image model or a Janus; ema and best are averages.", changes="run",
        choices=["last", "ema", "best"],
    )  # fmt: skip
    adapter: bool = option(False, "Keep a rewriter's LoRA as it is, beside its base model.", changes="run")
    licence: str | None = option(None, "The card's; unset: the base model's, where it is known.", changes="run")
    push_to_hub: str | None = option(None, "Upload to organisation/name, after a question.", changes="run")
    private: bool = option(True, "Whether a repository that must be made is private.", changes="run")


def export(options: ExportOptions) -> Path:
    """Make the folder; nothing is left of one that could not be finished.

    Raises:
        UserError: no complete run, or `out` is there already.
    """
    run, out = Path(options.run), Path(options.out)
    if options.push_to_hub and not HUB_NAME.fullmatch(options.push_to_hub):
        raise UserError(f"--push_to_hub {options.push_to_hub!r}: give organisation/name")
    if out.exists():
        raise UserError(f"--out {out} is there already: name a new folder")
    record = Folder(run).record("run.json")
    kind = next((kind for key, kind in KINDS.items() if key in record.get("config", {})), None)
    if kind is None:
        raise UserError(f"--run {run} is no folder of a run: name the --outdir of one")
    if kind == "rewriter" and options.weights != "last" or kind != "rewriter" and options.adapter:
        raise UserError(f"{run} is a run of a {kind}: --weights is for image models, --adapter for rewriters")
    source = run if options.weights == "last" else run / options.weights
    if not any((source / name).is_file() for name in MARKERS[kind]):
        raise UserError(f"{source} holds no trained weights: is the run complete, and are these its --weights?")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        staged = Path(folder, "export")
        staged.mkdir()
        more = WRITERS[kind](source, staged, options, record["config"])
        check_weights(source, staged)
        _card(run, staged, kind, options, record, more)
        for file in staged.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # weights are written for their owner alone
        staged.rename(out)
    return out


def check_weights(source: Path, staged: Path) -> None:
    """UserError if the weights are not there, or are damaged."""
    folders = [staged, *(path for path in staged.iterdir() if path.is_dir())]
    for folder in folders:
        check_folder(folder)
    if not any(staged.rglob("*.safetensors")):
        raise UserError(f"{source} has no weights in safetensors: is the run complete?")


MARKERS = {
    "rewriter": ("config.json", "adapter_config.json"),
    "janus": ("config.json",),
    "image model": ("pytorch_lora_weights.safetensors", "model_index.json"),
}


# Weights -------------------------------------------------------------------------------------------------------------


def write_rewriter(source: Path, out: Path, options: ExportOptions, config: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, tokenizer with the system prompt in its template, and how to sample."""
    reasoning = config["reasoning"]
    tokenizer = load_tokenizer(str(source))
    tokenizer.chat_template = with_instructions(tokenizer, reasoning)
    if options.adapter and not is_adapter(str(source)):
        raise UserError(f"--adapter true: {source} holds a whole model: leave it out")
    if options.adapter:
        copy_model(source, out, ("adapter_config.json", "adapter_model.safetensors"))
    elif is_adapter(str(source)):
        merged_policy(str(source)).save_pretrained(out)
    else:
        copy_model(source, out)
    tokenizer.save_pretrained(out)
    if not options.adapter:
        ends = Folder(out).record("generation_config.json").get("eos_token_id")
        GenerationConfig(
            eos_token_id=tokenizer.eos_token_id if ends is None else ends, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, do_sample=False, max_new_tokens=512,
        ).save_pretrained(out)  # fmt: skip
    return {"reasoning": reasoning, "adapter": options.adapter}


def with_instructions(tokenizer: PreTrainedTokenizerBase, reasoning: bool) -> str:
    """Its chat template, which puts the system prompt in front of a conversation that has none."""
    system = SYSTEM_PROMPT if reasoning else DIRECT_PROMPT
    if ChatTemplate(tokenizer, reasoning).has_system_turn:
        condition = "messages[0]['role'] != 'system'"
        first = f"[{{'role': 'system', 'content': {system!r}}}] + messages"
    else:  # instructions then stand before the first request
        condition = f"not messages[0]['content'].startswith({system!r})"
        said = f"{system}\n\n"
        first = f"[{{'role': 'user', 'content': {said!r} + messages[0]['content']}}] + messages[1:]"
    return f"{{% if {condition} %}}{{% set messages = {first} %}}{{% endif %}}{tokenizer.chat_template}"


def copy_weights(source: Path, out: Path, options: ExportOptions, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of an image model a LoRA or a pipeline, of a Janus its folder."""
    if (lora := source / "pytorch_lora_weights.safetensors").is_file():
        shutil.copy(lora, out)
        return {"adapter": True}
    copy_model(source, out)
    for name, value in Folder(source).record("model_index.json").items():
        if isinstance(value, list) and (source / name).is_dir():
            shutil.copytree(source / name, out / name)
    return {"adapter": False}


def copy_model(source: Path, out: Path, patterns: Sequence[str] = MODEL_FILES) -> None:
    """The files of a model, without those of its run."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if not any(file.match(name) for name in NOT_MODEL):
                shutil.copy(file, out)


WRITERS = {"rewriter": write_rewriter, "janus": copy_weights, "image model": copy_weights}


# The card ------------------------------------------------------------------------------------------------------------


def _card(
    run: Path, out: Path, kind: str, options: ExportOptions, record: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    base = str(next(record["config"][key] for key, name in KINDS.items() if name == kind))
    rows = Folder(run).rows("metrics.jsonl")
    known = locked(base).licence if HUB_NAME.fullmatch(base) else ""
    write_card(
        run, out, kind=kind, base=base, name=options.push_to_hub or Path(options.out).name,
        licence=options.licence or known or "other", table=progress(rows), picture=_picture(run, out),
        step=rows[-1].get("step") if rows else None, tags=["r1-prompter", kind.replace(" ", "-")], exported=True,
        **more,
    )  # fmt: skip


def progress(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(measure, mean of its first values, of its last) of each measure of a run's metrics that a reader knows."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            is_other = "/" in name and not name.endswith("/mean") and not name.startswith("win_rate")
            if name.startswith(MEASURES) and not is_other and isinstance(value, float):
                seen.setdefault(name, []).append(value)
    order = sorted(seen, key=lambda name: next(i for i, start in enumerate(MEASURES) if name.startswith(start)))
    few = {name: min(MEAN_OF, max(1, len(values) // 2)) for name, values in seen.items()}
    return [
        (name, float(np.mean(seen[name][: few[name]])), float(np.mean(seen[name][-few[name] :]))) for name in order
    ]


def _picture(run: Path, out: Path) -> str | None:
    """The demo's picture, or the first prompts of the first evaluation and of the last, one row each."""
    if (run / PICTURE).is_file():
        shutil.copy(run / PICTURE, out)
        return PICTURE
    steps = sorted((run / "evaluations").glob("*.jsonl"))
    if len(steps) < 2:
        return None
    sides = [
        {
            row["prompt"]: run / row["image"]
            for row in Folder(run).rows(f"evaluations/{step.name}")
            if row["image"] and (run / row["image"]).is_file()  # a full disk costs pictures first
        }
        for step in (steps[0], steps[-1])
    ]
    prompts = [prompt for prompt in sides[0] if prompt in sides[1]][:SHOWN]
    if not prompts:
        return None
    pictures = [[Image.open(side[prompt]).convert("RGB").resize((256, 256)) for prompt in prompts] for side in sides]
    sheet = Image.new("RGB", (264 * len(prompts) - 8, 264 * 2 - 8), "white")
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (264 * x, 264 * y))
    sheet.save(out / PICTURE)
    return PICTURE


# Upload --------------------------------------------------------------------------------------------------------------


def push(folder: Path, name: str, private: bool) -> str:
    """Upload the folder in one commit, after a question; returns its address.

    Raises:
        UserError: the answer was not yes, nobody can be asked, or the name is none.
        Stopped: the hub could not be reached, or refused; nothing of the folder is there then.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not sys.stdin.isatty():
        raise UserError(
            f"--push_to_hub asks before it uploads, and there is no terminal: {folder} is made, not uploaded"
        )
    try:
        answer = input(f"Upload {size / 1e6:.0f} MB of {folder} to {name}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError(f"not uploaded; {folder} is made")
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of R1-Prompter"))
    except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError) as error:
        raise Stopped(
            f"{folder} was not uploaded to {name} ({one_line(error)}); run `hf auth login`, or try later"
        ) from error


def main() -> None:
    (options,) = parse((ExportOptions,), None, sys.argv[1:])
    out = export(options)
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    if options.push_to_hub:
        print(push(out, options.push_to_hub, options.private))


if __name__ == "__main__":
    sys.exit(run_main("export", main))
