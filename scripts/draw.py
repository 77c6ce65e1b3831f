"""Draw every prompt of a file as it stands, with one GPU or with many.

    python scripts/draw.py --prompts file.txt --sdmodel_name black-forest-labs/FLUX.1-dev --out DIR [--samples 4]

    ... --render_lora runs/flow     with the LoRA that pref_grpo.py trained; where it trained all weights, the run
                                    folder is a pipeline: --sdmodel_name runs/flow
    accelerate launch --num_processes 8 scripts/draw.py ...       the same files, shared by prompts

Writes DIR/*.png, DIR/pictures.json (all that they depend on), and at the end DIR/pictures.jsonl: a row per prompt, in
the order of the file, with null for what could not be drawn. Run it again to continue where it stopped. Left out:
rewriting (scripts/reprompt.py), scores (scripts/evaluate.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from data.prompts import hash_of_ids, load_prompts
from prompting import well_formed
from rendering import RenderOptions, load_renderer
from rendering.pictures import RECORD, check_pictures, draw_missing, missing, picture_rows
from run.files import atomic_write, write_settings
from run.options import SEED, may_differ, option, parse, run_main


@dataclass
class DrawOptions:
    """What is drawn; how, is said by the renderer's own options."""

    prompts: str = option(help="Prompts: .txt, one a line, or .jsonl.", changes="nothing")  # settings have their ids
    out: str = option(help="Folder to write to, or to continue in.", changes="nothing")
    samples: int = option(4, "Pictures a prompt, one seed each.", changes="pictures", least=1)
    seed: int = option(0, "Of the noise that pictures start from.", changes="pictures", **SEED)


def draw(options: DrawOptions, render: RenderOptions) -> None:
    """Draw this process's share; the first process writes the list and prints a summary."""
    state = PartialState(not torch.cuda.is_available(), timeout=timedelta(days=1))  # processes finish hours apart
    device, out, prompts = str(state.device), Path(options.out), load_prompts(options.prompts)
    render.settle(device)
    given, ignored = {**asdict(options), **asdict(render)}, may_differ(options, render)
    settings = {name: value for name, value in given.items() if name not in ignored}
    record = check_pictures(out, {**settings, "prompt_ids": hash_of_ids(prompts)}, render)
    files = [
        picture_rows(index, prompt.id, well_formed(prompt.text), options.samples, options.seed)
        for index, prompt in enumerate(prompts)
    ]
    names = [name for rows in files for name in rows]
    mine = {name: row for rows in files[state.process_index :: state.num_processes] for name, row in rows.items()}
    before = missing(out, names)
    renderer = load_renderer(render, device) if missing(out, mine) else None
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_settings(out / RECORD, record)
    state.wait_for_everyone()  # all have counted, and none has drawn
    if renderer is not None:
        draw_missing(out, mine, render.render_batch_size, renderer, shown=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        failed, text = missing(out, names), ""
        for prompt, rows in zip(prompts, files, strict=True):
            images = [None if name in failed else name for name in rows]
            text += json.dumps({"prompt": prompt.text, "id": prompt.id, "images": images}) + "\n"
        atomic_write(out / "pictures.jsonl", text.encode())
        said = (
            f"{len(before) - len(failed)} pictures drawn, {len(names) - len(before)} were there, {len(failed)} could"
        )
        print(f"{said} not be drawn; {out / 'pictures.jsonl'}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("draw", lambda: draw(*parse((DrawOptions, RenderOptions), None, words)))


if __name__ == "__main__":
    sys.exit(main())
