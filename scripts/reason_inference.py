"""Plan and draw a file of prompts with a Janus: pictures, the plans beside them, and a sheet to look at.

    python scripts/reason_inference.py --model_path runs/janus --data_path prompts.txt --save_dir drawn

    drawn/000000_1a2b3c4d_0.png   named by a prompt's place in its file, its id and the number of the picture
    drawn/pictures.jsonl          a row a prompt: its plans and files
    drawn/sheet.png               the first prompts

The same command goes on where it stopped and draws nothing twice; several processes share the work (accelerate
launch). How it samples is what the folder says: a run's own settings. `--plan false` draws from the prompts alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from data.prompts import hash_of_ids, load_prompts
from evaluation.sheet import Cell, contact_sheet
from models.janus import longest_prefix
from prompting import well_formed
from rendering import RenderOptions
from rendering.janus import JanusRenderer, load_janus_renderer
from rendering.pictures import RECORD, check_pictures, missing, picture_rows
from rendering.rows import Row
from run.files import atomic_write, complete_lines, save_png, write_settings
from run.options import SEED, may_differ, option, parse, run_main

SHOWN = 6  # prompts on the sheet


@dataclass
class ReasonOptions:
    """The command line."""

    model_path: str = option(help="Janus in transformers' layout: a run, a folder or a hub name.", changes="pictures")
    data_path: str = option(help="Prompts: .txt, one a line, or .jsonl.", changes="nothing")  # settings have their ids
    save_dir: str = option(help="Folder to write to, or to continue in.", changes="nothing")
    num_generation: int = option(4, "Pictures a prompt, each with a plan and a seed.", changes="pictures", least=1)
    batch_size: int = option(16, "Pictures at once.", changes="nothing", least=1)
    plan: bool = option(True, "Write a plan first; false: draw from the prompt alone.", changes="pictures")
    guidance: float | None = option(None, "Of images; unset: the folder's own.", changes="pictures", least=1)
    dtype: str = option("auto", "Of weights.", changes="pictures", choices=["auto", "bfloat16", "float16", "float32"])
    seed: int = option(42, "Of plans and image tokens.", changes="pictures", **SEED)


def infer(options: ReasonOptions) -> None:
    """Draw this process's share; the first process writes the list and the sheet."""
    state = PartialState(not torch.cuda.is_available(), timeout=timedelta(days=1))  # processes finish hours apart
    out, prompts, ignored = Path(options.save_dir), load_prompts(options.data_path), may_differ(options)
    render = RenderOptions(
        sdmodel_name=options.model_path, render_dtype=options.dtype, render_plan=options.plan,
        guidance=options.guidance, render_batch_size=options.batch_size,
    )  # fmt: skip
    render.settle(str(state.device))
    settings = {name: value for name, value in vars(options).items() if name not in ignored}
    del settings["model_path"]  # its contents are compared
    record = check_pictures(out, {**settings, "prompt_ids": hash_of_ids(prompts)}, render)
    longest_prefix(options.model_path, [prompt.text for prompt in prompts], 0)  # or the room for an image ends
    files = [
        picture_rows(index, prompt.id, well_formed(prompt.text), options.num_generation, options.seed)
        for index, prompt in enumerate(prompts)
    ]
    mine = {name: row for rows in files[state.process_index :: state.num_processes] for name, row in rows.items()}
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_settings(out / RECORD, record)
    state.wait_for_everyone()
    plans = out / f"plans_{state.process_index}.jsonl"
    if plans.exists():
        complete_lines(plans, cut=True)
    if missing(out, mine):
        draw(
            load_janus_renderer(render, str(state.device)), out, plans, mine, options.batch_size, state.is_main_process
        )
    state.wait_for_everyone()
    if state.is_main_process:
        known = dict(
            pair
            for path in sorted(out.glob("plans_*.jsonl"))
            for pair in map(json.loads, complete_lines(path, cut=False))
        )
        failed, text = missing(out, [name for rows in files for name in rows]), ""
        for prompt, rows in zip(prompts, files, strict=True):
            drawn = [{"image": None if name in failed else name, "plan": known.get(name)} for name in rows]
            text += json.dumps({"prompt": prompt.text, "id": prompt.id, "pictures": drawn}, ensure_ascii=False) + "\n"
        atomic_write(out / "pictures.jsonl", text.encode())
        cells = {name: Cell(None if name in failed else out / name, known.get(name) or "", None) for name in known}
        lines = {
            f"{place}. {prompt.text[:24]}": [cells.get(name, Cell(None, "", None)) for name in rows]
            for place, (prompt, rows) in enumerate(list(zip(prompts, files, strict=True))[:SHOWN], 1)
        }
        contact_sheet(out / "sheet.png", list(map(str, range(options.num_generation))), lines)
        there = len(files) * options.num_generation - len(failed)
        print(f"{there} pictures, {len(failed)} could not be drawn: {out / 'pictures.jsonl'}, {out / 'sheet.png'}")


def draw(renderer: JanusRenderer, out: Path, plans: Path, rows: dict[str, Row], batch: int, shown: bool) -> None:
    """Draw what is missing of `rows`, file name -> (text, seed); the plan is written down before its picture."""
    todo = list(missing(out, rows))
    with (
        tqdm(total=len(rows), initial=len(rows) - len(todo), unit="picture", disable=not shown) as bar,
        open(plans, "a", encoding="utf-8") as file,
    ):
        for start in range(0, len(todo), batch):
            names = todo[start : start + batch]
            pictures = renderer.sample(*zip(*(rows[name] for name in names), strict=True))
            there = [(name, picture) for name, picture in zip(names, pictures, strict=True) if picture]
            file.write("".join(json.dumps([name, picture.text], ensure_ascii=False) + "\n" for name, picture in there))
            file.flush()
            for name, picture in there:
                save_png(picture.image, out / name)
            bar.update(len(names))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("reason_inference", lambda: infer(*parse((ReasonOptions,), None, words)))


if __name__ == "__main__":
    sys.exit(main())
