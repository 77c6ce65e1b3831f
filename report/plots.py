"""The plots of a run as coordinates: metrics of every step -> SVG paths and axes that `report.html.jinja` draws.

A value that is absent is a gap in its line. Nothing is read or written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from matplotlib.ticker import MaxNLocator

from report.terminal import number, thin

PHASES = ("generate", "render", "score", "train")
CURVE_POINTS = 400
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 190, 50, 10, 8, 26  # of a plot, in SVG units
BOX = {"w": WIDTH, "h": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM}

# title, what it means, {metric: label}; the axis starts at zero unless False follows
PANELS = (
    ("Spread within a group", "standard deviation of the reward", {"reward_std": "std"}),
    ("Groups without a signal", "share whose rewards are all equal", {"frac_reward_zero_std": "share"}),
    ("Win rate against the raw prompt", "same noise, 0.5 is no better", {"preference/win_rate_vs_raw": "wins"}),
    (
        "Judges", "shares; an unbiased one prefers the first picture half of the time",
        {"preference/first_position": "first picture won", "preference/ties": "ties",
         "preference/failed_pairs": "failed pairs"},
    ),
    ("Lost samples", "of all rollouts", {"samples/absent": "absent", "rewrites/unreadable": "unreadable answer"}),
    (
        "Rewrites", "shares of the readable ones",
        {"rewrites/overflow": "longer than the renderer reads", "rewrites/copied": "copy of the prompt"},
    ),
    (
        "Variety", "of the rewrites: words changed from the prompt, distinct n-grams of a batch",
        {"rewrites/edit_distance": "edit distance", "rewrites/distinct_1": "n = 1", "rewrites/distinct_2": "n = 2"},
    ),
    (
        "Length in tokens", "the policy's, the renderer's",
        {"completions/mean_length": "completion", "rewrites/tokens": "rewrite"},
    ),
    ("Loss", "GRPO's is near 0 by construction", {"loss": "training", "eval_loss": "validation"}, False),
    ("KL", "from the reference policy", {"kl": "KL"}),
    ("Entropy", "of the policy per token", {"entropy": "entropy"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    ("Seconds a step", "by phase", {f"seconds/{phase}": phase for phase in PHASES}),
)  # fmt: skip
FAMILIES = (  # one plot each of metrics whose names depend on the run's rewards: title, note, pattern, from zero
    ("Held-out scorers", "mean; nothing is trained on them", r"held_out/(.+)/mean", False),
    ("Held-out against the reward", "correlation within groups", r"held_out/(.+)/correlation", False),
    ("Do rewards agree?", "mean correlation with the others, within groups", r"agreement/(.+)", False),
    ("Rewards without a signal", "share of groups scored alike", r"rewards/(.+)/zero_spread", True),
    ("Judge calls that failed", "of a batch, all tries spent", r"(.+)/failed", True),
    ("Judge answers that could not be read", "of a batch", r"(.+)/unparsable", True),
)


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """Centred running mean over a tenth of the run; absent values are left out of it."""
    half = len(values) // 20
    windows = ([v for v in values[max(0, i - half) : i + half + 1] if v is not None] for i in range(len(values)))
    return [sum(window) / len(window) if window else None for window in windows]


def _axes(steps: list[float], marks: list[float]) -> tuple[list[float], dict]:
    """x of every step, and the grid: labelled y and x positions with the map from value to y."""
    first, span = steps[0], (steps[-1] - steps[0]) or 1.0
    xs = [LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / span for step in steps]
    y_of = {mark: _height(mark, marks) for mark in marks}
    ends = sorted({0, len(steps) // 2, len(steps) - 1})
    return xs, {"y": [(y, f"{m:.4g}") for m, y in y_of.items()], "x": [(xs[i], f"{steps[i]:g}") for i in ends]}


def _height(value: float, marks: list[float]) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (marks[-1] - value) / (marks[-1] - marks[0])


def _path(xs: list[float], values: list[float | None], marks: list[float]) -> str:
    """SVG path through the values; a gap where one is absent, a dot where one stands alone."""
    parts, drawing = [], False
    for x, value in zip(xs, values, strict=True):
        if value is not None:
            parts.append(f"{'L' if drawing else 'M'}{x:.1f} {_height(value, marks):.1f}{'' if drawing else 'h0'}")
        drawing = value is not None
    return "".join(parts)


def column(rows: list[dict], key: str) -> list[float | None]:
    """A metric over the steps; None where it is missing or no number."""
    return [number(row.get(key)) for row in rows]


def panel(rows: list[dict], title: str, note: str, keys: dict[str, str], from_zero: bool = True) -> dict | None:
    """One plot with a raw and a smoothed line per metric; None if the run has none of these metrics."""
    columns = {label: column(rows, key) for key, label in keys.items()}
    columns = {label: values for label, values in columns.items() if any(v is not None for v in values)}
    if not columns:
        return None
    columns = {label: thin(values, CURVE_POINTS) for label, values in columns.items()}
    lines = {label: (values, smooth(values)) for label, values in columns.items()}
    known = [v for raw, _ in lines.values() for v in raw if v is not None] + [0.0] * from_zero
    low, high = min(known), max(known)
    high = high if high > low else low + (abs(low) or 1.0)
    marks = MaxNLocator(nbins=5, min_n_ticks=4).tick_values(low, high).tolist()
    xs, grid = _axes(thin([row["step"] for row in rows], CURVE_POINTS), marks)
    series = []
    for label, (raw, soft) in lines.items():
        last = next(value for value in reversed(soft) if value is not None)
        paths = {"raw": _path(xs, raw, marks), "smooth": _path(xs, soft, marks)}
        series.append({"label": label, **paths, "last": f"{last:.3g}"})
    return {"title": title, "note": note, "grid": grid, "series": series}


def progressing(keys: Iterable[str]) -> list[str]:
    """The rewards whose mean can show progress, of a run that logs these metrics: all, but for one case.

    A win rate within the group has the mean 0.5 whatever the policy does; against the raw prompt's picture it has not.
    """
    parts = [match[1] for key in keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))]
    return [part for part in parts if part != "preference" or "preference/win_rate_vs_raw" in keys]


def panels(rows: list[dict]) -> list[dict]:
    """All plots of a run, the reward and its parts first."""
    if not rows:
        return []
    keys = sorted({key for row in rows for key in row})
    wanted = [("Reward", "weighted sum, mean of a step", {"reward": "reward"}, False)]
    for part in sorted(progressing(keys)):
        wanted.append((f"Reward part: {part}", "mean of a step", {f"rewards/{part}/mean": part}, False))
    for title, note, pattern, from_zero in FAMILIES:
        found = {key: match[1] for key in keys if (match := re.fullmatch(pattern, key))}
        named = f"{title}: {next(iter(found.values()))}" if len(found) == 1 else title  # a lone line has no legend
        wanted.append((named, note, found, from_zero))
    plots = [panel(rows, *one) for one in (*wanted, *PANELS)]
    return [plot for plot in plots if plot]
