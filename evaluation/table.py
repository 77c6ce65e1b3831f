"""The table that a person reads: systems side by side, with intervals, and what may be concluded from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluation.pipeline import Row, unjudged
from evaluation.statistics import OVERALL, Estimate, Table

NOTHING = "no difference seen"


def text_table(title: str, table: Table) -> str:
    """Aligned columns: a row per category, per system its value ± half its interval, then the differences."""
    systems, categories = list(table.scores), [*table.points, OVERALL]
    header = [title, "n", *systems]
    rows = [
        [name, str(table.points.get(name, "")), *(_value(table.scores[system][name]) for system in systems)]
        for name in categories
    ]
    lines = _aligned([header, *rows], ruled=(0, len(rows) - 1))
    for system, differences in table.differences.items():
        lines += ["", f"{system} minus {systems[0]}, on the same prompts and noise"]
        width = max(map(len, categories))
        lines += [f"  {name.ljust(width)}  {difference(differences[name])}" for name in categories]
    return "\n".join(lines)


def difference(estimate: Estimate) -> str:
    """ "+0.123 [0.045, 0.201]"; an interval that contains zero is no difference, whatever its middle."""
    shown = f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{shown}  {NOTHING}" if estimate.is_zero else shown


def cost(rows: Sequence[Row]) -> dict[str, float]:
    """What a system spent on a prompt, and how many of its rows came to nothing."""
    prompts = len({row["id"] for row in rows})
    undrawn = sum(row["image"] is None for row in rows)
    return {
        "pictures": sum(row["pictures"] for row in rows) / prompts,
        "seconds": sum(row["seconds"] for row in rows) / prompts,
        "rows": len(rows),
        "unreadable": sum(not row["readable"] for row in rows),
        "undrawn": undrawn,
        "not_judged": len(unjudged(rows)) - undrawn,
    }


def cost_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    """System -> `cost`, as aligned columns."""
    lines = [["cost per prompt", "pictures", "seconds", "unreadable answers", "could not be drawn", "not judged"]]
    for system, of in costs.items():
        spent = [f"{of['pictures']:.2f}", f"{of['seconds']:.3f}", f"{of['unreadable']} of {of['rows']}"]
        lines.append([system, *spent, str(of["undrawn"]), str(of["not_judged"])])
    return "\n".join(_aligned(lines, ruled=(0,)))


def _value(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"


def _aligned(rows: Sequence[Sequence[str]], ruled: Sequence[int] = ()) -> list[str]:
    """Columns padded to their widest cell, the first to the left; a rule under each row in `ruled`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        lines.append("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())
        if i in ruled:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines
