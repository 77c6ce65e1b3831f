"""A run folder -> `report.html`: one page with the curves and the pictures, which opens from disk without a network.

    python -m report.page runs/demo

A section whose file the folder lacks is left out. What is broken (a line that cannot be read, a value that is no
number, a picture that is gone, a sample that is absent) is listed at the top of the page. Rewrites are adversarial
text, so everything goes through Jinja's autoescaping, and pictures are only read from inside the run folder. The same
files give the same bytes.

A program that measures a run may add `summary.json`, with any of
    table     {"title", "note", "columns", "rows": [{"name", "label", "mean", "ci95", "cells", "main"}]}; a mean or a
              cell is null where nothing was measured; the main row stands out
    figures   label -> text, to be read first
    rollouts, rollouts_per_second, seconds: {"total", and of each phase}
and `gallery.jsonl`, a row per prompt: prompt, task, and for "raw", "start", "trained" and other names of the table's
image, correct and, if it was drawn from one, rewrite.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from PIL import Image

from errors import UserError
from report.plots import COLOURS, CURVE_POINTS, PHASES, column, panels, spread
from report.terminal import number, print_anywhere

SIDES = {"raw": "raw prompt", "start": "policy before", "trained": "policy after"}  # of the gallery
GALLERY_ROWS = 24  # half of them folded away
EVALUATIONS, WATCHED = 6, 8  # columns and rows of the pictures through training
GROUPS_PER_STEP, PICTURES_PER_ROLLOUT = 3, 2
LARGE = 288  # pixels, beyond which a picture is shrunk


class Folder:
    """Reads a run folder and remembers in `notes` all that could not be read."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.notes: list[str] = []
        self.pictures = dict.fromkeys(("picture missing", "picture refused"), 0)

    def record(self, name: str) -> dict:
        """The JSON object in file `name`; empty if there is no such file."""
        return next(iter(self.rows(name, whole=True)), {})

    def rows(self, name: str, whole: bool = False) -> list[dict]:
        """The JSON objects in the lines of file `name`, or that of the `whole`; empty if there is no such file."""
        path = self.root / name
        text = path.read_text("utf-8", "replace") if path.is_file() else ""
        parts = {line: part for line, part in enumerate([text] if whole else text.split("\n"), 1) if part.strip()}
        objects = {line: _json_object(part) for line, part in parts.items()}
        broken = [line for line, value in objects.items() if value is None]
        if broken:
            left_out = f"{len(broken)} records are left out because they are no JSON objects"
            self.notes.append(f"{name}: {left_out}, the first in line {broken[0]}.")
        return [value for value in objects.values() if value is not None]

    def picture(self, name: str | None) -> dict:
        """{"src": data URI} of a picture, or {"why": what stands in its place}."""
        if name is None:
            return {"src": None, "why": "not drawn"}
        why = "picture missing"
        try:
            path = (self.root / str(name)).resolve()
            if not path.is_relative_to(self.root):
                why = "picture refused"
            elif path.is_file():
                return {"src": data_uri(_jpeg(path), "jpeg"), "why": ""}
        # a path with a null byte is a ValueError, a damaged PNG a SyntaxError
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            pass
        self.pictures[why] += 1
        return {"src": None, "why": why}


def _json_object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _jpeg(path: Path) -> bytes:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", optimize=True, quality=90, subsampling=0)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """An image, of a kind such as "jpeg", as an address that holds all of it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def rollout_steps(folder: Folder) -> list[dict]:
    """Best and worst of some groups, at the first and at the last step that has pictures."""
    names = sorted(path.name for path in (folder.root / "rollouts").glob("step_*.jsonl"))
    first = next((name for name in names if _drawn(folder, name)), None)
    if first is None:
        folder.notes += ["No rollout has a picture."] if names else []
        return []
    last = next(name for name in reversed(names) if _drawn(folder, name))
    steps = []
    for name in dict.fromkeys((first, last)):
        groups = _drawn(folder, name)
        shown = [_group(folder, rows) for rows in groups[:GROUPS_PER_STEP]]
        rewritten = any(end["rewritten"] for group in shown for end in group["ends"])
        steps.append({"step": _step_of(name), "groups": shown, "of": len(groups), "rewritten": rewritten})
    return steps


def _step_of(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _drawn(folder: Folder, name: str) -> list[list[dict]]:
    """The groups of a step's file that have a picture."""
    groups: dict[str, list[dict]] = {}
    for row in folder.rows(f"rollouts/{name}"):
        groups.setdefault(_key(row), []).append(row)
    return [rows for rows in groups.values() if any(image for row in rows for image in row.get("images") or ())]


def _key(row: dict) -> str:
    return str(row.get("prompt_id", row.get("prompt")))


def _group(folder: Folder, rows: list[dict]) -> dict:
    scored = sorted((row for row in rows if number(row.get("total")) is not None), key=lambda row: -row["total"])
    ends = []
    for label, row in zip(("best", "worst"), [scored[0], scored[-1]] if len(scored) > 1 else scored, strict=False):
        pictures = [folder.picture(name) for name in (row.get("images") or [None])[:PICTURES_PER_ROLLOUT]]
        rewritten = bool(row.get("completion")) or row.get("rewrite") != row.get("prompt")
        ends.append({**row, "label": label, "pictures": pictures, "rewritten": rewritten})
    unreadable = sum(row.get("rewrite") is None for row in rows)
    return {"rows": rows, "absent": len(rows) - len(scored), "unreadable": unreadable, "ends": ends}


def through_training(folder: Folder) -> dict | None:
    """Some prompts, each drawn from the same noise at some evaluations, from the first to the last."""
    names = sorted(path.name for path in (folder.root / "evaluations").glob("step_*.jsonl"))
    files = {_step_of(name): folder.rows(f"evaluations/{name}") for name in spread(names, EVALUATIONS)}
    drawn = {step: {_key(row): row for row in rows} for step, rows in files.items()}
    prompts = {key: row for rows in reversed(drawn.values()) for key, row in rows.items()}
    scorers = sorted({name for rows in files.values() for row in rows for name in row.get("wins") or ()})
    shown = [
        {**row, "cells": [_seen(folder, step, rows.get(_key(row), {})) for step, rows in drawn.items()]}
        for row in _in_turns(prompts.values())[:WATCHED]
    ]
    return {"rows": shown, "of": len(prompts), "evaluations": len(names), "scorers": scorers} if shown else None


def _seen(folder: Folder, step: int, row: dict) -> dict:
    wins = [win for win in map(number, (row.get("wins") or {}).values()) if win is not None]
    compared = len(wins) if step else 0  # step 0 is what the others are compared with
    return {"step": step, "picture": folder.picture(row.get("image")), "won": sum(wins), "compared": compared}


def _in_turns(rows: Iterable[dict]) -> list[dict]:
    """The first of every task, whatever their outcome, then the second of every task, and so on."""
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(str(row.get("task") or ""), []).append(row)
    return [row for turn in zip_longest(*by_task.values()) for row in turn if row is not None]


def gallery(folder: Folder, sides: Iterable[str]) -> dict | None:
    """Held-out prompts as each of `sides` drew them, such as before and after training."""
    rows = folder.rows("gallery.jsonl")
    shown = _in_turns(rows)[:GALLERY_ROWS]
    for row in shown:
        there = {name: row[name] for name in sides if row.get(name)}
        row["sides"] = {name: {**side, "picture": folder.picture(side.get("image"))} for name, side in there.items()}
    outcome = [tuple((row.get(name) or {}).get("correct") for name in ("start", "trained")) for row in rows]
    changed = {"gained": outcome.count((False, True)), "lost": outcome.count((True, False))}
    changed["rewritten"] = any("rewrite" in side for row in shown for side in row["sides"].values())
    return {"cards": shown, "unfolded": GALLERY_ROWS // 2, "of": len(rows), **changed} if rows else None


def logged_steps(folder: Folder) -> list[dict]:
    """One row a step, in order: what is logged twice for a step (a resumed run, a closing summary) is merged."""
    merged: dict[float, dict] = {}
    for row in folder.rows("metrics.jsonl"):
        if (step := number(row.get("step"))) is not None:
            merged.setdefault(step, {}).update(row, step=step)
        else:
            folder.notes.append("metrics.jsonl: a row without a step is left out.")
    return [merged[step] for step in sorted(merged)]


def _share(rows: list[dict], key: str, what: str) -> list[str]:
    known = {row["step"]: value for row in rows if (value := number(row.get(key))) is not None}
    if not any(known.values()):
        return []
    step, mean, hit = max(known, key=known.get), fmean(known.values()), sum(value > 0 for value in known.values())
    worst = f"{known[step]:.1%} at worst (step {step:g})"
    return [f"{what}: {mean:.2%} on average, {worst}, in {hit} of {len(known)} steps."]


def trouble(folder: Folder, rows: list[dict], run: dict) -> list[str]:
    """All that went wrong, in sentences, the gravest first."""
    found = _share(rows, "samples/absent", "Absent samples, left out of their groups")
    found += _share(rows, "rewrites/unreadable", "Answers that could not be read, not drawn")
    found += _share(rows, "rewrites/overflow", "Rewrites cut because the renderer reads no further")
    for key in sorted({key for row in rows for key in row}):
        bad = [row["step"] for row in rows if key in row and number(row[key]) is None]
        if bad:
            found.append(f"{key} is not a number in {len(bad)} of {len(rows)} steps, first in step {bad[0]:g}.")
    planned = number((run.get("config") or {}).get("max_steps")) or 0
    if rows and rows[-1]["step"] < planned:
        found.append(f"The log ends at step {rows[-1]['step']:g} of {planned:g}.")
    found += [f"{count} × {why}." for why, count in folder.pictures.items() if count]
    return found + list(dict.fromkeys(folder.notes))


def _tiles(rows: list[dict], summary: dict) -> list[tuple[str, str]]:
    """The figures to be read first: (label, value) pairs."""
    tiles = list((summary.get("figures") or {}).items())
    rewards = [value for value in column(rows, "reward") if value is not None]
    if rewards:
        ends = max(1, len(rewards) // 10)
        first, last = fmean(rewards[:ends]), fmean(rewards[-ends:])
        tiles.append((f"reward, first → last {ends} step{'s' * (ends > 1)}", f"{first:.3f} → {last:.3f}"))
    logged = [value for value in column(rows, "seconds_since_start") if value is not None]
    seconds = number((summary.get("seconds") or {}).get("total")) or max(logged, default=None)
    for label, key, form in (("rollouts", "rollouts", ",.0f"), ("rollouts a second", "rollouts_per_second", ".3g")):
        if (value := number(summary.get(key))) is not None:
            tiles.append((label, f"{value:{form}}"))
    return [*tiles, ("minutes", f"{seconds / 60:.1f}")] if seconds else tiles


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder from whatever of the run's files is there; returns its path."""
    if not run_dir.is_dir():
        raise UserError(f"no run folder at {run_dir}: name the --outdir of a training run, e.g. runs/demo")
    folder = Folder(run_dir)
    run, summary = folder.record("run.json"), folder.record("summary.json")
    rows, table = logged_steps(folder), summary.get("table")
    sides = SIDES | {row["name"]: row["label"] for row in (table or {}).get("rows", ()) if "name" in row}
    page = _template("report.html.jinja").render(
        title=folder.root.name,
        run=run,
        tiles=_tiles(rows, summary),
        seconds={phase: number(s) for phase, s in (summary.get("seconds") or {}).items() if number(s)},
        phases=PHASES,
        colours=COLOURS,
        panels=panels(rows),
        steps=len(rows),
        curve_points=CURVE_POINTS,
        gallery=gallery(folder, sides),
        sides=sides,
        through=through_training(folder),
        rollouts=rollout_steps(folder),
        table=table,
        trouble=trouble(folder, rows, run),  # the last, because all reading adds notes
    )
    path = run_dir / "report.html"
    path.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate in a completion is no reason to fail
    return path


def write_card(run_dir: Path, folder: Path, *, base: str, name: str = "", kind: str = "rewriter", **more) -> None:
    """Write README.md into a folder of trained weights: what a hub shows of them.

    Args:
        base: what the run started from.
        kind: "rewriter", "image model" or "janus".
        more: step, tags, metrics or table, and what scripts/export.py knows.
    """
    run = Folder(run_dir).record("run.json")
    on_hub = base.count("/") == 1 and not Path(base).exists()  # as a base model a hub takes its own names only
    more = {"adapter": (folder / "adapter_config.json").is_file(), "metrics": {}, "exported": False, **more}
    card = _template("README.md.jinja").render(
        run=run, config=run["config"], base=base, on_hub=on_hub, kind=kind, name=name or run_dir.resolve().name, **more
    )
    (folder / "README.md").write_bytes(f"{card}\n".encode("utf-8", "replace"))


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"json": json.dumps, "number": number, "data_uri": data_uri}
    return environment.get_template(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m report.page", description="Write report.html of a run.")
    parser.add_argument("run_dir", type=Path, help="the run folder, e.g. runs/demo")
    print_anywhere()
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as error:
        parser.error(str(error))
