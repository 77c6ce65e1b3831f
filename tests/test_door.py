"""Claims about what every program refuses before it loads anything, and about the numbers that a device gets."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from types import MappingProxyType

import pytest
import torch

from errors import UserError
from models.devices import pick_dtype
from rendering import RenderOptions
from tests.test_rendering import checkpoint  # noqa: F401  a fixture

SHAPE = "--data x --outdir {out}"
PROGRAMS = {  # program -> (what it needs, flags with a bad value, the last word)
    "r1_prompter": (SHAPE, [
        "--seed -1", "--seed 4294967296", "--render_steps 0", "--guidance nan", "--guidance -1", "--resolution -8",
        "--max_sequence_length 0", "--max_sequence_length many", "--render_batch_size 0", "--render_timeout 0",
        "--render_lora_scale inf", "--learning_rate nan", "--temperature 0", "--num_generations 1",
        "--gradient_accumulation_steps 0", "--logging_steps 0", "--loss_type none", "--save_images_every 0",
        "--picture_cache -1", "--phase_budget -1", "--images_per_rewrite 0", "--max_absent_share 2", "--gpt_path ",
        "--reward_batch_size 0", "--orm_temperature 0", "--judge_concurrency 0", "--preference_pairs 0",
        "--length_low 0", "--reward_weights 1 nan", "--render_device gpu", "--render_attention flash",
        "--use_vllm", "--use_liger_kernel true", "--report_to wandb", "--attn_implementation flash_attention_2",
        "--optim adamw_8bit", "--render_quantization int8", "--render_quantization nf4",
    ]),
    "sft": (SHAPE, ["--seed -1", "--validation_share 1", "--max_length 0", "--phase_budget nan", "--load_in_4bit"]),
    "doctor.__main__": (SHAPE, ["--render_steps 0", "--seed -1", "--gpus -1", "--processes 0", "--gpu_memory inf"]),
    "evaluation.run": ("--benchmark dpg --metadata x --out {out}", [
        "--samples 0", "--limit 0", "--unit 0", "--n 0", "--revise -1", "--seed -1", "--temperature 0",
        "--max_new_tokens 0", "--judge_batch_size 0", "--render_steps 0", "--metadata ",
    ]),
    "scripts.reprompt": ("--data x --gpt_path x --out {out}", [
        "--samples 0", "--temperature -1", "--temperature inf", "--seed -1", "--rewrite_batch_size 0", "--device tpu9",
        "--guidance nan", "--out ",
    ]),
    "scripts.make_sft": ("--data x --out {out} --teacher miniature", [
        "--seed -1", "--limit 0", "--attempts 0", "--teacher_concurrency 0", "--teacher_timeout nan",
        "--temperature -1", "--images_per_rewrite 0", "--best_of 0", "--price_in -1", "--render_steps 0",
    ]),
    "scripts.demo": ("--outdir {out}", ["--seed -1", "--samples 0", "--render_steps 0", "--resolution 50"]),
    "scripts.demo_flow": ("--outdir {out}", ["--seed -1", "--samples 0", "--loss ppo", "--resolution 50"]),
    "scripts.bench": ("--target cpu", ["--prompts 0", "--group 1", "--minutes nan"]),
    "data.make_prompts": ("--out_dir {out}", ["--rl 0", "--cold_start -1"]),
}  # fmt: skip


@pytest.mark.parametrize(("program", "flag"), [(name, flag) for name, (_, bad) in PROGRAMS.items() for flag in bad])
def test_a_bad_value_is_code_2_and_one_line_that_names_the_option_before_anything_is_read(
    program, flag, tmp_path, capfd
):
    words = PROGRAMS[program][0].format(out=tmp_path / "new").split() + flag.split(" ")
    assert importlib.import_module(program).main(words) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and flag.split()[0] in said[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "line",
    [
        "common_seeds: [false]", "common_seeds: null", "images_per_rewrite: [1]", "images_per_rewrite: true",
        "images_per_rewrite: 0", "images_per_rewrite: 1.5", "gpt_path: false", "gpt_path: ''", "rewards: [[hps]]",
        "rewards: [null]", "learning_rate: .nan", "picture_cache: .inf", "render_dtype: fp8", "eval_strategy: no",
        "seed: -1", "max_sequence_length: {a: 1}", "common_seeds: perhaps",
    ],
)  # fmt: skip
def test_a_value_of_a_yaml_is_checked_like_a_flag(line, tmp_path, capfd):
    (tmp_path / "bad.yaml").write_text(line)
    words = [*SHAPE.format(out=tmp_path / "new").split(), "--config", str(tmp_path / "bad.yaml")]
    assert importlib.import_module("r1_prompter").main(words) == 2
    assert line.partition(":")[0] in capfd.readouterr().err.splitlines()[-1]


def test_null_unsets_and_lists_mappings_and_none_arrive(tmp_path):
    (tmp_path / "good.yaml").write_text(
        "render_steps: null\nrewards: hps\nheld_out: []\nreport_to: [none]\nreasoning: false\nseed: 7\n"
        "chat_template_kwargs: {enable_thinking: false}\nlr_scheduler_kwargs: {}\nguidance: 1\n"
    )
    words = [*SHAPE.format(out=tmp_path).split(), "--config", str(tmp_path / "good.yaml"), "--guidance", "none"]
    found = importlib.import_module("r1_prompter").parse_options(words)
    assert (found.render.render_steps, found.render.guidance, found.script.reasoning) == (None, None, False)
    assert (found.script.rewards, found.script.held_out, found.training.seed) == (["hps"], [], 7)
    assert found.training.chat_template_kwargs == {"enable_thinking": False}


SIZES = [  # pipeline, step of its sizes
    ("flux", 4), ("flux2", 4), ("qwen_image", 4), ("z_image", 4), ("sd3", 4), ("sdxl", 8), ("sd15", 8), ("sana", 32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "step"), SIZES)
def test_a_size_that_a_pipeline_does_not_draw_is_refused_without_its_weights(name, step, checkpoint, tmp_path):  # noqa: F811
    folder = shutil.copytree(checkpoint(name), tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    for side in (64, 96, 1024):
        assert RenderOptions(str(folder), resolution=side).resolution == side
    for side in (1, step + 1, 2 * step - 1, 65):
        with pytest.raises(UserError, match=f"--resolution {side}: ") as refused:
            RenderOptions(str(folder), resolution=side)
        below, above = side // step * step, side // step * step + step
        assert re.findall(r"\d+", str(refused.value).partition("nearest")[2]) == [str(n) for n in (below, above) if n]
    if name in ("flux", "sd3", "qwen_image", "sdxl"):
        with pytest.raises(UserError, match="max_sequence_length"):
            RenderOptions(str(folder), max_sequence_length=100_000)


# ----- numbers


HAS, LACKS = MappingProxyType({"avx512_bf16": True}), MappingProxyType({"avx512_f": True, "avx2": True})


@pytest.mark.parametrize(
    ("instructions", "level", "dtype"),
    [
        (HAS, "", "bfloat16"), (HAS, "AVX512_CORE_AMX", "bfloat16"), (HAS, "AVX512_CORE", "float32"),
        (HAS, "avx2", "float32"), (LACKS, "", "float32"), (MappingProxyType({"bf16": True}), "ALL", "bfloat16"),
    ],
)  # fmt: skip
def test_a_frozen_model_computes_in_bfloat16_only_where_the_processor_does(instructions, level, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level or "DEFAULT")
    assert pick_dtype("auto", "cpu", frozen=True) == dtype
    assert pick_dtype("auto", "cpu") == "float32"  # a policy
    assert pick_dtype("bfloat16", "cpu", frozen=True) == "bfloat16"


@pytest.mark.parametrize(("has", "policy", "frozen"), [(True, "bfloat16", "bfloat16"), (False, "float32", "float16")])
def test_a_gpu_without_bfloat16_draws_in_float16(has, policy, frozen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    assert (pick_dtype("auto", "cuda:0"), pick_dtype("auto", "cuda:0", frozen=True)) == (policy, frozen)


def test_a_run_writes_down_what_auto_chose_and_goes_on_in_nothing_else(toy, tmp_path, monkeypatch, capfd):
    import r1_prompter

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: LACKS)
    words = ["--config", str(toy.config), "--outdir", str(tmp_path / "run"), "--render_dtype", "auto"]
    assert r1_prompter.main([*words, "--max_steps", "1"]) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["render_dtype"] == config["orm_dtype"] == "float32"
    assert "renderer float32" in capfd.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: HAS)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert r1_prompter.main([*words, "--max_steps", "1", "--resume"]) == 2
    said = capfd.readouterr().err
    assert "render_dtype" in said and "bfloat16" in said and "float32" in said
