"""Claims about the doctor: what it finds before a run, that it writes nothing, and the formulas of its estimate."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import r1_prompter
import t2i_r1
from doctor import __main__ as doctor
from doctor import checks, janus, memory
from doctor.report import GB, NOT_RUN, OK, PROBLEM, WARNING, Plan
from miniature.judge_server import JudgeServer
from tests.processes import ENVIRONMENT, launcher

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ["--config", "configs/miniature.yaml"]
DOCUMENTED = ["--data", "data/generation_prompts_1k_filterd.txt", "--gpt_path", "Qwen/Qwen2.5-3B-Instruct",
              "--sdmodel_name", "black-forest-labs/FLUX.1-dev", "--outdir", "nowhere"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def examine(capsys):
    """Exit code and JSON of `python -m doctor`, in this process."""

    def run(*argv: object) -> tuple[int, dict]:
        capsys.readouterr()
        code = doctor.main([*map(str, argv), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def states(found: dict, name: str) -> list[str]:
    return [check["state"] for check in found["checks"] if check["name"] == name]


def problem(found: dict, name: str) -> str:
    """Text and action of the problem of that name; fails if there is none."""
    (one,) = [check for check in found["checks"] if check["name"] == name and check["state"] == PROBLEM]
    return f"{one['text']} -> {one['action']}"


# ----- reports


def test_the_miniature_is_green_and_every_model_of_it_was_used(examine, tmp_path):
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run")
    assert code == found["exit_code"] == 0
    assert {check["state"] for check in found["checks"]} == {OK}
    used = {check["name"] for check in found["checks"]}
    assert {"answers", "pictures", *(f"score {name}" for name in ("hps", "gdino", "git", "orm", "format"))} <= used
    (hps,) = [check["text"] for check in found["checks"] if check["name"] == "score hps"]
    assert "reads 32 tokens of a prompt, which cuts 0 of " in hps
    assert list(tmp_path.iterdir()) == []


def test_the_documented_command_fits_eight_gpus_of_80_gb_and_not_one_of_24(examine):
    code, found = examine(*DOCUMENTED, "--gpus", 8, "--gpu_memory", 80)
    assert states(found, "memory") == [OK] and found["batch"]["completions_per_generation"] == 128
    assert code == 1  # for the weights, which are not here
    _, found = examine(*DOCUMENTED, "--gpus", 1, "--gpu_memory", 24)
    assert states(found, "memory") == [PROBLEM] and sum(found["memory"].values()) > 24 * GB
    _, found = examine(*DOCUMENTED, "--gpus", 8, "--gpu_memory", 60)
    assert states(found, "memory") == [WARNING]  # less than a fifth is left for activations


def test_the_text_names_the_problems_at_its_end(capsys):
    assert doctor.main([*DOCUMENTED, "--gpus", "1", "--gpu_memory", "24"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "Problems: policy, renderer, reward hps" in lines[-1]
    assert sum("-> hf download" in line for line in lines) == 5, "each command on a line of its own, to be copied"


@pytest.mark.slow
def test_a_launch_examines_its_own_processes_and_its_deepspeed_and_prints_once(tmp_path):
    flags = [*MINIATURE, "--outdir", tmp_path / "run", "--probe", "false", "--json"]
    command = launcher("doctor", *flags, module=True)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])  # DeepSpeed may say something before
    assert found["plan"]["processes"] == found["batch"]["processes"] == found["plan"]["zero"] == 2
    assert not (tmp_path / "run").exists()


# ----- problems


BAD = [  # flags beside the miniature's, the check that fails, and what it names
    (["--data", "nowhere.txt"], "data", "nowhere.txt"),
    (["--per_device_train_batch_size", 6, "--processes", 8], "batch", "num_generations 8"),
    (["--outdir", "README.md"], "outdir", "README.md"),
    (["--rewards", "judge", "--reward_weights", 1, "--ddp_timeout", 100], "rewards", "ddp_timeout"),
    (["--reward_weights", 1, 1], "rewards", "reward_weights"),
    (["--gpt_path", "/nowhere"], "policy", "/nowhere"),
    (["--max_steps", 10**9, "--save_images_every", 1], "disk", "--save_images_max"),
]


@pytest.mark.parametrize(("flags", "name", "named"), BAD)
def test_a_problem_has_exit_code_1_and_names_the_option_or_its_value(examine, tmp_path, flags, name, named):
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", "--probe", "false", *flags)
    assert code == 1 and named in problem(found, name)
    assert states(found, "probe") == [NOT_RUN]


@pytest.mark.parametrize("flag", ["--lerning_rate", "--gpus"])
def test_options_that_cannot_be_parsed_have_exit_code_2(capsys, flag):
    assert doctor.main([*DOCUMENTED, flag, "x"]) == 2
    assert flag in capsys.readouterr().err


def test_missing_weights_are_a_problem_with_size_licence_and_command(examine):
    said = problem(examine(*DOCUMENTED)[1], "policy")
    assert "6.2 GB, Qwen Research License" in said and "hf download Qwen/Qwen2.5-3B-Instruct" in said


def test_half_a_download_is_a_problem_that_names_what_is_missing(examine, tmp_path):
    policy, renderer = tmp_path / "policy", tmp_path / "flux"
    shutil.copytree(ROOT / "miniature/weights/policy", policy)
    shutil.copytree(ROOT / "miniature/weights/flux", renderer)
    shutil.rmtree(renderer / "vae")
    (policy / "model.safetensors").rename(policy / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    mine = [*MINIATURE, "--outdir", tmp_path / "run", "--gpt_path", policy]
    code, found = examine(*mine, "--sdmodel_name", renderer)
    assert code == 1 and "model-00002-of-00002.safetensors" in problem(found, "policy")
    assert "vae" in problem(found, "renderer")
    (policy / "model.safetensors.index.json").unlink()
    (policy / "model-00001-of-00002.safetensors").write_bytes(b"half")
    code, found = examine(*mine, "--rewards", "format", "--reward_weights", 1, "--probe", "true")
    assert code == 1 and "model-00001-of-00002.safetensors" in problem(found, "answers")
    assert states(found, "memory") == [NOT_RUN] and not found["memory"]  # absent, not zero


def test_a_dead_judge_is_a_problem_and_a_live_one_is_asked_a_real_question(examine, tmp_path):
    judged = [*MINIATURE, "--outdir", tmp_path / "run", "--rewards", "judge", "preference", "--probe", "false",
              "--reward_weights", 1, 1]  # fmt: skip
    code, found = examine(*judged, "--judge_url", "http://127.0.0.1:9/v1")
    assert code == 1 and "http://127.0.0.1:9/v1" in problem(found, "score judge")
    with JudgeServer(lambda samples: [0.9] * len(samples)) as url:
        code, found = examine(*judged, "--judge_url", url)
    assert code == 0 and states(found, "score judge") == states(found, "score preference") == [OK]
    with JudgeServer(lambda samples: [0.9] * len(samples), garbage_share=1.0) as url:
        code, found = examine(*judged, "--judge_url", url)
    assert code == 1 and url in problem(found, "score judge")
    for status in (400, 401, 404, 413):  # the faulty server's words are "asked for"
        with JudgeServer(lambda samples: [], fail_share=1.0, fail_status=status) as url:
            _, found = examine(*judged, "--judge_url", url)
        assert "asked for" in problem(found, "score judge") and "asked for" in problem(found, "score preference")


def test_a_version_other_than_the_locked_one_is_a_warning(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"torch=={torch.__version__.split('+')[0]} \\\ntrl==0.0.1 \\\n")
    found = checks.versions(lock)
    assert found.state == WARNING and "0.0.1" in found.text and "torch" not in found.text


# ----- the estimate, by hand


N, B, EIGHT = 3_085_938_688, 500_000_000, Plan(8, 80 * GB, processes=8, zero=2, here=False)
FLUX = memory.RENDERERS["black-forest-labs/FLUX.1-dev"]


def rows(plan: Plan, *flags: str) -> dict[str, int]:
    """The estimate of the documented command: 8 x 2 answers of 512 tokens a process."""
    with pytest.MonkeyPatch.context() as patch:  # packages that the machine which is planned for may have
        for module in ("run.options", "rendering.options"):
            patch.setattr(f"{module}.need", lambda package, asker: None)
        options = r1_prompter.parse_options([*DOCUMENTED, *flags])
    options.render.settle("cuda" if plan.gpus else "cpu")
    options.reward.settle("cuda" if plan.gpus else "cpu")
    return memory.estimate(options, plan)


def test_zero_2_shares_gradients_and_twelve_bytes_of_states_and_keeps_weights_whole():
    found = rows(EIGHT)
    assert found["policy's weights"] == 2 * N
    assert found["optimiser"] == 12 * N // 8
    assert found["gradients"] == 2 * N // 8 + 2 * B  # and the bucket that is reduced
    assert found["KV cache"] == 2 * 36 * 256 * 16 * (300 + 512) * 2
    assert found["logits"] == 4096 * 32768 * 2 + 151936 * 2048 * (4 + 2)
    assert rows(EIGHT, "--beta", "0.1")["reference model"] == 2 * N


def test_without_deepspeed_states_have_the_parameters_type_and_nothing_is_shared():
    found = rows(Plan(1, 80 * GB))
    assert found["optimiser"] == 4 * N and found["gradients"] == 2 * N
    assert rows(Plan(1, 80 * GB), "--dtype", "float32")["optimiser"] == 8 * N
    assert rows(Plan(8, 80 * GB, processes=8))["gradients"] == 4 * N  # DistributedDataParallel keeps a copy


def test_lora_trains_its_adapter_alone_and_needs_no_reference():
    adapter = 36 * 64 * (4 * 2 * 2048 - 2 * (2048 - 256) + 3 * (2048 + 11008))  # every linear layer, at rank 64
    lora = ["--use_peft", "true", "--lora_r", "64", "--beta", "0.1"]
    found = rows(EIGHT, *lora)
    assert "reference model" not in found and found["policy's weights"] == 2 * N + 2 * adapter
    assert found["optimiser"] == 12 * adapter // 8
    assert rows(EIGHT, *lora, "--load_in_4bit", "true")["policy's weights"] == int(N * 0.5625) + 2 * adapter


def test_the_estimate_counts_what_lies_on_the_gpu_of_each_process():
    assert rows(EIGHT)["renderer's denoiser"] == 2 * FLUX[0]
    assert rows(EIGHT, "--render_quantization", "nf4")["renderer's denoiser"] == int(FLUX[0] * 0.5625)
    assert rows(EIGHT, "--render_offload_text", "true")["renderer's text encoders"] == 0
    assert rows(EIGHT, "--reward_offload", "true")["rewards, one at a time"] == 4 * memory.SCORERS["hps"]
    elsewhere = rows(EIGHT, "--render_device", "cuda:1")
    assert not any("renderer" in name or "reward " in name for name in elsewhere)
    vllm = ["--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.2"]
    assert rows(EIGHT, *vllm)["vLLM"] == 16 * GB
    cpu = rows(Plan(0, 80 * GB, processes=2))
    assert cpu["renderer's VAE"] == 2 * 2 * FLUX[2]  # both processes share main memory


def parameters(build) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def test_the_tables_are_what_the_published_configurations_count():
    for policy in memory.POLICIES.values():
        heads = policy.width // 64 if policy.width < 2048 else policy.width // 128
        config = transformers.Qwen2Config(
            hidden_size=policy.width, intermediate_size=policy.inner, num_hidden_layers=policy.layers,
            num_attention_heads=heads, num_key_value_heads=heads * policy.keys // policy.width,
            vocab_size=policy.vocabulary, tie_word_embeddings=policy.width < 3584,
        )  # fmt: skip
        assert parameters(lambda config=config: transformers.Qwen2ForCausalLM(config)) == policy.parameters
    assert parameters(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True)) == FLUX[0]


def test_a_folder_counts_the_parameters_of_the_model_in_it():
    path = ROOT / "miniature/weights/policy"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert memory.policy_of(str(path)).parameters == sum(one.numel() for one in model.parameters())


# Janus --------------------------------------------------------------------------------------------------------------


def test_a_janus_of_7b_fits_where_the_published_code_with_its_released_rewards_does_not(capsys):
    assert janus.main(["--gpus", "8", "--gpu_memory", "80", "--outdir", "x"]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    mine, plain, released = map(float, total.split()[1:])
    assert mine < 72 < 80 < released and plain < released


@pytest.mark.parametrize("more", [["--image_batch", "64"], ["--ema_decay", "0.9"]])
def test_what_makes_it_too_large_is_told_by_the_exit_code(more, capsys):
    assert janus.main(["--outdir", "x", *more]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_shares_become_smaller_with_more_gpus():
    options = t2i_r1.parse_options(["--outdir", "x"])
    model = janus.MODELS["deepseek-community/Janus-Pro-7B"]
    one, many = (janus.ours(options, model, gpus, 3) for gpus in (4, 16))
    assert many["weights"] == one["weights"] / 4 and many["KV cache of drawing"] == one["KV cache of drawing"]
    assert janus.cache(model, 1, 424) == 2 * 2 * 30 * 4096 * 1000  # keys and values, two bytes each, 1,000 tokens
