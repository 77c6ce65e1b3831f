"""Rewrite a file of prompts with a policy and, if a renderer is named, draw the rewrites.

    python scripts/reprompt.py --prompts file.txt --gpt_path PATH --out DIR [--sdmodel_name PATH --images 4 --baseline]

Writes DIR/rewrites.jsonl (one row per distinct prompt, in the order of the file), DIR/settings.json and DIR/*.png. Run
it again to continue where it stopped. What it leaves out: scores (see evaluation/).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data.prompts import load_prompts
from errors import UserError
from inference import Reprompter
from interfaces import Prompt, Renderer
from models.policy import DTYPES, pick_device, pick_dtype
from prompting import well_formed
from rendering import RenderOptions
from run.files import atomic_write, complete_lines, differences, save_png
from run.seeds import render_seed

NOT_RESULTS = ("prompts", "out", "device")  # arguments that may differ when a run is continued
PICTURE_SETTINGS = (
    "sdmodel_name", "images", "baseline", "steps", "guidance", "resolution", "max_sequence_length", "chunk_size",
)  # fmt: skip


# --- the run folder -------------------------------------------------------------------------------


def _settings(args: argparse.Namespace, prompts: Sequence[Prompt], pictures: bool) -> dict:
    """All that a row or picture depends on. Greedy rows do not depend on the batch size, so it may change then."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_RESULTS}
    settings["batch_size"] = args.batch_size if args.temperature > 0 else None
    settings["prompt_ids"] = hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]
    return settings if pictures else {**settings, **dict.fromkeys(PICTURE_SETTINGS)}


def _check_settings(path: Path, new: dict) -> None:
    """UserError if the folder was made with other settings; pictures may be added to rewrites without any."""
    if not path.is_file():
        if path.with_name("rewrites.jsonl").exists():
            raise UserError(f"{path.parent} holds rewrites but no settings.json; name another --out")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); name another --out") from error
    added = PICTURE_SETTINGS if old.get("sdmodel_name") is None else ()
    changed = differences({k: old.get(k) for k in new}, {**new, **{k: old.get(k) for k in added}})
    if changed:
        raise UserError(f"{path.parent} was made with other settings ({changed}); name another --out")


def _read_rows(path: Path) -> dict[str, dict]:
    """Rows by prompt id; a last line torn by a kill is cut off the file."""
    if not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in complete_lines(path, cut=True)]
    except ValueError as error:
        raise UserError(f"{path} has a line that is not JSON ({error}); name another --out") from error
    return {row["id"]: row for row in rows}


# --- rewriting and drawing ------------------------------------------------------------------------


def rewrite_all(args: argparse.Namespace, prompts: Sequence[Prompt], rows: dict[str, dict]) -> tuple[int, float]:
    """Add the missing rows to `rows` and to rewrites.jsonl as they come; returns (tokens written, seconds)."""
    reprompter = Reprompter(
        args.gpt_path,
        args.batch_size,
        args.max_new_tokens,
        args.temperature,
        args.seed,
        args.dtype,
        args.device,
        reasoning=not args.no_reasoning,
    )
    if not (args.out / "settings.json").exists():
        atomic_write(
            args.out / "settings.json", json.dumps(_settings(args, prompts, pictures=False), indent=1).encode()
        )
    where = {prompt.text: (index, prompt.id) for index, prompt in enumerate(prompts)}
    done = [prompt.text for prompt in prompts if prompt.id in rows]
    tokens, start = 0, time.perf_counter()
    with (
        open(args.out / "rewrites.jsonl", "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), desc="rewriting", unit="prompt") as bar,
    ):
        for batch in reprompter.stream([prompt.text for prompt in prompts], skip=done):
            for rewrite in batch:
                index, prompt_id = where[rewrite.prompt]
                tokens += rewrite.completion_tokens
                if prompt_id not in rows:
                    rows[prompt_id] = {"index": index, "id": prompt_id, **asdict(rewrite)}
                    file.write(json.dumps(rows[prompt_id]) + "\n")
                    bar.update()
            file.flush()
    return tokens, time.perf_counter() - start


def load_renderer(args: argparse.Namespace) -> Renderer:
    """The renderer that the arguments name; options not given are its own defaults."""
    device = pick_device(args.device)
    options = RenderOptions(
        args.sdmodel_name,
        render_steps=args.steps,
        guidance=args.guidance,
        resolution=args.resolution,
        max_sequence_length=args.max_sequence_length,
        render_dtype=pick_dtype(args.dtype, device),
        render_batch_size=args.chunk_size,
    )
    try:
        return options.load(device)
    except (UserError, ValueError) as error:
        raise UserError(f"renderer: {error}") from error


def draw_all(args: argparse.Namespace, renderer: Renderer, rows: Iterable[dict]) -> tuple[int, int]:
    """Draw what is not in the folder yet and put file names (or None) in the rows; returns (drawn, not drawn)."""
    jobs = {}  # file name -> (text, seed)
    for row in rows:
        for key, suffix, text in _versions(row, args.baseline):
            names = [f"{row['index']:06d}_{row['id'][:8]}_{image}{suffix}.png" for image in range(args.images)]
            row[key] = names
            jobs |= {name: (text, render_seed(args.seed, row["id"], 0, image)) for image, name in enumerate(names)}
    missing = [name for name in jobs if not (args.out / name).exists()]
    failed = set()
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="drawing", unit="picture") as bar:
        for start in range(0, len(missing), args.chunk_size):
            names = missing[start : start + args.chunk_size]
            pictures = renderer(*zip(*(jobs[name] for name in names), strict=True))
            for name, picture in zip(names, pictures, strict=True):
                if picture is None:
                    failed.add(name)
                else:
                    save_png(picture, args.out / name)
                bar.update()
    for row in rows:
        for key, _, _ in _versions(row, args.baseline):
            row[key] = [None if name in failed else name for name in row[key]]
    return len(missing) - len(failed), len(failed)


def _versions(row: dict, baseline: bool) -> list[tuple[str, str, str]]:
    rewritten, raw = ("images", "", row["rewrite"]), ("baseline_images", "_raw", well_formed(row["prompt"]))
    return [rewritten, raw] if baseline else [rewritten]


# --- the command ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    """The whole job; returns the summary. Raises UserError."""
    prompts = load_prompts(args.prompts)
    _check_settings(args.out / "settings.json", _settings(args, prompts, pictures=args.sdmodel_name is not None))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = _read_rows(args.out / "rewrites.jsonl")
    there = len(rows)
    tokens, seconds = rewrite_all(args, prompts, rows) if there < len(prompts) else (0, 1.0)
    ordered = [rows[prompt.id] for prompt in prompts]
    pictures = ""
    if args.sdmodel_name is not None:
        renderer = load_renderer(args)
        atomic_write(
            args.out / "settings.json", json.dumps(_settings(args, prompts, pictures=True), indent=1).encode()
        )
        drawn, failed = draw_all(args, renderer, ordered)
        pictures = f"; {drawn} pictures drawn, {failed} could not be drawn"
    atomic_write(args.out / "rewrites.jsonl", "".join(json.dumps(row) + "\n" for row in ordered).encode())
    fallbacks = sum(not row["readable"] for row in ordered)
    return (
        f"{len(ordered) - there} prompts rewritten, {there} were there; {fallbacks} of {len(ordered)} fell back to "
        f"the user's prompt; {tokens / seconds:.0f} tokens/s{pictures}; {args.out / 'rewrites.jsonl'}"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with code 2 on a bad one."""
    parser = argparse.ArgumentParser(description="Rewrite prompts with a policy and, if asked, draw the rewrites.")
    parser.add_argument("--prompts", type=Path, required=True, help=".txt (one a line) or .jsonl")
    parser.add_argument("--gpt_path", required=True, help="policy: folder, PEFT adapter folder or hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, or to continue in")
    parser.add_argument("--batch_size", type=_positive, default=16)
    parser.add_argument("--max_new_tokens", type=_positive, default=512)
    parser.add_argument("--no_reasoning", action="store_true", help="for a policy trained with --reasoning false")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--device", default="auto")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--sdmodel_name", help="renderer: folder or hub name; none: rewrite only")
    pictures.add_argument("--images", type=_positive, default=1, help="seeds per prompt")
    pictures.add_argument("--baseline", action="store_true", help="draw the user's own prompts too, same seeds")
    pictures.add_argument("--steps", type=_positive)
    pictures.add_argument("--guidance", type=float)
    pictures.add_argument("--resolution", type=_positive, help="height and width in pixels")
    pictures.add_argument("--max_sequence_length", type=_positive, help="tokens that the renderer reads")
    pictures.add_argument("--chunk_size", type=_positive, default=4, help="pictures drawn at once")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature is {args.temperature}; give 0 (greedy) or a positive number")
    if args.baseline and args.sdmodel_name is None:
        parser.error("--baseline draws pictures; name a renderer with --sdmodel_name")
    return args


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 cannot start or continue (one line on stderr)."""
    try:
        print(run(parse_args(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
