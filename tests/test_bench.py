"""Claims about scripts/bench.py: what is compared, what is counted, and what a row says that could not be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.prompts import load_prompts
from miniature.build import renderer
from prompting import completion
from rendering import local
from rewards import RewardContext, RewardOptions, build
from scoring.drawing import Drawer
from scoring.rollouts import Scorer
from scripts import bench, bench_gpu
from scripts.bench_common import plain_loop, table
from scripts.bench_levers import bench_levers
from scripts.bench_own import bench_janus, bench_real

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_what_the_plain_loop_draws_and_scores_again_for_each_rollout_and_reward_is_done_once_in_batches():
    """Rows of each forward pass: 8 rollouts of 6 rewrites, drawn in 2 steps, scored by 4 networks."""
    asked = [prompt for prompt in load_prompts(ROOT / "miniature/prompts/train.txt")[:2] for _ in range(4)]
    completions = [completion("Think.", f"{prompt.text} {i % 4 % 3}") for i, prompt in enumerate(asked)]
    batched, single = (renderer(render_batch_size=size, render_steps=2, render_dtype="float32") for size in (6, 1))
    paths = {f"{name}_path": str(ROOT / "miniature/weights" / name) for name in ("hps", "gdino", "git", "orm")}
    names, options = ("hps", "gdino", "git", "orm", "format"), RewardOptions(**paths, orm_dtype="float32")
    rewards = build(names, options, RewardContext(renderer=batched, prompts=asked))
    passes = {}

    def watch(name, network):
        def note(_, args, named):
            passes.setdefault(name, []).append(next(map(len, filter(torch.is_tensor, (*args, *named.values())))))

        network.register_forward_pre_hook(note, with_kwargs=True)

    for pipe in (batched.pipe, single.pipe):
        watch("texts", pipe.text_encoder_2)
        watch("steps", pipe.transformer)
        watch("pictures", pipe.vae.decoder)
    watch("hps, prompts", rewards[0].model.transformer)
    watch("hps, pictures", rewards[0].model.visual)
    for reward in rewards[1:4]:
        watch(reward.name, reward.model)
    scorer = Scorer(Drawer(batched, group=4), rewards, {prompt.id: prompt for prompt in asked})
    scorer.score(completions, [prompt.id for prompt in asked], 1)
    # of git the pictures, then the questions; of the texts one alone before, to know its shape
    scored = {"hps, prompts": [2], "hps, pictures": [6], "gdino": [6], "git": [6, 6], "orm": [6]}
    assert passes == {"texts": [1, 6], "steps": [6, 6], "pictures": [6], **scored}
    passes.clear()
    plain_loop(single, rewards, asked, completions)
    scored = {name: [1] * 8 * len(rows) for name, rows in scored.items()}
    assert passes == {"texts": [1] * 33, "steps": [1] * 64, "pictures": [1] * 32, **scored}


@pytest.mark.slow
def test_the_time_of_a_rollout_is_split_into_phases_and_compared(tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main(["--target", "cpu", "--prompts", "1", "--group", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    phases = [found[f"{phase}_s_per_rollout"] for phase in ("generate", "render", "score")]
    assert found["rollouts"] == 2 and sum(phases) == pytest.approx(found["s_per_rollout"])
    ratio = found["plain_loop_s_per_rollout"] / (phases[1] + phases[2])
    assert found["ratio_to_plain_loop"] == pytest.approx(ratio)


def test_every_row_of_the_gpu_bench_has_figures_and_the_ratios_follow_from_them(tmp_path, capsys):
    out, scale = tmp_path / "bench.json", bench_gpu.TINY
    assert bench.main(["--target", "gpu", "--scale", "tiny", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    drawn = [row for row in found["rows"] if row["what"] == "draw"]
    assert len(drawn) == len(scale.sides) * len(scale.batches)
    assert all(row["images_per_s"] > 0 and 0 < row["share"] < 1 for row in drawn)
    seconds = {row["what"]: row["seconds"] for row in found["rows"] if row["what"] != "draw"}
    scores = [f"score {name}" for name in bench_gpu.REWARDS]
    phases = ["generate", "train, LoRA", "render", *scores]
    assert list(seconds) == [*phases, "plain loop"]
    ours = sum(seconds[name] for name in ("render", *scores))
    assert found["ratio_to_plain_loop"] == pytest.approx(seconds["plain loop"] / ours)
    outside = 1 - seconds["render"] / sum(seconds[name] for name in phases)
    assert found["share_outside_drawing"] == pytest.approx(outside)
    assert len(capsys.readouterr().out.splitlines()) > len(found["rows"])


def test_pictures_that_random_weights_spoil_and_rows_without_time_give_reasons_and_no_figures(monkeypatch):
    found = bench_gpu.bench_gpu(bench_gpu.TINY, 0, CPU)
    late = [row for row in found["rows"] if row["what"] == "draw"]
    assert late and all("are left" in row["skipped"] and "seconds" not in row for row in late)
    assert "skipped" in table(found["rows"]) and "ratio_to_plain_loop" not in found
    monkeypatch.setattr(local, "_to_picture", lambda pixels: "non-finite pixels")
    found = bench_gpu.bench_gpu(bench_gpu.TINY, 1, CPU)
    (row,) = (row for row in found["rows"] if row["what"] == "render")
    assert "non-finite pixels" in row["skipped"] and "seconds" not in row and "share_outside_drawing" not in found


@pytest.mark.parametrize(("side", "tflop"), [(512, 21.5), (1024, 74.4)])
def test_a_step_of_the_real_shapes_costs_what_flux_dev_costs(side, tflop):
    meta = torch.device("meta")
    transformer, places = bench_gpu.flux(meta).transformer, (side // 16) ** 2
    numbers = {"timestep": torch.ones(1), "guidance": torch.ones(1), "pooled_projections": torch.zeros(1, 768)}
    read = {"hidden_states": torch.zeros(1, places, 64), "encoder_hidden_states": torch.zeros(1, 512, 4096)}
    ids = {"img_ids": torch.zeros(places, 3), "txt_ids": torch.zeros(512, 3)}
    arguments = {name: value.to(meta, torch.bfloat16) for name, value in {**numbers, **read, **ids}.items()}
    with torch.device(meta), FlopCounterMode(display=False) as counter:
        transformer(**arguments)
    assert counter.get_total_flops() / 1e12 == pytest.approx(tflop, rel=0.01)


def test_the_counted_steps_of_a_picture_add_up():
    draw = renderer(render_steps=2, render_batch_size=1)
    step, once = bench_gpu.count_flops(draw, 48)
    with FlopCounterMode(display=False) as counter:
        draw.trial(1, 1.0, num_inference_steps=5)  # one picture of one step, then one of five
    assert step > 0 and once > 0 and counter.get_total_flops() == 6 * step + 2 * once


@pytest.mark.slow
def test_the_table_of_levers_has_gains_differences_and_reasons():
    chosen = ["VAE in slices", "quantised, fp8", "half the steps", "attention flash"]
    rows = {row["name"]: row for row in bench_levers("tiny", 1, CPU, chosen)["rows"]}
    assert set(rows) == {"no lever", *chosen}
    assert rows["VAE in slices"]["gain"] > 0 and rows["VAE in slices"]["most"] < 20  # bfloat16
    assert rows["half the steps"]["mean"] > rows["VAE in slices"]["mean"]
    assert "torchao" in rows["quantised, fp8"]["skipped"] and "attention" in rows["attention flash"]["skipped"]


@pytest.mark.slow
def test_the_own_targets_measure_every_phase_of_every_side():
    rows = bench_janus(1, 2)["rows"]
    assert [row["phase"] for row in rows] == ["render", "score", "train", "all", "times the published speed"]
    assert all(value > 0 for row in rows for value in list(row.values())[1:]) and rows[-1]["published"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("target", "models"), [("flow", 1), ("janus", 2)])
def test_a_step_at_given_shapes_has_seconds_and_a_share_of_the_ceiling(target, models):
    rows = bench_real(target, bench_gpu.TINY, CPU)["rows"]
    assert len(rows) == models and all(row["render"] > 0 and row["train"] > 0 and 0 < row["share"] < 1 for row in rows)
