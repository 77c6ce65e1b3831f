"""Claims about what makes drawing and sampling faster: pixels that stay, batch sizes that are settled once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import r1_prompter
from errors import UserError
from miniature import build as miniature
from rendering import levers, load_renderer, local
from rendering.levers import MAX_PIXEL_DIFFERENCE, smallest_good_batch
from run.folder import Resume
from tests.processes import launch
from tests.test_rendering import run_out_of_memory

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"{count} {colour} circles" for count in ("one", "two", "three") for colour in ("red", "blue", "green")]
SMALL = {"render_batch_size": 4, "render_steps": 2}
PIPES = {"flux": {}, "sd3": {"guidance": 3.0, "sdmodel_name": "miniature/weights/sd3"}}  # sd3 has negative prompts


def drawn(texts=TEXTS, **changes) -> list:
    return miniature.renderer(**{**SMALL, **changes})(texts, range(len(texts)))


def most(one: list, other: list) -> int:
    """Largest difference of any channel of any pixel of any picture."""
    before, after = (np.stack([np.asarray(picture, np.int16) for picture in side]) for side in (one, other))
    return int(np.abs(after - before).max())


@pytest.fixture(scope="module")
def plain() -> list:
    return drawn()


# ----- levers of the renderer


@pytest.mark.parametrize("pipe", PIPES)
def test_text_encoders_off_the_device_draw_the_same_and_come_once_a_call(pipe, monkeypatch):
    moves, expected = [], drawn(**PIPES[pipe])
    monkeypatch.setattr(levers, "_move", lambda modules, device: moves.append((len(modules), str(device))))
    away = miniature.renderer(**SMALL, **PIPES[pipe], render_offload_text=True)
    assert most(away(TEXTS, range(9)), expected) == 0
    count = len(levers.text_encoders(away.pipe))
    assert moves == [(count, "cpu")] * 2  # there and back; both names are "cpu" on a machine without a GPU
    away(TEXTS[:2], [1, 2])
    assert len(moves) == 4


def test_decoding_in_slices_stays_within_the_tolerance_in_float32():
    sliced = drawn(render_slice_vae=True, render_dtype="float32")
    assert most(sliced, drawn(render_dtype="float32")) <= MAX_PIXEL_DIFFERENCE


def test_another_attention_kernel_is_this_transformers_alone(plain):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()[0]
    assert most(drawn(render_attention="_native_math", render_dtype="float32"), drawn(render_dtype="float32")) <= 1
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    assert most(drawn(), plain) == 0


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_within_the_tolerance(toy):
    options = {"sdmodel_name": str(toy.flux), "resolution": 16, "render_dtype": "float32", "max_sequence_length": 32}
    assert most(drawn(**options, render_compile=True), drawn(**options)) <= MAX_PIXEL_DIFFERENCE


def test_a_lora_is_fused_at_its_scale(tmp_path, plain):
    import peft
    from peft.utils import get_peft_model_state_dict

    pipe = miniature.renderer(**SMALL).pipe
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    tensors = get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=tensors)
    assert most(drawn(render_lora=str(tmp_path), render_lora_scale=0.0), plain) == 0
    named = f"{tmp_path}:pytorch_lora_weights.safetensors"
    with_lora = drawn(render_lora=named)
    assert most(with_lora, plain) > 20
    renderer = miniature.renderer(**SMALL, render_lora=named)
    assert not any("lora" in name for name, _ in renderer.pipe.transformer.named_parameters())
    assert most(renderer(TEXTS, range(9)), with_lora) == 0


def test_a_row_draws_the_same_alone_and_in_a_batch_with_every_lever_on():
    options = {"render_offload_text": True, "render_slice_vae": True, "render_attention": "_native_math"}
    renderer = miniature.renderer(**SMALL, **options)
    together = renderer(TEXTS, range(9))
    assert all(most(renderer([TEXTS[i]], [i]), [together[i]]) == 0 for i in range(9))


NOT_THERE = {
    "attention": ({"render_attention": "fast"}, "--render_attention fast"),
    "attention without its package": ({"render_attention": "flash"}, "--render_attention flash: .*install"),
    "attention that is fixed": ({"render_attention": "native", **PIPES["sd3"]}, "--render_attention native"),
    "auto of another program": ({"render_batch_size": "auto"}, "--render_batch_size .*r1_prompter.py"),
    "LoRA": ({"render_lora": "/nowhere"}, "--render_lora /nowhere"),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_a_lever_that_is_not_there_is_named_with_its_value(case):
    changes, said = NOT_THERE[case]
    with pytest.raises(UserError, match=said):
        miniature.renderer(**changes)


# ----- the batch size


TIMES = {
    "gains up to 4": ([1.0, 0.5, 0.3, 0.299], 4),
    "a hair is not worth twice the memory": ([1.0, 0.96, 0.95], 1),
    "the second best is nearly as good": ([1.0, 0.5, 0.49], 2),
    "memory ends it": ([1.0, 0.5, None, 0.1], 2),
    "nothing fits": ([None], 1),
    "up to the most": ([0.9**i for i in range(9)], 64),
}


@pytest.mark.parametrize("case", TIMES)
def test_the_smallest_batch_within_five_per_cent_of_the_best_is_taken(case):
    seconds, expected = TIMES[case]
    assert smallest_good_batch(lambda size: seconds[size.bit_length() - 1]) == expected


def test_a_trial_that_runs_out_of_memory_is_not_taken():
    renderer = miniature.renderer(**SMALL)
    tried = run_out_of_memory(renderer.pipe.transformer, above=2)
    assert smallest_good_batch(renderer.trial) <= 2 and max(tried) <= 4
    assert renderer.trial(4) is None and renderer.trial(1) > 0
    assert None not in renderer(TEXTS[:1], [0])


def test_auto_is_tried_once_and_kept_when_the_run_continues(toy, tmp_path, monkeypatch):
    found = iter([2, 8])
    monkeypatch.setattr(local, "smallest_good_batch", lambda trial: next(found))
    run = ["--config", str(toy.config), "--outdir", str(tmp_path / "run"), "--rewards", "format", "--max_steps", "1"]
    options = r1_prompter.parse_options([*run, "--render_batch_size", "auto"])
    renderer = load_renderer(options.render, "cpu", measuring=True)
    assert renderer.chunk_size == 1
    assert r1_prompter.choose_run_batch_size(renderer, "auto", Resume()) == renderer.chunk_size == 2
    again, before = load_renderer(options.render, "cpu", measuring=True), Resume(derived={"render_batch_size": 2})
    assert r1_prompter.choose_run_batch_size(again, "auto", before) == again.chunk_size == 2  # no other trial
    assert r1_prompter.choose_run_batch_size(again, 4, before) == 4


def test_a_run_writes_down_the_batch_size_that_it_chose(toy, tmp_path):
    run = ["--config", str(toy.config), "--outdir", str(tmp_path / "run"), "--rewards", "hps", "--max_steps", "1"]
    assert r1_prompter.main([*run, "--render_batch_size", "auto", "--save_strategy", "no"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["derived"]["render_batch_size"] in (1, 2, 4, 8, 16, 32, 64)
    assert record["config"]["render_batch_size"] == "auto"


@pytest.mark.slow
def test_every_process_takes_the_smallest_that_one_found(toy, tmp_path):
    launch(ROOT / "tests" / "launch_batch.py", toy.flux, tmp_path)
    assert [(tmp_path / f"{rank}").read_text() for rank in (0, 1)] == ["2 2", "2 2"]


# ----- options


def test_text_length_follows_from_what_the_policy_may_write(toy):
    def length(*more: str) -> int:
        return r1_prompter.parse_options(
            ["--data", "x", "--outdir", "y", "--max_sequence_length", "auto", *more]
        ).render.max_sequence_length

    assert length() == 256  # the recipe: 512 tokens, half of them reasoning
    assert length("--max_completion_length", "256") == 128
    assert length("--reasoning", "false") == 512
    assert length("--max_completion_length", "4096") == 512
    with pytest.raises(UserError, match="--max_sequence_length 'long': give a whole number.* or auto"):
        length("--max_sequence_length", "long")


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_the_vllm_configurations_reach_trl(mode, monkeypatch):
    monkeypatch.setattr("run.options.need", lambda package, asker: None)
    argv = ["--config", str(ROOT / "configs" / f"vllm_{mode}.yaml"), "--data", "x", "--outdir", "y"]
    training = r1_prompter.parse_options(argv).training
    assert training.use_vllm and training.vllm_mode == mode
    assert training.beta == 0 and training.max_completion_length == 512
    if mode == "colocate":
        assert training.vllm_enable_sleep_mode and training.vllm_gpu_memory_utilization == 0.2
        assert training.vllm_max_model_length == 2048
    else:
        assert (training.vllm_server_host, training.vllm_server_port) == ("127.0.0.1", 8000)
