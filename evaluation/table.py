"""The table that a person reads: systems side by side, with intervals, and what may be concluded from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from clients.chat import UNREADABLE
from evaluation.pipeline import Row, finished
from evaluation.statistics import OVERALL, Estimate, Table
from report.terminal import aligned

NOTHING = "no difference seen"
MOST_ABSENT = 0.01  # share of a system's pictures that may lack a verdict without a warning
REASONS, REASON = 3, 120  # of why they do: how many are told, and the most characters of one


def text_table(title: str, table: Table) -> str:
    """Aligned columns: a row per category, per system its value ± half its interval, then the differences."""
    systems, categories = list(table.scores), [*table.points, OVERALL]
    header = [title, "n", *systems]
    rows = [[name, *_cells(table, name)] for name in categories]
    lines = aligned([header, *rows], ruled=(0, len(rows) - 1))
    for system, differences in table.differences.items():
        lines += ["", f"{system} minus {systems[0]}, on the same prompts and noise, judged of both"]
        width = max(map(len, categories))
        lines += [f"  {name.ljust(width)}  {difference(of)}" for name, of in differences.items()]
    return "\n".join(lines)


def difference(estimate: Estimate) -> str:
    """ "+0.123 [0.045, 0.201]"; an interval that contains zero is no difference, whatever its middle."""
    shown = f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{shown}  {NOTHING}" if estimate.low <= 0 <= estimate.high else shown


def cost(rows: Sequence[Row]) -> dict[str, float]:
    """What a system spent on a prompt, and how many of its rows came to nothing."""
    prompts = len({row["id"] for row in rows})
    undrawn = sum(row["image"] is None for row in rows)
    unreadable = sum(any(reason.startswith(UNREADABLE) for reason in row.get("absent", ())) for row in rows)
    return {
        "pictures": sum(row["pictures"] for row in rows) / prompts,
        "seconds": sum(row["seconds"] for row in rows) / prompts,
        "rows": len(rows),
        "unreadable": sum(not row["readable"] for row in rows),
        "undrawn": undrawn,
        "unreadable_verdicts": unreadable,
        "not_judged": sum(not finished(row) for row in rows) - undrawn - unreadable,
    }


def cost_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    """System -> `cost`, as aligned columns."""
    lost = {"undrawn": "could not be drawn", "unreadable_verdicts": "unreadable verdicts", "not_judged": "not judged"}
    lines = [["cost per prompt", "pictures", "seconds", "unreadable answers", *lost.values()]]
    for system, of in costs.items():
        spent = [f"{of['pictures']:.2f}", f"{of['seconds']:.3f}", f"{of['unreadable']} of {of['rows']}"]
        lines.append([system, *spent, *(str(of[name]) for name in lost)])
    return "\n".join(aligned(lines, ruled=(0,)))


def absences(system: str, rows: Sequence[Row]) -> str:
    """How many of a system's pictures lack a verdict, and the commonest reasons; "" if the share is small."""
    lost = sum(not finished(row) for row in rows)
    reasons = Counter(reason[:REASON] for row in rows for reason in row.get("absent", ())).most_common(REASONS)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    text = f"{lost} of {len(rows)} pictures of {system} lack a verdict or a part of it, in no mean ({told}): mend that"
    return f"{text} and run the same command again" if lost > MOST_ABSENT * len(rows) else ""


def _cells(table: Table, name: str) -> list[str]:
    """A category's n, of each system where they differ, and its value in each system; OVERALL is made of means."""
    found = [of.get(name) for of in table.scores.values()]
    counts = ["" if name == OVERALL else str(one.n if one else 0) for one in found]
    values = [f"{one.value:.3f} ± {(one.high - one.low) / 2:.3f}" if one else "not judged" for one in found]
    return ["/".join(counts if len(set(counts)) > 1 else counts[:1]), *values]
