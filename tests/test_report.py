"""Claims about `report.html` and the terminal pictures, on a small run folder made here.

python -m pytest tests/test_report.py
"""

import json
import math
import random
import re
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw

from report.page import write_report
from report.terminal import sparkline, text_table

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)> </style></title>{{ 7 * 7 }} \ud800\u202e"
TASKS = ("single", "two", "colors", "counting", "position", "attr")
SUMMARY = {
    "table": {
        "title": "accuracy",
        "note": "of nobody",
        "columns": ["short", "long"],
        "rows": [
            {"label": "before", "mean": 0.33, "ci95": [0.28, 0.39], "cells": [0.5, None]},
            {"label": "after", "mean": 0.61, "ci95": [0.56, 0.67], "cells": [0.9, 0.3], "main": True},
            {"label": "best of all", "mean": None, "ci95": None, "cells": [None, None]},
        ],
    },
    "figures": {"accuracy <of sorts>": "0.33 → 0.61"},
    "rollouts": 7680,
    "rollouts_per_second": 31.2,
    "seconds": {"total": 410, "generate": 110, "render": 160, "score": 40, "train": 75},
}
COLORS = ("#d33", "#36c", "#2a5", "#eb3", "#84b", "#e83")


def draw(path, shapes, size):
    image = Image.new("RGB", (4 * size, 4 * size), "#eee8dd")
    for i in range(shapes):
        left, top = (4 + (i * 9) % 24) * size // 10, (4 + (i * 16) % 25) * size // 10
        ImageDraw.Draw(image).ellipse((left, top, left + size, top + size), fill=COLORS[(shapes + i) % 6])
    path.parent.mkdir(exist_ok=True)
    image.resize((size, size), Image.Resampling.LANCZOS).save(path)
    return f"images/{path.name}"


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def metrics(steps):
    noise = random.Random(0)
    for step in range(1, steps + 1):
        rise = 1 - math.exp(-3 * step / steps)
        hps = 0.21 + 0.08 * rise + noise.gauss(0, 0.008)
        yield {
            "step": step,
            "seconds_since_start": 3.1 * step,
            "reward": hps,
            "reward_std": 0.05 - 0.02 * rise,
            "rewards/hps/mean": hps,
            "rewards/hps/std": 0.04,
            "rewards/format/mean": 0.8 + 0.2 * rise,
            "completions/mean_length": 40 + noise.gauss(0, 2),
            "rewrites/tokens": 21 + noise.gauss(0, 1),
            "kl": None if step == 7 else 0.05 * rise,
            "entropy": math.nan if step == 9 else 1.2 - 0.5 * rise,
            "frac_reward_zero_std": 0.02,
            "samples/absent": 0.125 if step == 5 else 0.0,
            "rewrites/unreadable": 0.2 * (1 - rise),
            "rewrites/overflow": 0.0,
            "rewrites/copied": 0.01,
            "seconds/generate": 0.9,
            "seconds/render": 1.2 + noise.random() / 5,
            "seconds/score": 0.3,
            "seconds/train": 0.6,
        }


def rollouts(image):
    for group in range(4):
        for member in range(4):
            total = None if (group, member) == (1, 1) else 0.2 + 0.02 * member
            yield {
                "prompt_id": f"p{group}",
                "prompt": f"a photo of {group + 1} circles",
                "task": "counting",
                "completion": "<think>no end",
                "reasoning": "Four objects, side by side.\nLeft to right.",
                "rewrite": None if member == 0 else f"{group + 1} circles: red top left, blue top right, green below",
                "seeds": [1, 2],
                "parts": {"hps": total, "format": 1.0},
                "total": total,
                "advantage": member - 1.5,
                "images": [image, None] if member else [],
            }


@pytest.fixture
def run_dir(tmp_path):
    return fill(tmp_path / "demo")


def fill(folder, steps=60, cards=60):
    folder.mkdir()
    images = [draw(folder / "images" / f"{i:02}.png", i, 64) for i in range(1, 7)]
    run = {
        "config": {"max_steps": steps, "gpt_path": "miniature/policy", "nested": {"html": "<b>"}},
        "derived": {"prompts": 16, "completions": 8},
        "commit": "abc1234",
        "command": "r1_prompter.py --config configs/miniature.yaml",
    }
    (folder / "run.json").write_text(json.dumps(run))
    write_lines(folder / "metrics.jsonl", metrics(steps))
    for step in (1, steps):
        write_lines(folder / "rollouts" / f"step_{step:06}.jsonl", rollouts(images[step % 6]))
    write_lines(folder / "gallery.jsonl", (card(i, TASKS[i * 6 // cards], images) for i in range(cards)))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def card(i, task, images):
    good = "a red circle top left and a blue circle in the middle right"
    start = {"rewrite": "a red circle" if i % 5 else None, "image": images[i % 6] if i % 5 else None}
    return {
        "prompt": f"two circles {i}",
        "task": task,
        "raw": {"image": images[i % 6], "correct": False},
        "start": {**start, "reasoning": "", "correct": i % 3 == 0},
        "trained": {"rewrite": good if i else ATTACK, "reasoning": "Two.", "image": images[0], "correct": i % 4 != 0},
    }


def html(folder):
    return write_report(folder).read_text("utf-8")


def test_the_page_needs_nothing_but_itself_and_the_same_folder_gives_the_same_bytes(run_dir):
    page = html(run_dir)
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b", page, re.I)
    assert not re.search(r"(https?:)?//", re.sub(r"base64,[^\"]*", "", page)), "an address on the page"
    assert all(src.startswith("data:image/") for src in re.findall(r"\ssrc=\"([^\"]*)\"", page))
    assert page.count("<svg") > 8 and page.count("<img") > 60
    assert len(page) < 3_000_000 and html(run_dir) == page


def test_a_rewrite_cannot_leave_its_paragraph(run_dir):
    page = html(run_dir)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(2)&gt; &lt;/style&gt;" in page
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("</style>") == 1 and "{{ 7 * 7 }}" in page and "default-src 'none'" in page


SECRET, BROKEN = "picture refused", "picture missing"
PICTURES = {"../../etc/passwd": SECRET, "../secret.png": SECRET, "/etc/passwd": SECRET, "images/link.png": SECRET}
PICTURES |= dict.fromkeys(
    ("images/gone.png", "images/no.png", "images/cut.png", "images", "\0", "x" * 5000, 7), BROKEN
)


@pytest.mark.parametrize("image", PICTURES)
def test_a_picture_that_is_broken_or_outside_the_run_folder_leaves_a_box(run_dir, image):
    secret = run_dir.parent / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    (run_dir / "images" / "link.png").symlink_to(secret)
    (run_dir / "images" / "no.png").write_text("no picture")
    (run_dir / "images" / "cut.png").write_bytes((run_dir / "images" / "01.png").read_bytes()[:200])
    write_lines(run_dir / "gallery.jsonl", [{"prompt": "p", "task": "two", "raw": {"image": image, "correct": True}}])
    page = html(run_dir)
    assert f">{PICTURES[image]}</div>" in page and f"1 × {PICTURES[image]}." in page


def test_a_large_picture_is_shrunk(run_dir):
    Image.effect_noise((1024, 1024), 90).save(run_dir / "images" / "large.png")
    row = {"prompt": "p", "task": "two", "raw": {"image": "images/large.png", "correct": True}}
    write_lines(run_dir / "gallery.jsonl", [row])
    assert len(html(run_dir)) < 600_000 < (run_dir / "images" / "large.png").stat().st_size


FILES = ("run.json", "metrics.jsonl", "summary.json", "gallery.jsonl", "rollouts/step_000001.jsonl")


@pytest.mark.parametrize("name", FILES)
def test_one_missing_or_broken_file_leaves_a_page_that_names_it(run_dir, name):
    (run_dir / name).write_text('{"cut of\n' * 1000)
    page = html(run_dir)
    assert len(re.findall(f"<li>{name}[^<]*left out", page)) == 1  # a thousand broken lines do not bury the page
    (run_dir / name).unlink()
    assert "left out:" not in html(run_dir)


def test_an_empty_folder_leaves_a_page_that_says_so_and_one_step_a_plot(tmp_path):
    assert "nothing to report yet" in html(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward": 0.5, "kl": 0.0}])
    assert html(tmp_path).count("<svg") == 2


def test_nan_and_null_are_gaps_that_the_page_names(run_dir):
    page = html(run_dir)
    assert "kl is not a number in 1 of 60 steps, first in step 7." in page
    assert "entropy is not a number in 1 of 60 steps, first in step 9." in page
    assert not re.search(r" d=\"[^\"]*(nan|inf|None)", page)
    write_lines(run_dir / "metrics.jsonl", [{"step": i, "reward": math.nan, "kl": math.inf} for i in range(3)])
    assert "reward is not a number in 3 of 3 steps" in html(run_dir)


def test_absent_samples_and_unreadable_answers_are_visible(run_dir):
    page = html(run_dir)
    assert "Absent samples, left out of their groups: 0.21% on average, 12.5% at worst (step 5), in 1 of 60" in page
    assert "Answers that could not be read, not drawn:" in page
    assert "1 absent" in page and "1 unreadable" in page and "&lt;think&gt;no end" in page


def test_a_resumed_run_shows_each_step_once_and_one_that_stopped_early_says_so(run_dir):
    write_lines(run_dir / "metrics.jsonl", [*metrics(60), *list(metrics(60))[40:], {"step": 60, "train_runtime": 9.0}])
    assert "60 logged steps" in html(run_dir)
    write_lines(run_dir / "metrics.jsonl", [{"reward": 0.1}, *metrics(20)])
    assert "20 logged steps" in html(run_dir) and "The log ends at step 20 of 60." in html(run_dir)
    assert "a row without a step is left out" in html(run_dir)


def test_a_long_run_still_makes_a_small_page(run_dir):
    write_lines(run_dir / "metrics.jsonl", metrics(5000))
    page = html(run_dir)
    assert "means of neighbouring steps" in page and len(page) < 1_000_000


def test_what_the_gallery_leaves_out_is_said(run_dir):
    page = html(run_dir)
    assert "24 of 60 are shown" in page and page.count("✓ holds") + page.count("✗ fails") == 72
    assert all(page.count(f'<span class="chip">{task}</span>') >= 4 for task in TASKS)


def test_whatever_table_and_figures_a_summary_has_are_on_the_page(run_dir):
    page = html(run_dir)
    assert "<b>0.33 → 0.61</b><small>accuracy &lt;of sorts&gt;</small>" in page
    assert "0.610" in page and "0.560 – 0.670" in page and ">not run</small>" in page
    assert page.count("<th>short</th>") == page.count("<th>long</th>") == 1
    old = {"oracle": {"raw": {"mean": 0.1}}, "gap_closed": 0.9, "rollouts": 7680}  # as it was before it had a table
    (run_dir / "summary.json").write_text(json.dumps(old))
    assert "7,680" in html(run_dir) and "<table>" not in html(run_dir)


def test_the_command_line_writes_the_page_and_refuses_a_folder_that_is_not_there(run_dir, tmp_path):
    command = [sys.executable, "-m", "report.page"]
    done = subprocess.run([*command, run_dir], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html"), done.stderr
    done = subprocess.run([*command, tmp_path / "gone"], capture_output=True, text=True)
    assert done.returncode == 2 and str(tmp_path / "gone") in done.stderr and "Traceback" not in done.stderr


def test_a_sparkline_rises_with_its_values_and_leaves_gaps():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, None, math.nan, 1.0]) == "▁  █"
    assert sparkline([]) == "" and sparkline([None, None]) == "  "
    assert len(set(sparkline([2.0] * 5))) == 1
    assert len(sparkline(range(1000), width=50)) == 50


def test_a_table_in_the_terminal_is_aligned_and_says_what_was_not_measured():
    lines = text_table(SUMMARY["table"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["accuracy", "mean", "±", "95", "%", "short", "long"]
    assert lines[2].split() == ["before", "0.330", "±", "0.055", "0.50", "-"]
    assert lines[4].split() == ["best", "of", "all", "-", "-", "-"]
