"""Rewrite a file of prompts with a policy and, if a renderer is named, draw the rewrites.

    python scripts/reprompt.py --data file.txt --gpt_path PATH --out DIR [--sdmodel_name PATH --samples 4]
    python scripts/reprompt.py --data file.txt --policy_url http://127.0.0.1:8000/v1 --policy_model NAME --out DIR

Writes DIR/rewrites.jsonl (one row per distinct prompt, in the order of the file), DIR/settings.json, DIR/pictures.json
and DIR/*.png. Run it again to continue where it stopped; pictures may be added to rewrites. What it leaves out: scores
(see evaluation/).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data.prompts import hash_of_ids, load_prompts
from errors import UserError
from inference import Reprompter
from interfaces import Prompt, Renderer
from models.devices import DTYPES, pick_device
from models.policy import policy_contents
from prompting import well_formed
from rendering import RenderOptions, load_renderer
from rendering.pictures import RECORD, check_pictures, draw_missing, missing, picture_rows
from run.files import atomic_write, check_settings, complete_lines, write_settings
from run.options import SEED, device, may_differ, option, parse, run_main, template_option


@dataclass
class RepromptOptions:
    """What is rewritten, and how."""

    data: str = option(help="Prompts: .txt, one a line, or .jsonl.", changes="nothing")  # settings have their ids
    out: str = option(help="Folder to write to, or to continue in.", changes="nothing")
    gpt_path: str | None = option(None, "Policy: folder, PEFT adapter folder or hub name.", changes="run")
    policy_url: str | None = option(
        None, "Or an OpenAI-compatible API that serves it; its key: environment POLICY_API_KEY.", changes="nothing"
    )
    policy_model: str | None = option(None, "Its name there.", changes="run")
    rewrite_batch_size: int = option(16, "Prompts rewritten at once.", changes="run", least=1)
    exact: bool = option(False, "Batch prompts of one length only, so that none is padded.", changes="run")
    max_new_tokens: int = option(512, "Of one answer of the policy.", changes="run", least=1)
    reasoning: bool = option(True, "false for a policy trained with --reasoning false.", changes="run")
    chat_template_kwargs: dict | str | None = template_option()
    temperature: float = option(0.0, "0 is greedy.", changes="run", least=0)
    seed: int = option(0, "Of sampling, and of the noise that pictures start from.", changes="run", **SEED)
    dtype: str = option("auto", "Of the policy.", changes="run", choices=list(DTYPES))
    device: str = option("auto", "Of policy and renderer.", changes="nothing", reads=device)
    samples: int = option(1, "Pictures a prompt, one seed each.", changes="pictures", least=1)
    baseline: bool = option(False, "Draw the user's own prompts too, from the same seeds.", changes="pictures")


@dataclass
class Drawing(RenderOptions):
    """The renderer's options; nothing is drawn unless one is named."""

    sdmodel_name: str | None = option(
        None, "Renderer: folder, hub name or servers, as in the trainer; unset: rewrite only.", changes="pictures"
    )


def _settings(options: RepromptOptions, drawing: Drawing, prompts: Sequence[Prompt]) -> tuple[dict, dict]:
    """(all that a rewrite depends on, what a picture depends on beside it)."""
    given, pictures = {**asdict(options), **asdict(drawing)}, may_differ(options, drawing, changes=("pictures",))
    ignored = pictures | may_differ(options, drawing)
    settings = {name: value for name, value in given.items() if name not in ignored}
    if options.temperature == 0:
        del settings["rewrite_batch_size"], settings["exact"]  # greedy rewrites do not depend on it
    if options.gpt_path:
        settings["contents"] = policy_contents(options.gpt_path)
    settings["prompt_ids"] = hash_of_ids(prompts)
    return settings, {name: given[name] for name in pictures}


def _read_rows(path: Path) -> dict[str, dict]:
    """Rows by prompt id; a last line that a kill tore is removed from the file."""
    lines = complete_lines(path, cut=True) if path.exists() else []
    try:
        return {row["id"]: row for row in map(json.loads, lines)}
    except ValueError as error:
        raise UserError(f"{path} has a line that is not JSON ({error}): name another --out") from error


def rewrite_all(policy: Reprompter, out: Path, prompts: Sequence[Prompt], rows: dict[str, dict]) -> tuple[int, float]:
    """Add the missing rows to `rows` and to rewrites.jsonl as they come; returns (tokens written, seconds)."""
    where = {prompt.text: (index, prompt.id) for index, prompt in enumerate(prompts)}
    done = [prompt.text for prompt in prompts if prompt.id in rows]
    tokens, start = 0, time.perf_counter()
    with (
        open(out / "rewrites.jsonl", "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), desc="rewriting", unit="prompt") as bar,
    ):
        for batch in policy.stream([prompt.text for prompt in prompts], skip=done):
            for rewrite in batch:
                index, prompt_id = where[rewrite.prompt]
                tokens += rewrite.completion_tokens
                if prompt_id not in rows:
                    rows[prompt_id] = {"index": index, "id": prompt_id, **asdict(rewrite)}
                    file.write(json.dumps(rows[prompt_id]) + "\n")
                    bar.update()
            file.flush()
    return tokens, time.perf_counter() - start


def draw_all(options: RepromptOptions, batch: int, renderer: Renderer, rows: Sequence[dict]) -> tuple[int, int]:
    """Draw what is not in the folder yet and put file names (or None) in the rows; returns (drawn, not drawn)."""
    out, files = Path(options.out), {}
    for row in rows:
        for key, suffix, text in _texts(row, options.baseline):
            row[key] = picture_rows(row["index"], row["id"], text, options.samples, options.seed, suffix)
            files |= row[key]
    before = missing(out, files)
    draw_missing(out, files, batch, renderer)
    failed = missing(out, files)
    for row in rows:
        for key, _, _ in _texts(row, options.baseline):
            row[key] = [None if name in failed else name for name in row[key]]
    return len(before) - len(failed), len(failed)


def _texts(row: dict, baseline: bool) -> list[tuple[str, str, str]]:
    rewritten, raw = ("images", "", row["rewrite"]), ("baseline_images", "_raw", well_formed(row["prompt"]))
    return [rewritten, raw] if baseline else [rewritten]


def run(options: RepromptOptions, drawing: Drawing) -> None:
    """Rewrite, draw, and print a summary."""
    if bool(options.gpt_path) == bool(options.policy_url) or bool(options.policy_url) != bool(options.policy_model):
        raise UserError("name the policy: either --gpt_path, or --policy_url with --policy_model")
    if options.policy_url and options.chat_template_kwargs:
        raise UserError(
            "--chat_template_kwargs are for a policy in this process: with --policy_url the server has them"
        )
    if options.baseline and drawing.sdmodel_name is None:
        raise UserError("--baseline true draws pictures: name a renderer with --sdmodel_name")
    drawing.settle(options.device)
    prompts, out = load_prompts(options.data), Path(options.out)
    settings, pictures = _settings(options, drawing, prompts)
    check_settings(out / "settings.json", settings)
    if (out / "rewrites.jsonl").exists() and not (out / "settings.json").exists():
        raise UserError(f"--out {out} holds rewrites but no settings.json: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    rows = _read_rows(out / "rewrites.jsonl")
    there, tokens, seconds, drawn_text = len(rows), 0, 1.0, ""
    if there < len(prompts):
        policy = Reprompter(
            options.gpt_path or options.policy_model, options.rewrite_batch_size, options.max_new_tokens,
            options.temperature, options.seed, options.dtype, options.device, options.reasoning,
            options.chat_template_kwargs, options.exact, options.policy_url,
        )  # fmt: skip
        write_settings(out / "settings.json", settings)
        tokens, seconds = rewrite_all(policy, out, prompts, rows)
    ordered = [rows[prompt.id] for prompt in prompts]
    if drawing.sdmodel_name is not None:
        record = check_pictures(out, pictures, drawing)
        renderer = load_renderer(drawing, pick_device(options.device))
        write_settings(out / RECORD, record)
        drawn, failed = draw_all(options, drawing.render_batch_size, renderer, ordered)
        drawn_text = f"; {drawn} pictures drawn, {failed} could not be drawn"
    atomic_write(out / "rewrites.jsonl", "".join(json.dumps(row) + "\n" for row in ordered).encode())
    unreadable = sum(not row["readable"] for row in ordered)
    print(
        f"{len(ordered) - there} prompts rewritten, {there} were there; {unreadable} of {len(ordered)} fell back to "
        f"the user's prompt; {tokens / seconds:.0f} tokens/s{drawn_text}; {out / 'rewrites.jsonl'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("reprompt", lambda: run(*parse((RepromptOptions, Drawing), None, words)))


if __name__ == "__main__":
    sys.exit(main())
