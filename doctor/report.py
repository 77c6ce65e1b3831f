"""The doctor's findings, and the text that shows them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from run.files import size_text

OK, WARNING, PROBLEM, NOT_RUN = "ok", "warning", "problem", "not run"
GB = 10**9
WIDTH = 110


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, its state, what was found, and what the user can do about it."""

    name: str
    state: str
    text: str
    action: str = ""


@dataclass(frozen=True)
class Plan:
    """What the run is planned for.

    Attributes:
        gpus: of the machine.
        memory: bytes of the smallest GPU, or of main memory where there is none.
        processes, zero: of the launch; DeepSpeed's ZeRO stage is 0 without DeepSpeed.
        here: whether this machine is meant.
    """

    gpus: int
    memory: int
    processes: int = 1
    zero: int = 0
    here: bool = True


@dataclass
class Report:
    """All findings; `batch` holds the trainer's batch numbers, `memory` the bytes of the estimate by name."""

    plan: Plan
    checks: list[Check] = field(default_factory=list)
    batch: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return int(any(check.state == PROBLEM for check in self.checks))

    def as_text(self) -> str:
        """A line for each check, the table of memory, and the verdict."""
        lines = [line for check in self.checks for line in _lines(check)]
        if self.memory:
            lines += ["", *_table_lines(self.memory, self.plan)]
        verdict = "This run will not work as it is." if self.exit_code else "Nothing stands in the way."
        for state in (PROBLEM, WARNING):
            if names := dict.fromkeys(check.name for check in self.checks if check.state == state):
                verdict += f" {state.capitalize()}s: {', '.join(names)}."
        return "\n".join([*lines, "", verdict])


def _lines(check: Check) -> list[str]:
    state = "PROBLEM" if check.state == PROBLEM else check.state
    start = f"{state:8s} {check.name:18s} "
    indent = " " * len(start)
    lines = textwrap.wrap(start + check.text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return [*lines, f"{indent}-> {check.action}"] if check.action else lines  # a command stays on one line


def _table_lines(rows: dict[str, int], plan: Plan) -> list[str]:
    total, device = sum(rows.values()), "GPU of each process" if plan.gpus else "main memory"
    unit, name = (GB, "GB") if total >= GB else (10**6, "MB")
    return [
        f"memory, {device}, in {name}: an estimate, ±20 %, not calibrated on a GPU yet",
        *[f"  {row:32s}{count / unit:8.1f}" for row, count in rows.items()],
        f"  {'total, activations not counted':32s}{total / unit:8.1f} {name} of {size_text(plan.memory)}",
    ]
