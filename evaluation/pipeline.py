"""items -> pictures -> verdicts -> rows, unit by unit; the table is made from the rows.

A unit is a few prompts with all their samples, made by one system and judged in one batch. Units depend on the list of
prompts alone, so neither an interruption nor the number of processes changes a batch, a score or the table. Each of n
processes takes every n-th unit, writes its rows at once, and has a file of its own. A row with a part that could not
be judged is not finished: on resume its picture is judged again; where there is none, its unit is drawn again.

    OUT/settings.json        what the rows depend on; another run's folder is refused
    OUT/rows_R.jsonl         a row per picture: prompt, final_prompt, seed, image, verdict
    OUT/images/SYSTEM/       ID_SAMPLE.png; no name comes from a prompt
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from errors import UserError
from evaluation.benchmark import Benchmark, Item, Verdict
from evaluation.layouts import picture
from evaluation.systems import Drawn, System
from run.files import check_settings, complete_lines, save_png, write_settings
from run.seeds import render_seed

Row = dict[str, Any]
UNDRAWN = Verdict({}, absent=["could not be drawn, or not scored by the reward that chooses"])


class Evaluation:
    """One run of one benchmark over several systems.

    Args:
        out: folder of the run.
        settings: all that a row depends on, JSON-able.
        items: prompts.
        samples: pictures a prompt.
        seed: of the noise, the same for all systems.
        unit: prompts drawn and judged together.
        share: (i, n): this process makes every n-th unit, from the i-th on.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], items: Sequence[Item], samples: int, seed: int, unit: int,
        share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        if not (out / "settings.json").exists() and out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} is not empty and has no settings.json: name another folder")
        check_settings(out / "settings.json", settings)
        self.out, self.settings, self.items, self.samples, self.seed = out, settings, list(items), samples, seed
        self.units = [self.items[i : i + unit] for i in range(0, len(self.items), unit)]
        self.share = share

    def open(self) -> None:
        """Make the folder; for one process."""
        (self.out / "images").mkdir(parents=True, exist_ok=True)
        write_settings(self.out / "settings.json", self.settings)

    def run(self, name: str, system: System, benchmark: Benchmark) -> None:
        """Make, judge and write down what is not finished of one system in this process's units."""
        known = {(row["id"], row["sample"]): row for row in self.rows(name)}
        counts = Counter(row["unit"] for row in known.values() if finished(row))
        first, step = self.share
        share = range(first, len(self.units), step)
        todo = [n for n in share if counts[n] < len(self.units[n]) * self.samples]
        (self.out / "images" / name).mkdir(parents=True, exist_ok=True)
        with open(self.out / f"rows_{first}.jsonl", "a", encoding="utf-8") as file:
            for n in tqdm(todo, desc=f"{benchmark.title}: {name}", unit="unit", disable=first > 0):
                file.write("".join(json.dumps(row) + "\n" for row in self._unit(n, name, system, benchmark, known)))
                file.flush()

    def verdicts(self, name: str) -> dict[str, list[Verdict]]:
        """Item id -> its verdicts in the order of the samples."""
        found: dict[str, list[Verdict]] = {item.id: [] for item in self.items}
        for row in self.rows(name):
            found[row["id"]].append(Verdict(row["parts"], row["detail"]))
        return found

    def rows(self, name: str) -> list[Row]:
        """All rows of one system, of all processes, in the order of prompts and samples; of each the best attempt."""
        place = {item.id: i for i, item in enumerate(self.items)}
        files = sorted(self.out.glob("rows_*.jsonl"))
        mine = f"rows_{self.share[0]}.jsonl"
        read = [json.loads(line) for path in files for line in complete_lines(path, cut=path.name == mine)]
        attempts = sorted(read, key=lambda row: (finished(row), row["image"] is not None))
        rows = {(place[row["id"]], row["sample"]): row for row in attempts if row["system"] == name}
        return [row for _, row in sorted(rows.items())]

    def _unit(self, n: int, name: str, system: System, benchmark: Benchmark, known: Mapping[Any, Row]) -> list[Row]:
        """The unit's rows that are not finished among the `known`, which are by item id and sample."""
        pairs = [(item, k) for item in self.units[n] for k in range(self.samples)]
        rows = [known.get((item.id, k), {}) for item, k in pairs]
        drawn = [self._drawn(row) for row in rows]
        if None in drawn:
            new = system(self.units[n], range(self.samples), self._seed_of)
            drawn = [one or again for one, again in zip(drawn, new, strict=True)]
        todo = [(*pair, one) for pair, row, one in zip(pairs, rows, drawn, strict=True) if not finished(row)]
        there = [(item, one.image) for item, _, one in todo if one.image is not None]
        judged = iter(benchmark.judge(*zip(*there, strict=True)) if there else ())
        return [self._row(n, name, *one, UNDRAWN if one[-1].image is None else next(judged)) for one in todo]

    def _drawn(self, row: Row) -> Drawn | None:
        """What an earlier run drew; None if its picture is not there."""
        if not row.get("image") or not (path := self.out / row["image"]).is_file():
            return None
        return Drawn(row["final_prompt"], row["readable"], picture(path), row["pictures"], row["seconds"])

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
            "detail": dict(verdict.detail), "absent": list(verdict.absent),
        }  # fmt: skip

    def _seed_of(self, item: Item, sample: int) -> int:
        return render_seed(self.seed, item.prompt.id, 0, sample)


def finished(row: Row) -> bool:
    """Whether a row is there, its picture could be drawn and all its parts were judged."""
    scores = [score for scores in row.get("parts", {}).values() for score in scores]
    return bool(scores) and None not in scores
