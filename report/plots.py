"""The plots of a run: metrics of every step -> SVG images. The page adds titles and legends.

A value that is absent is a gap in its line, but for what is measured now and then: its values are joined. Nothing is
read or written here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TypeVar

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from report.terminal import number, thin

PHASES = ("generate", "render", "score", "train")
Item = TypeVar("Item")
CURVE_POINTS = 200
LINES = 8  # of a plot; of more, such as one for each denoising step, some are shown
EACH = r"((?:step|level)_\d+)"  # denoising step or noise level
PART = rf"(?:{EACH}|(plan|image))"
GREY = "#8a8780"
COLOURS = (  # to be told apart on a white page and on a black one
    "#3d85c6", "#d9822b", "#35a583", "#9673c9", GREY, "#c7608f", "#a8952f", "#33a3b9", "#6f9d3a", "#c25555",
)  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "the same lines give the same bytes", "font.size": 8, "axes.grid": True,
    "figure.figsize": (4.2, 1.9), "figure.subplot.left": 0.13, "figure.subplot.right": 0.98,
    "figure.subplot.bottom": 0.22, "figure.subplot.top": 0.9, "axes.formatter.useoffset": False,
    "axes.edgecolor": "none", "grid.color": GREY, "grid.alpha": 0.3, "axes.labelcolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY,
}  # fmt: skip

# title, what it means, pattern of its metrics, whether the axis shows zero; a line has the name of its metric in
# metrics.jsonl, or what the pattern has in parentheses
PANELS = (
    ("Win rate against the untrained model", "same noise, 0.5 is no better", r"win_rate/(.+)", True),
    (
        "Scores of the evaluation",
        "mean; the same prompts and noise each time",
        r"eval/(.+)/mean|eval/(understanding)",
        False,
    ),
    ("Held-out scorers", "mean; nothing is trained on them", r"held_out/(.+)/mean", False),
    ("Held-out against the reward", "correlation within groups", r"held_out/(.+)/correlation", False),
    ("Do rewards agree?", "mean correlation with the others, within groups", r"agreement/(.+)", False),
    ("Rewards without a signal", "share of groups scored alike", r"rewards/(.+)/zero_spread", True),
    ("Judge calls that failed", "of a batch, all tries spent", r"(.+)/failed", True),
    ("Judge answers that could not be read", "of a batch", r"(.+)/unparsable", True),
    ("Spread within a group", "standard deviation of the reward", "reward_std", True),
    ("Groups without a signal", "share whose rewards are all equal", "frac_reward_zero_std", True),
    ("Groups that chance explains", "share whose win rates differ no more", r"groups/(.+)_by_chance", True),
    ("Win rate against the raw prompt", "same noise, 0.5 is no better", "preference/win_rate_vs_raw", True),
    ("First picture won", "share; an unbiased judge has 0.5", "preference/first_position", True),
    ("Pairs without a winner", "shares", "preference/(ties|failed_pairs)", True),
    ("Lost samples", "shares of all rollouts", "samples/absent|rewrites/unreadable", True),
    ("Rewrites", "shares: not read to their end, same as the prompt", "rewrites/(overflow|copied)|(plans/cut)", True),
    ("Variety", "words changed from the prompt, distinct n-grams", r"rewrites/(edit_distance|distinct_\d)", True),
    ("Length in tokens", "the policy's, the renderer's", "completions/mean_length|rewrites/tokens|plans/tokens", True),
    ("Loss", "GRPO's is near 0 by construction", "loss|eval_loss", False),
    ("KL", "from the reference policy", r"kl(?:/(plan|image))?", True),
    ("Entropy", "of the policy per token", r"entropy(?:/(plan|image))?", True),
    ("Gradient norm", "before clipping", "grad_norm", True),
    ("Ratio", "new policy over old, by step, noise level, or part", f"ratio/{PART}", False),
    ("Clipped", "share, by step, noise level, or part", f"clipped/{PART}", True),
    ("KL by step", "from the old policy; levels: squared velocity error", f"kl/{EACH}", True),
    ("Gradient by step", "or noise level; its norm at the velocity", f"gradient/{EACH}", True),
    ("Norm of the output", "root mean square; --max_drift bounds its change", "output_norm", False),
    ("Replay gap", "log-probabilities computed again, largest difference", "replay_gap", True),
    ("Seconds a step", "by phase", f"seconds/({'|'.join(PHASES)})", True),
)


def column(rows: list[dict], key: str) -> list[float | None]:
    """A metric over the steps; None where it is missing or no number."""
    return [number(row.get(key)) for row in rows]


def progressing(keys: Iterable[str]) -> list[str]:
    """The rewards whose mean can show progress, of a run that logs these metrics: all, but for one case.

    A win rate within the group has the mean 0.5 whatever the policy does; against the raw prompt's picture it has not.
    """
    parts = [match[1] for key in keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))]
    return [part for part in parts if part != "preference" or "preference/win_rate_vs_raw" in keys]


def panels(rows: list[dict]) -> list[dict]:
    """All plots of a run, the reward and its parts first.

    Each has a title, a note, its SVG as bytes, and lines: label, colour, values, running mean, the last value of that.
    """
    columns = {key: column(rows, key) for key in sorted({key for row in rows for key in row})}
    columns = {key: thin(values, CURVE_POINTS) for key, values in columns.items() if values.count(None) < len(values)}
    steps = thin([row["step"] for row in rows], CURVE_POINTS)
    wanted = [("Reward", "weighted sum, mean of a step", "reward", False)]
    for part in progressing(columns):
        wanted.append((f"Reward part: {part}", "mean of a step", f"rewards/({re.escape(part)})/mean", False))
    plots = []
    for title, note, pattern, from_zero in (*wanted, *PANELS):
        matches = [match for key in columns if (match := re.fullmatch(pattern, key))]
        lines, shown = [], spread(matches, LINES)
        note += f"; {len(shown)} of {len(matches)} lines" if len(shown) < len(matches) else ""
        for match, colour in zip(shown, cycle(COLOURS), strict=False):
            values = columns[match[0]]
            mean = joined(values) if 2 * values.count(None) > len(values) else smooth(values)
            last = next(value for value in reversed(mean) if value is not None)
            label = match[match.lastindex or 0]
            lines.append({"label": label, "colour": colour, "values": values, "mean": mean, "last": f"{last:.3g}"})
        if lines:
            plots.append({"title": title, "note": note, "svg": draw(steps, lines, from_zero), "lines": lines})
    return plots


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` (2 or more) of them, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def joined(values: list[float | None]) -> list[float | None]:
    """Straight lines from each value that is there, of one or more, to the next."""
    known = [i for i, value in enumerate(values) if value is not None]
    line = np.interp(range(known[0], known[-1] + 1), known, [values[i] for i in known]).tolist()
    return [*[None] * known[0], *line, *[None] * (len(values) - 1 - known[-1])]


def smooth(values: list[float | None]) -> list[float | None]:
    """Centred running mean over a tenth of the run; absent values are left out of it."""
    half = len(values) // 20
    windows = ([v for v in values[max(0, i - half) : i + half + 1] if v is not None] for i in range(len(values)))
    return [sum(window) / len(window) if window else None for window in windows]


def draw(steps: list[float], lines: list[dict], from_zero: bool) -> bytes:
    """An SVG image: of each line its values, pale, and their running mean; a dot where a value stands alone."""
    with style.context(STYLE, after_reset=True):
        figure = Figure()
        axes = figure.add_subplot(xlabel="step")
        for line in lines:
            around = [None, *line["values"], None]
            alone = [i for i in range(len(steps)) if around[i] is None and around[i + 2] is None]
            pale = {"alpha": 0.4, "linewidth": 0.8, "marker": ".", "markersize": 4, "markevery": alone}
            axes.plot(steps, line["values"], color=line["colour"], **pale)
            axes.plot(steps, line["mean"], color=line["colour"], linewidth=1.6, zorder=3)
        if from_zero:
            axes.axhline(0, color=GREY, linewidth=0.8)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
