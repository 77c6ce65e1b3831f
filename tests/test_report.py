"""Claims about `report.html` and the terminal pictures, on a small run folder made here."""

import base64
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import r1_prompter
import sft
from errors import UserError
from report.page import write_card, write_report
from report.terminal import ASCII_BARS, BARS, sparkline, text_table
from run.options import run_main

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


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def metrics(steps):
    for step in range(1, steps + 1):
        yield {
            "step": step, "seconds_since_start": 3.1 * step, "reward": 0.21 + step / steps / 10,
            "rewards/hps/mean": 0.2, "rewards/format/mean": 0.8, "kl": None if step == 7 else 0.05,
            "entropy": math.nan if step == 9 else 1.2, "samples/absent": 0.125 if step == 5 else 0.0,
            "rewrites/unreadable": 0.2 * (1 - step / steps), "seconds/render": 1.2,
        }  # fmt: skip


def rollouts(image):
    for member in range(4):
        yield {
            "prompt_id": "p", "prompt": "a photo of two circles", "task": "counting", "completion": "<think>no end",
            "reasoning": "Two objects, side by side.",
            "rewrite": None if member == 0 else "a red circle, a blue circle", "seeds": [1, 2],
            "parts": {"hps": 0.2, "format": 1.0}, "total": None if member == 1 else 0.2, "advantage": member - 1.5,
            "images": [image, None] if member else [],
        }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "demo"
    (folder / "images").mkdir(parents=True)
    images = [f"images/{i:02}.png" for i in range(6)]
    for i, image in enumerate(images):
        Image.new("RGB", (64, 64), (40 * i, 80, 120)).save(folder / image)
    config = {"max_steps": 60, "gpt_path": "miniature/policy", "nested": {"html": "<b>"}}
    run = {"config": config, "derived": {"prompts": 16}, "commit": "abc1234", "command": "r1_prompter.py"}
    (folder / "run.json").write_text(json.dumps(run))
    write_lines(folder / "metrics.jsonl", metrics(60))
    for step in (1, 60):
        write_lines(folder / "rollouts" / f"step_{step:06}.jsonl", rollouts(images[0]))
    write_lines(folder / "gallery.jsonl", (card(i, TASKS[i // 10], images) for i in range(60)))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def card(i, task, images):
    start = {"rewrite": "a red circle" if i % 5 else None, "image": images[i % 6] if i % 5 else None}
    rewrite = "two red circles" if i else ATTACK
    return {
        "prompt": f"two circles {i}",
        "task": task,
        "raw": {"image": images[i % 6], "correct": False},
        "start": {**start, "reasoning": "", "correct": i % 3 == 0},
        "trained": {"rewrite": rewrite, "reasoning": "Two.", "image": images[0], "correct": i % 4 != 0},
    }


def html(folder):
    return write_report(folder).read_text("utf-8")


def plot(page, title):
    svg = re.search(rf"<h3>{title}</h3>.*?src=\"data:image/svg\+xml;base64,([^\"]*)", page, re.S)
    return base64.b64decode(svg[1]).decode()


def test_the_page_needs_nothing_but_itself_and_the_same_folder_gives_the_same_bytes(run_dir):
    page = html(run_dir)
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b", page, re.I)
    assert not re.search(r"(https?:)?//", re.sub(r"base64,[^\"]*", "", page)), "an address on the page"
    assert all(src.startswith("data:image/") for src in re.findall(r"\ssrc=\"([^\"]*)\"", page))
    assert page.count("image/svg+xml") > 4 and page.count("image/jpeg") > 60
    assert not re.search(r"(href|src)=\"(?!#)", plot(page, "Reward")), "a plot asks for another file"
    assert html(run_dir) == page


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
    (run_dir / "images" / "cut.png").write_bytes((run_dir / "images" / "01.png").read_bytes()[:50])
    write_lines(run_dir / "gallery.jsonl", [{"prompt": "p", "task": "two", "raw": {"image": image, "correct": True}}])
    (run_dir / "metrics.jsonl").unlink()
    page = html(run_dir)
    assert f">{PICTURES[image]}</div>" in page and f"1 × {PICTURES[image]}." in page


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "summary.json", "gallery.jsonl", "rollouts/step_000001.jsonl"]
)
def test_one_missing_or_broken_file_leaves_a_page_that_names_it(run_dir, name):
    (run_dir / name).write_text('{"cut of\n' * 1000)
    page = html(run_dir)
    assert len(re.findall(f"<li>{name}[^<]*left out", page)) == 1  # a thousand broken lines do not bury the page
    (run_dir / name).unlink()
    assert "left out:" not in html(run_dir)


def test_an_empty_folder_leaves_a_page_that_says_so_and_one_step_a_plot(tmp_path):
    assert "nothing to report yet" in html(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward": 0.5, "kl": 0.0}])
    page = html(tmp_path)
    assert page.count("image/svg+xml") == 2 and "<use" in plot(page, "Reward"), "a dot"


def test_nan_and_null_are_gaps_that_the_page_names(run_dir):
    page = html(run_dir)
    assert re.search(r"kl [^<]* 1 of 60 [^<]* step 7\b", page) and re.search(
        r"entropy [^<]* 1 of 60 [^<]* step 9\b", page
    )
    pieces = [path.count("M") for path in re.findall(r"<path d=\"([^\"]*)\"[^>]*opacity: 0.4", plot(page, "KL"))]
    assert pieces == [2]
    write_lines(run_dir / "metrics.jsonl", [{"step": i, "reward": math.nan, "kl": math.inf} for i in range(3)])
    assert re.search("reward [^<]* 3 of 3", html(run_dir))


def test_absent_samples_and_unreadable_answers_are_visible(run_dir):
    page = html(run_dir)
    assert re.search(r"0\.21% [^<]* 12\.5% [^<]*step 5\b[^<]* 1 of 60", page)
    assert "1 absent" in page and "1 unreadable" in page and "&lt;think&gt;no end" in page


def test_a_resumed_run_shows_each_step_once_and_one_that_stopped_early_says_so(run_dir):
    write_lines(run_dir / "metrics.jsonl", [*metrics(60), *list(metrics(60))[40:], {"step": 60, "train_runtime": 9.0}])
    assert "60 logged steps" in html(run_dir)
    write_lines(run_dir / "metrics.jsonl", [{"reward": 0.1}, *metrics(20)])
    assert "20 logged steps" in html(run_dir) and "step 20 of 60" in html(run_dir)


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


def test_the_same_prompts_are_shown_at_evaluations_from_the_first_to_the_last(run_dir):
    assert "Through training" not in html(run_dir)
    for step in range(0, 220, 20):
        wins = {"hps": 0.5, "git": None, "orm": 1.0} if step else dict.fromkeys(("hps", "git", "orm"), 0.5)
        known = {"scores": {}, "wins": wins, "image": f"images/{step % 6:02}.png"}
        rows = [{"prompt_id": str(i), "prompt": f"cat {i} & co", "task": TASKS[i // 3], **known} for i in range(18)]
        write_lines(run_dir / "evaluations" / f"step_{step:06}.jsonl", rows[:-1] if step == 200 else rows)
    write_lines(run_dir / "evaluations" / "step_000040.jsonl", [{**row, "image": None, "wins": {}} for row in rows])
    section = html(run_dir).partition("Through training")[2].partition("</section>")[0]
    shown = re.findall(r"cat (\d+) &amp; co", section)
    assert shown == ["0", "3", "6", "9", "12", "15", "1", "4"] and "8 of 18 prompts" in section
    courses = section.split('class="course"')[1:]
    assert [re.findall(r">step (\d+)", course) for course in courses] == [["0", "40", "80", "120", "160", "200"]] * 8
    assert section.count("1.5 of 2") == 8 * 4 and section.count("not drawn") == 8 and section.count("<img") == 8 * 5


def test_pictures_without_a_rewrite_are_shown_without_the_prompt_a_second_time(run_dir):
    rows = [
        {**row, "rewrite": row["prompt"], "reasoning": None, "completion": ""} for row in rollouts("images/00.png")
    ]
    for name in ("step_000001.jsonl", "step_000060.jsonl"):
        write_lines(run_dir / "rollouts" / name, rows)
    section = html(run_dir).partition("Best and worst")[2].partition("</section>")[0]
    assert section.count(rows[0]["prompt"]) == 2 and "rewrites" not in section and "unreadable" not in section


def test_what_is_logged_for_each_denoising_step_is_one_plot_that_can_be_read(run_dir):
    assert "Ratio" not in html(run_dir) and "untrained model" not in html(run_dir)
    of_steps = {f"ratio/step_{i:02}": 1 + i / 100 for i in range(14)} | {"kl/level_01": 0.1, "replay_gap": 0.0}
    now_and_then = {1: {"win_rate/hps": 0.5, "eval/hps/mean": 0.2}, 60: {"win_rate/hps": 0.9, "eval/hps/mean": 0.3}}
    rows = [{**row, **of_steps, **now_and_then.get(row["step"], {})} for row in metrics(60)]
    write_lines(run_dir / "metrics.jsonl", rows)
    page = html(run_dir)
    ratio = page.partition("<h3>Ratio</h3>")[2].partition("</figure>")[0]
    assert "8 of 14 lines" in ratio and ratio.count("</i>step_") == 8 and "step_00" in ratio and "step_13" in ratio
    assert "</i>level_01" in page and "<h3>Replay gap</h3>" in page and "<h3>Clipped</h3>" not in page
    rate = plot(page, "Win rate against the untrained model")
    strong = re.findall(r"<path d=\"([^\"]*)\"[^>]*stroke-width: 1.6", rate)
    assert len(strong) == 1 and strong[0].count("M") == 1, "two evaluations, joined"


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone"):
        write_report(tmp_path / "gone")


def test_a_sparkline_rises_with_its_values_and_leaves_gaps():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, None, math.nan, 1.0]) == "▁  █"
    assert sparkline([]) == "" and sparkline([None, None]) == "  "
    assert len(set(sparkline([2.0] * 5))) == 1
    assert len(sparkline(range(1000), width=50)) == 50


@pytest.mark.parametrize(
    "encoding", ["ascii", "latin-1", "cp1252", "cp437", "cp850", "koi8-r", "shift_jis", "gbk", "utf-8", "utf-16"]
)
def test_what_a_terminal_cannot_show_is_replaced_and_never_raises(encoding, monkeypatch):
    out, top = io.BytesIO(), "[±→−×–…Δ’]"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    texts = ["un café 猫 🐈 \udc80", ATTACK, top, text_table(SUMMARY["table"])]
    assert run_main("any", lambda: print(*texts, sparkline(range(8)), sep="\n", flush=True)) == 0
    *shown, bars = out.getvalue().decode(encoding).splitlines()
    assert bars in (BARS, ASCII_BARS) and (bars == BARS or not encoding.startswith("utf"))
    assert encoding != "ascii" or {"[+-->-x-...change of']", "un caf\\xe9 \\u732b \\U0001f408 \\udc80"} <= set(shown)


@pytest.mark.parametrize("program", [r1_prompter, sft])
def test_help_can_be_printed_where_only_ascii_can(program, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    sys.stdout.flush()
    assert end.value.code == 0 and b"--outdir" in out.getvalue()


@pytest.mark.parametrize(
    "base, adapter, shown",
    [("Qwen/Qwen2.5-3B-Instruct", True, True), ("org/model", False, True), ("runs/cold/start", False, False),
     (str(Path(__file__).parent), True, False), ("tests/hostile.py", False, False)],
)  # fmt: skip
def test_the_card_of_a_policy_says_what_its_run_knows(tmp_path, monkeypatch, base, adapter, shown):
    monkeypatch.chdir(Path(__file__).parents[1])
    config = {"gpt_path": base, "data": "prompts.txt", "data_hash": "f00", "reasoning": False, "rewards": ["hps"]}
    config["sdmodel_name"] = "flux"
    run = {"config": config, "derived": {"optimizer_steps": 9}, "command": "r1_prompter.py --x 1", "commit": None}
    (tmp_path / "run.json").write_text(json.dumps({**run, "versions": {"torch": "2"}}), "utf-8")
    if adapter:
        (tmp_path / "adapter_config.json").touch()
    write_card(tmp_path, tmp_path, base=base, step=4, metrics={"reward": 0.5}, tags=["trl", "grpo"])
    _, header, text = (tmp_path / "README.md").read_text("utf-8").split("---\n")
    found = yaml.safe_load(header)
    assert found.get("base_model") == (base if shown else None) and found["tags"] == ["trl", "grpo"]
    assert found["library_name"] == ("peft" if adapter else "transformers")
    assert all(part in text for part in (base, "4 of 9", "r1_prompter.py --x 1", "f00", "reward 0.5", "torch 2"))
    assert text.count("reasoning") == 2 and "None" not in text  # both uses say that this policy does not think


def test_a_table_in_the_terminal_is_aligned_and_says_what_was_not_measured():
    lines = text_table(SUMMARY["table"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["accuracy", "mean", "±", "95", "%", "short", "long"]
    assert lines[2].split() == ["before", "0.330", "±", "0.055", "0.50", "-"]
    assert lines[4].split() == ["best", "of", "all", "-", "-", "-"]
