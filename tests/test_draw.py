"""Claims about scripts/draw.py, and about what runs of pref_grpo.py leave: everyone draws the same with it.

The miniature's own renderer, a LoRA of it and a whole tuned one. pytest tests/test_draw.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from data.prompts import load_prompts
from miniature.fit import WEIGHTS
from rendering import RenderOptions, load_renderer
from run.seeds import render_seed
from scripts import draw
from tests.processes import ENVIRONMENT, ROOT, kill_when, launcher

TEXTS = ["a red circle", "two blue squares", "a green cross left of a red ring"]
DRAWING = {"render_steps": 2, "resolution": 16, "guidance": 3.5, "max_sequence_length": 32, "render_dtype": "float32"}
BOTH = pytest.mark.parametrize("kind, option", [("lora", "--render_lora"), ("full", "--sdmodel_name")])
HOW = [word for name, value in {**DRAWING, "render_batch_size": 4}.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def job(tmp_path) -> list[str]:
    """Arguments of a drawing into tmp_path/out."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    flux = ["--sdmodel_name", str(WEIGHTS / "flux")]
    return ["--prompts", str(prompts), "--out", str(tmp_path / "out"), "--samples", "2", *flux, *HOW]


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "pictures.jsonl" if path.is_dir() else path).read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def apart(picture: Image.Image, path: Path) -> int:
    """Largest difference of any channel of any pixel."""
    return int(np.abs(np.asarray(picture, np.int16) - np.asarray(Image.open(path), np.int16)).max())


@BOTH
def test_the_saved_weights_draw_what_the_last_evaluation_of_the_run_drew(flow_runs, kind, option):
    run = flow_runs[kind]
    before, after = (listed(run / "evaluations" / f"step_00000{step}.jsonl") for step in (0, 1))
    options = {"sdmodel_name": str(WEIGHTS / "flux"), option.removeprefix("--"): str(run / "ema")}
    renderer = load_renderer(RenderOptions(**{**DRAWING, **options}, render_batch_size=4), "cpu")
    drawn = renderer([row["prompt"] for row in after], [render_seed(0, row["prompt_id"], 0, 0) for row in after])
    assert max(apart(picture, run / row["image"]) for picture, row in zip(drawn, after, strict=True)) <= 1
    assert max(apart(picture, run / row["image"]) for picture, row in zip(drawn, before, strict=True)) > 10


@BOTH
def test_plain_diffusers_loads_a_run_and_draws_the_same(flow_runs, job, tmp_path, kind, option):
    assert draw.main([*job, option, str(flow_runs[kind])]) == 0
    if kind == "lora":
        pipe = FluxPipeline.from_pretrained(WEIGHTS / "flux", torch_dtype=torch.float32)
        pipe.load_lora_weights(flow_runs[kind])
    else:
        pipe = DiffusionPipeline.from_pretrained(flow_runs[kind], torch_dtype=torch.float32)
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 32}
    for row in listed(tmp_path / "out"):
        noise = [torch.Generator("cpu").manual_seed(render_seed(0, row["id"], 0, sample)) for sample in (0, 1)]
        pictures = pipe(prompt=[row["prompt"]] * 2, generator=noise, **settings).images
        for picture, name in zip(pictures, row["images"], strict=True):
            assert apart(picture, tmp_path / "out" / name) <= 1


def test_another_size_than_the_run_was_trained_at_is_said_once_with_both(flow_runs, job, tmp_path, caplog):
    job = [*job, "--render_lora", str(flow_runs["lora"] / "best")]
    assert draw.main([*job, "--out", str(tmp_path / "same")]) == 0 and "pixels" not in caplog.text
    assert draw.main([*job, "--resolution", "32"]) == 0
    assert [("16" in said, "32" in said) for said in caplog.messages if "pixels" in said] == [(True, True)]


def test_only_what_is_missing_is_drawn_again_and_what_cannot_be_is_null(job, tmp_path, monkeypatch, capsys):
    asked, broken, out = [], [TEXTS[1]], tmp_path / "out"

    def renderer(texts, seeds):
        asked.extend(texts)
        return [
            None if t in broken else Image.new("RGB", (4, 4), (s % 256, 0, 9))
            for t, s in zip(texts, seeds, strict=True)
        ]

    monkeypatch.setattr(draw, "load_renderer", lambda options, device: renderer)
    assert draw.main(job) == 0
    assert "4 pictures drawn, 0 were there, 2 could not be drawn" in capsys.readouterr().out
    ids = [prompt.id for prompt in load_prompts(job[1])]
    names = [[f"{index:06d}_{id[:8]}_{sample}.png" for sample in (0, 1)] for index, id in enumerate(ids)]
    rows = [{"prompt": text, "id": id, "images": some} for text, id, some in zip(TEXTS, ids, names, strict=True)]
    assert listed(out) == [rows[0], {**rows[1], "images": [None, None]}, rows[2]]
    asked.clear(), broken.clear()
    assert draw.main(job) == 0 and asked == [TEXTS[1]] * 2 and listed(out) == rows
    assert "2 pictures drawn, 4 were there, 0 could not be drawn" in capsys.readouterr().out
    assert draw.main(job) == 0 and len(asked) == 2


def test_other_settings_prompts_or_models_behind_the_same_path_are_refused(flow_runs, job, tmp_path, capsys):
    lora = Path(shutil.copytree(flow_runs["lora"], tmp_path / "lora"))
    job = [*job, "--render_lora", str(lora)]
    assert draw.main(job) == 0
    moved = [*job, "--render_lora", str(shutil.copytree(lora, tmp_path / "moved"))]
    assert draw.main(moved) == 0
    before = files(tmp_path / "out")
    for more in (["--seed", "1"], ["--samples", "3"], ["--guidance", "1"], ["--sdmodel_name", str(flow_runs["full"])]):
        assert draw.main([*moved, *more]) == 2
    weights = lora / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    capsys.readouterr()
    assert draw.main(job) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "contents of render_lora" in said
    (tmp_path / "prompts.txt").write_text("something else\n", encoding="utf-8")
    assert draw.main(moved) == 2 and files(tmp_path / "out") == before
    (tmp_path / "out" / "pictures.json").unlink()
    assert draw.main(moved) == 2, "pictures of nobody knows what"


@pytest.mark.slow
def test_killed_and_continued_by_two_processes_the_files_are_those_of_one(job, tmp_path):
    job += ["--samples", "20", "--render_steps", "8", "--resolution", "48", "--render_batch_size", "2"]
    assert draw.main([*job, "--out", str(tmp_path / "one")]) == 0
    out = tmp_path / "out"
    kill_when(lambda: len(list(out.glob("*.png"))) >= 3, [sys.executable, str(ROOT / "scripts" / "draw.py"), *job])
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 3 <= len(there) < 60
    two = launcher(ROOT / "scripts" / "draw.py", *job)
    done = subprocess.run(two, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{60 - len(there)} pictures drawn, {len(there)} were there, 0 could not" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert {n: c for n, c in files(out).items() if n[0] != "."} == files(tmp_path / "one")
