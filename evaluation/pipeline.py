"""items -> pictures -> verdicts -> rows, unit by unit; rows are the source of truth, and what a table is made from.

A unit is a few prompts with all their samples, made by one system and judged in one batch. Units are cut from the
list of prompts alone, so neither an interruption nor the number of processes changes a batch, a score or the table. A
unit's rows are written at once; a unit that a kill tore is made again. Of several processes each takes every n-th unit
and writes a file of its own.

    OUT/settings.json        what the rows depend on; another run's folder is refused
    OUT/rows_R.jsonl         a row per picture: prompt, final_prompt, seed, image, verdict
    OUT/images/SYSTEM/       ID_SAMPLE.png; no name comes from a prompt
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from errors import UserError
from evaluation.benchmark import Benchmark, Item, Verdict
from evaluation.systems import Drawn, System
from run.files import atomic_write, complete_lines, differences, save_png
from run.seeds import render_seed

Row = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """This process of `count`."""

    index: int = 0
    count: int = 1


class Evaluation:
    """One run of one benchmark over several systems.

    Args:
        out: folder of the run.
        settings: all that a row depends on, JSON-able.
        items: prompts.
        samples: pictures a prompt.
        seed: of the noise, the same for all systems.
        unit: prompts drawn and judged together.
        share: which units are this process's.

    Raises:
        UserError: `out` holds another run.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], items: Sequence[Item], samples: int, seed: int, unit: int,
        share: Share,
    ):  # fmt: skip
        self.out, self.items, self.samples, self.seed, self.share = out, list(items), samples, seed, share
        self.units = [self.items[i : i + unit] for i in range(0, len(self.items), unit)]
        _check_settings(out, settings)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder; for one process."""
        (self.out / "images").mkdir(parents=True, exist_ok=True)
        atomic_write(self.out / "settings.json", json.dumps(settings, indent=1, sort_keys=True).encode())

    def run(self, name: str, system: System, benchmark: Benchmark) -> None:
        """Make, judge and write down this process's units of one system that are not there yet."""
        done = self._whole_units(name)
        mine = [n for n in range(len(self.units)) if n % self.share.count == self.share.index and n not in done]
        (self.out / "images" / name).mkdir(parents=True, exist_ok=True)
        quiet = self.share.index > 0
        with open(self.out / f"rows_{self.share.index}.jsonl", "a", encoding="utf-8") as file:
            for n in tqdm(mine, desc=f"{benchmark.title}: {name}", unit="unit", disable=quiet):
                file.write("".join(json.dumps(row) + "\n" for row in self._unit(n, name, system, benchmark)))
                file.flush()

    def verdicts(self, name: str) -> dict[str, list[Verdict]]:
        """Item id -> its verdicts in the order of the samples.

        Raises:
            UserError: rows are missing.
        """
        found: dict[str, list[Verdict]] = {item.id: [] for item in self.items}
        for row in self.rows(name):
            found[row["id"]].append(Verdict(row["parts"], row["detail"]))
        short = [id for id, of in found.items() if len(of) != self.samples]
        if short:
            raise UserError(
                f"{self.out}: {name} lacks rows of {len(short)} prompts, the first {short[0]}: run it again"
            )
        return found

    def rows(self, name: str) -> list[Row]:
        """All rows of one system, of all processes, in the order of prompts and samples; each once."""
        place = {item.id: i for i, item in enumerate(self.items)}
        rows = {(place[row["id"]], row["sample"]): row for row in self._read() if row["system"] == name}
        return [row for _, row in sorted(rows.items())]

    def _unit(self, n: int, name: str, system: System, benchmark: Benchmark) -> list[Row]:
        pairs = [(item, k) for item in self.units[n] for k in range(self.samples)]
        drawn = system(self.units[n], range(self.samples), self._seed_of)
        there = [(item, one) for (item, _), one in zip(pairs, drawn, strict=True) if one.image is not None]
        judged = iter(benchmark.judge([item for item, _ in there], [one.image for _, one in there]) if there else ())
        rows = []
        for (item, k), one in zip(pairs, drawn, strict=True):
            verdict = _undrawn(item) if one.image is None else next(judged)
            rows.append(self._row(n, name, item, k, one, verdict))
        return rows

    def _row(self, n: int, name: str, item: Item, sample: int, drawn: Drawn, verdict: Verdict) -> Row:
        image = None
        if drawn.image is not None:
            image = f"images/{name}/{item.id}_{sample}.png"
            save_png(drawn.image, self.out / image)
        return {
            "system": name, "unit": n, "id": item.id, "sample": sample, "category": item.category,
            "prompt": item.prompt.text, "final_prompt": drawn.text, "readable": drawn.readable,
            "seed": self._seed_of(item, sample), "image": image, "pictures": drawn.pictures,
            "seconds": round(drawn.seconds, 4), "parts": {k: list(v) for k, v in verdict.parts.items()},
            "detail": dict(verdict.detail),
        }  # fmt: skip

    def _seed_of(self, item: Item, sample: int) -> int:
        return render_seed(self.seed, item.prompt.id, 0, sample)

    def _whole_units(self, name: str) -> set[int]:
        counts: dict[int, int] = {}
        for row in self.rows(name):
            counts[row["unit"]] = counts.get(row["unit"], 0) + 1
        return {n for n, unit in enumerate(self.units) if counts.get(n, 0) == len(unit) * self.samples}

    def _read(self) -> Iterator[Row]:
        for path in sorted(self.out.glob("rows_*.jsonl")):
            for line in complete_lines(path, cut=path.name == f"rows_{self.share.index}.jsonl"):
                yield json.loads(line)


def unjudged(rows: Sequence[Row]) -> list[Row]:
    """Rows with a part that could not be judged: they count as failures, and are listed."""
    return [row for row in rows if any(score is None for scores in row["parts"].values() for score in scores)]


def _undrawn(item: Item) -> Verdict:
    return Verdict({item.category: [None]}, {"reason": "could not be drawn"})


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / "settings.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} is not empty and holds no evaluation: name another folder")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): name another --out") from error
    if changed := differences(old, json.loads(json.dumps(settings))):
        raise UserError(f"--out {out} holds another evaluation ({changed}): name another folder")


def open_picture(path: Path) -> Image.Image:
    """A picture from disk as RGB, upright.

    Raises:
        UserError: it is none.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is no picture ({error}): draw it again, or leave it out") from error
