"""What the doctor found, as lines for a terminal and as plain data."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from doctor.memory import GB, MAIN, OWN, PHASES, Table

OK, WARNING, PROBLEM, NOT_RUN = "ok", "warning", "problem", "not run"
WIDTH = 110


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, how it stands, what was seen, and what to do about it."""

    name: str
    state: str
    text: str
    action: str = ""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for; `here` where that is this machine. Bytes; `memory` is of the smallest GPU."""

    gpus: int
    memory: int | None
    cores: int
    ram: int
    here: bool = True


@dataclass(frozen=True)
class Launch:
    """How the run is started: processes, DeepSpeed's ZeRO stage (0 without DeepSpeed), and whether on GPUs."""

    processes: int
    zero: int
    gpu: bool


@dataclass(frozen=True)
class Advice:
    """Flags that change the options, and the estimate with them."""

    flags: tuple[str, ...]
    tables: tuple[Table, ...]
    note: str = ""


@dataclass
class Report:
    """All that was found; `numbers` are the batch's, `tables` the estimate of memory, `advice` only where it fits."""

    machine: Machine
    launch: Launch
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return int(any(check.state == PROBLEM for check in self.checks))


def capacity(table: Table, machine: Machine) -> int | None:
    """Bytes that a table's device has; None where it is not known."""
    if table.device == MAIN:
        return machine.ram if machine.here else None
    return machine.memory


def fits(tables: Sequence[Table], machine: Machine) -> bool:
    """Whether the fullest phase of every device is within what the device has, as far as that is known."""
    return all((room := capacity(one, machine)) is None or one.fullest[1] <= room for one in tables)


def report(found: Report) -> str:
    """Lines of at most WIDTH columns: a line a check, the table of memory, advice, and the verdict."""
    lines = [line for one in found.checks for line in _lines(one)]
    for table in found.tables:
        lines += ["", *_table_lines(table, found.machine)]
    for advice in found.advice:
        lines += ["", *_advice_lines(advice, found.machine)]
    counts = Counter(one.state for one in found.checks)
    parts = [f"{counts[PROBLEM]} problem(s)", f"{counts[WARNING]} warning(s)"]
    verdict = "this run will not work as it is" if counts[PROBLEM] else "nothing stands in the way"
    return "\n".join([*lines, "", f"{', '.join(parts)}: {verdict}"])


def _lines(one: Check) -> list[str]:
    start = f"{one.state:8s} {one.name:18s} "
    text = one.text if not one.action else f"{one.text} -> {one.action}"
    indent = " " * len(start)
    return textwrap.wrap(start + text, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [start]


def _table_lines(table: Table, machine: Machine) -> list[str]:
    """Shown values are rounded first and then summed, so that the column adds up as it stands."""
    room = capacity(table, machine)
    unit, places, name = (GB, 2, "GB") if max(table.totals) >= 10 * GB else (10**6, 1, "MB")
    shown = [(row.name, [round(count / unit, places) for count in row.bytes]) for row in table.rows]
    totals = [sum(values[phase] for _, values in shown) for phase in range(len(PHASES))]
    lines = [
        f"{f'memory, {device_name(table)}, {name} (estimate)':44s}" + "".join(f"{phase:>12s}" for phase in PHASES)
    ]
    lines += [f"  {row:42s}" + "".join(f"{value:12.{places}f}" for value in values) for row, values in shown]
    lines += ["  " + "-" * (42 + 12 * len(PHASES))]
    lines += [f"  {'total':42s}" + "".join(f"{value:12.{places}f}" for value in totals)]
    if room is not None:
        lines += [f"  {'there is':42s}" + f"{room / unit:12.{places}f}" * len(PHASES)]
    return lines


def _advice_lines(advice: Advice, machine: Machine) -> list[str]:
    lines = textwrap.wrap(
        f"fits with: {' '.join(advice.flags)}", WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False
    )
    for table in advice.tables:
        room = capacity(table, machine)
        totals = ", ".join(f"{phase} {total / GB:.1f}" for phase, total in zip(PHASES, table.totals, strict=True))
        limit = f" of {room / GB:.1f}" if room is not None else ""
        lines.append(f"           {device_name(table)}: {totals}{limit} GB (estimate)")
    return [*lines, *textwrap.wrap(advice.note, WIDTH - 11, initial_indent=" " * 11, subsequent_indent=" " * 11)]


def device_name(table: Table) -> str:
    return "GPU of each process" if table.device == OWN else table.device


def readable(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 10**6:.1f} MB"


def as_json(found: Report) -> dict[str, Any]:
    """The report as plain data; bytes everywhere, and every column of `memory` adds up to its total exactly."""
    return {
        "exit_code": found.exit_code,
        "machine": asdict(found.machine),
        "launch": asdict(found.launch),
        "checks": [asdict(one) for one in found.checks],
        "batch": found.numbers,
        "memory": [_table_data(table, found.machine) for table in found.tables],
        "advice": [
            {
                "flags": list(advice.flags),
                "note": advice.note,
                "memory": [_table_data(table, found.machine) for table in advice.tables],
            }
            for advice in found.advice
        ],
    }


def _table_data(table: Table, machine: Machine) -> dict[str, Any]:
    phase, most = table.fullest
    return {
        "device": table.device,
        "capacity": capacity(table, machine),
        "rows": [{"name": row.name, **dict(zip(PHASES, row.bytes, strict=True))} for row in table.rows],
        "total": dict(zip(PHASES, table.totals, strict=True)),
        "fullest": {"phase": phase, "bytes": most},
    }
