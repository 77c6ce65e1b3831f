"""Claims about the doctor: what it says before a run, that its memory table adds up, and that its formulas hold.

pytest tests/test_doctor.py
"""

from __future__ import annotations

import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import r1_prompter
from doctor import __main__ as doctor
from doctor import checks, memory, shapes
from doctor.memory import GB, PHASES
from doctor.report import NOT_RUN, OK, PROBLEM, WARNING
from miniature.judge_server import JudgeServer

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


# ----- whole reports


def test_the_miniature_is_green_and_every_model_of_it_was_used(examine, tmp_path):
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run")
    assert code == found["exit_code"] == 0
    assert {check["state"] for check in found["checks"]} == {OK}
    used = {check["name"] for check in found["checks"]}
    assert {"answers", "picture", *(f"score {name}" for name in ("hps", "gdino", "git", "orm", "format"))} <= used
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_the_same_and_writes_nothing(capsys, tmp_path):
    before = files()
    run = [*MINIATURE, "--outdir", str(tmp_path / "run"), "--dry_run", "true", "--rewards", "hps", "format"]
    assert r1_prompter.main([*run, "--reward_weights", "1", "1"]) == 0
    said = capsys.readouterr().out
    assert "0 problem(s)" in said and "score hps" in said
    assert list(tmp_path.iterdir()) == [] and files() == before
    assert r1_prompter.main([*run, "--reward_weights", "1", "1", "--gpt_path", "/nowhere"]) == 1
    assert "problem  policy             /nowhere is not on this disk" in capsys.readouterr().out


def files() -> list[Path]:
    skipped = {".git", ".venv", "__pycache__", ".pytest_cache"}
    return sorted(path for path in ROOT.rglob("*") if not skipped & set(path.parts))


def test_the_table_of_the_documented_command_adds_up_column_by_column_and_fits(examine):
    code, found = examine(*DOCUMENTED, "--gpus", 8, "--gpu_memory", 80)
    (table,) = found["memory"]
    for phase in PHASES:
        assert sum(row[phase] for row in table["rows"]) == table["total"][phase]
    assert table["fullest"]["bytes"] == max(table["total"].values()) < table["capacity"] == 80 * GB
    assert states(found, "memory") == [OK] and found["advice"] == []
    assert found["batch"]["processes"] == 8 and found["batch"]["completions_per_generation"] == 128
    assert code == 1  # for the weights, which are not here


def test_what_is_shown_adds_up_too_and_no_line_is_wider_than_a_terminal(capsys):
    assert doctor.main([*DOCUMENTED, "--gpus", "1", "--gpu_memory", "24"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    start = next(i for i, line in enumerate(lines) if line.startswith("memory, "))
    end = next(i for i, line in enumerate(lines) if line.startswith("  total"))
    columns = [[float(number) for number in re.findall(r"\d+\.\d+(?=\s|$)", line[44:])] for line in lines[start:end]]
    totals = [float(number) for number in lines[end].split()[1:]]
    for phase, total in enumerate(totals):
        assert sum(row[phase] for row in columns if row) == pytest.approx(total, abs=0.001)


@pytest.mark.parametrize(("gpus", "size"), [(8, 40), (1, 24)])
def test_advice_is_flags_with_which_the_doctor_itself_finds_room(examine, gpus, size):
    planned = ["--gpus", gpus, "--gpu_memory", size]
    _, found = examine(*DOCUMENTED, *planned)
    assert PROBLEM in states(found, "memory") and found["advice"]
    for advice in found["advice"]:
        again = examine(*DOCUMENTED, *planned, *advice["flags"])[1]
        assert again["memory"] == advice["memory"]
        assert again["memory"][0]["fullest"]["bytes"] <= size * GB
        assert set(states(again, "memory")) <= {OK, NOT_RUN}  # main memory of the other machine is not known
        assert states(again, "batch") == [OK]  # groups stay whole


def test_a_renderer_that_nothing_makes_fit_is_said_so_with_its_own_size(examine):
    _, found = examine(*DOCUMENTED, "--gpus", 1, "--gpu_memory", 24)
    said = [check["text"] for check in found["checks"] if check["name"] == "memory"]
    weights = shapes.PIPELINES["black-forest-labs/FLUX.1-dev"].parameters * 2
    alone = f"its weights alone are {weights / GB:.1f} GB"
    assert any(f"no flags that were tried make black-forest-labs/FLUX.1-dev fit: {alone}" in one for one in said)
    assert all("--sdmodel_name" in advice["flags"] for advice in found["advice"])


# ----- problems, each with its value and exit code 1


def test_missing_weights_are_a_problem_with_size_licence_and_command(examine):
    code, found = examine(*DOCUMENTED)
    assert code == 1
    assert "6.2 GB, Qwen Research License -> hf download Qwen/Qwen2.5-3B-Instruct" in problem(found, "policy")
    assert "hf download black-forest-labs/FLUX.1-dev" in problem(found, "renderer")
    assert "hf download xswu/HPSv2 --include 'HPS_v2.1_compressed.pt'" in problem(found, "reward hps")
    assert states(found, "probe") == [NOT_RUN]


def test_half_a_download_is_a_problem_that_names_what_is_missing(examine, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(ROOT / "miniature/weights/policy", policy)
    (policy / "model.safetensors").rename(policy / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", "--gpt_path", policy)
    assert code == 1 and "model-00002-of-00002.safetensors" in problem(found, "policy")
    (policy / "model.safetensors.index.json").unlink()
    (policy / "model-00001-of-00002.safetensors").write_bytes(b"half")
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", "--gpt_path", policy)
    assert code == 1 and "is damaged" in problem(found, "answers")
    assert states(found, "memory") == [NOT_RUN]  # absent, not zero


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
    assert code == 1 and "without a verdict" in problem(found, "score judge")
    assert not (tmp_path / "run").exists()


def test_too_little_disk_is_a_problem(examine, tmp_path):
    pictures = ["--max_steps", 10**9, "--save_images_every", 1]
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", "--probe", "false", *pictures)
    assert code == 1 and "free some" in problem(found, "disk")


def test_a_group_that_cannot_be_whole_is_a_problem(examine, tmp_path):
    split = ["--per_device_train_batch_size", 6, "--processes", 8]
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", "--probe", "false", *split)
    assert code == 1 and "= 6 is not a multiple of num_generations 8" in problem(found, "batch")


def test_a_process_group_that_gives_up_before_the_judges_is_a_problem(examine, tmp_path):
    short = ["--rewards", "judge", "--reward_weights", 1, "--ddp_timeout", 100, "--probe", "false"]
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", *short)
    assert code == 1 and "ddp_timeout 100 s" in problem(found, "rewards")


def test_drawing_that_outlasts_the_process_group_is_a_problem(examine, tmp_path):
    slow = ["--processes", 2, "--ddp_timeout", 1, "--render_batch_size", 1, "--rewards", "format",
            "--reward_weights", 1]  # fmt: skip
    code, found = examine(*MINIATURE, "--outdir", tmp_path / "run", *slow)
    assert code == 1 and "of a ddp_timeout of 1 s" in problem(found, "picture")


def test_options_that_cannot_be_parsed_have_exit_code_2(capsys):
    assert doctor.main([*DOCUMENTED, "--lerning_rate", "1"]) == 2
    assert "did you mean '--learning_rate'" in capsys.readouterr().err


def test_a_version_other_than_the_locked_one_is_a_warning(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"torch=={torch.__version__.split('+')[0]} \\\ntrl==0.0.1 \\\n")
    (found,) = checks.versions(lock)
    assert found.state == WARNING and "(locked: 0.0.1)" in found.text and "torch" not in found.text


# ----- the estimate, by hand


RUN = memory.Run(
    processes=8, gpu=True, zero=2, size=2, mixed=True, adapter=0, quantised=0.0, reference=True, checkpointing=True,
    generated=16, trained=8, prompt=200, completion=512, vllm=0.0, vllm_sleeps=False, chunk=8, resolution=512,
    text=256, render_size=2, render_device=None, reward_batch=8, reward_device=None, offload=False,
)  # fmt: skip
QWEN, FLUX = shapes.POLICIES["Qwen/Qwen2.5-3B-Instruct"], shapes.FLUX
HPS, GDINO = shapes.SCORERS["hps"], shapes.SCORERS["gdino"]
N = 3_085_938_688


def rows(run: memory.Run, device: str = memory.OWN) -> dict[str, tuple[int, ...]]:
    tables = memory.estimate(run, QWEN, FLUX, [HPS, GDINO], 80 * GB)
    return {row.name: row.bytes for table in tables if table.device == device for row in table.rows}


def test_zero_2_shares_gradients_and_twelve_bytes_of_states_and_keeps_weights_whole():
    found = rows(RUN)
    assert found["policy weights"] == (2 * N,) * 4
    assert found["optimiser and master weights"] == (12 * N // 8,) * 4
    share = N // 8
    assert found["gradients"] == (0, 0, 0, 2 * share + max(2 * 500_000_000, 4 * share))
    assert found["reference model"] == (2 * N,) * 4
    assert found["KV cache"][0] == 2 * 36 * 256 * 16 * (200 + 512) * 2


def test_without_deepspeed_states_have_the_parameters_type_and_nothing_is_shared():
    found = rows(replace(RUN, zero=0, processes=1))
    assert found["optimiser and master weights"] == (4 * N,) * 4 and found["gradients"][3] == 2 * N
    assert rows(replace(RUN, zero=0, processes=1, size=4))["optimiser and master weights"] == (8 * N,) * 4
    assert rows(replace(RUN, zero=0))["gradients"][3] == 4 * N  # DistributedDataParallel's buckets are a copy


def test_lora_trains_its_adapter_alone_and_needs_no_reference():
    adapter = memory.lora(QWEN, 64, ["q_proj", "v_proj"])
    assert adapter == 36 * 64 * ((2048 + 2048) + (2048 + 256))
    found = rows(replace(RUN, adapter=adapter))
    assert "reference model" not in found and found["policy weights"][0] == 2 * N + 2 * adapter
    assert found["optimiser and master weights"][0] == 12 * adapter // 8
    four_bit = rows(replace(RUN, adapter=adapter, quantised=memory.FOUR_BIT))["policy weights"][0]
    assert four_bit == int((N - 151936 * 2048) * 0.5625) + 2 * 151936 * 2048 + 2 * adapter


def test_offloaded_rewards_lie_in_main_memory_and_are_on_the_gpu_one_at_a_time():
    run = replace(RUN, offload=True)
    there = rows(run)
    assert not any(name.startswith(("reward hps", "reward gdino")) for name in there)
    most = max(HPS.weights + 8 * HPS.elements * 4, GDINO.weights + 8 * GDINO.elements * 4)
    assert [values for name, values in there.items() if "one at a time" in name] == [(0, 0, most, 0)]
    assert rows(run, memory.MAIN)["reward hps, offloaded"] == (8 * HPS.weights,) * 4


def test_a_device_that_the_options_name_holds_what_all_processes_put_there():
    run = replace(RUN, processes=1, zero=0, render_device="cuda:1")
    assert "renderer transformer" not in rows(run)
    assert rows(run, "cuda:1")["renderer transformer"] == (2 * FLUX.transformer,) * 4
    shared = rows(replace(RUN, render_device="cuda:1"), "cuda:1")
    assert shared["renderer transformer"] == (8 * 2 * FLUX.transformer,) * 4 and "policy weights" in shared


# ----- the estimate, against torch


class Peak(TorchDispatchMode):
    """Bytes alive at once of what operators return while it is active."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key, count):
        self.known.discard(key)
        self.alive -= count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keys", [2, 4])
def test_what_autograd_keeps_of_a_policy_is_within_a_tenth_of_the_formula(keys, checkpointing):
    def kept(layers):
        config = transformers.Qwen2Config(
            hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=keys, vocab_size=100,
        )  # fmt: skip
        model = transformers.Qwen2Model(config).to(torch.bfloat16).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False).last_hidden_state
        assert result.requires_grad
        return sum(one.untyped_storage().nbytes() for key, one in saved.items() if key not in own)

    def formula(layers):
        policy = memory.Policy(0, 0, layers, 64, keys * 16, 192, 100)
        run = replace(RUN, trained=2, prompt=32, completion=32, checkpointing=checkpointing)
        return memory.activations(run, policy)

    assert kept(4) - kept(2) == pytest.approx(formula(4) - formula(2), rel=0.1)  # what grows with the layers


def test_the_peak_of_a_flux_transformer_is_within_a_tenth_of_the_formula():
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    ).to(torch.bfloat16).eval()  # fmt: skip
    places, text, half = 16**2, 32, {"dtype": torch.bfloat16}
    with torch.inference_mode(), Peak() as peak:
        model(
            hidden_states=torch.zeros(2, places, 16, **half), encoder_hidden_states=torch.zeros(2, text, 64, **half),
            pooled_projections=torch.zeros(2, 32, **half), timestep=torch.ones(2, **half), guidance=torch.ones(2),
            img_ids=torch.zeros(places, 3), txt_ids=torch.zeros(text, 3), return_dict=False,
        )  # fmt: skip
    run = replace(RUN, chunk=2, resolution=16 * 16, text=text)
    assert memory.drawing(run, memory.Pipeline(0, 0, 0, 128, 512, 16, 0)) == pytest.approx(peak.most, rel=0.1)


def test_the_peak_of_a_vae_is_three_tensors_of_its_last_block():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), layers_per_block=2, latent_channels=8, norm_num_groups=8, **blocks
    )
    vae = vae.to(torch.bfloat16).eval()
    with torch.inference_mode(), Peak() as peak:
        vae.decode(torch.zeros(2, 8, 8, 8, dtype=torch.bfloat16), return_dict=False)
    estimated = memory.drawing(replace(RUN, chunk=2, resolution=64), memory.Pipeline(0, 0, 0, 1, 1, 64, 32))
    assert estimated * 3 / 4 == pytest.approx(peak.most, rel=0.1)  # the fourth is the convolution's workspace


def test_a_picture_in_groundingdino_is_within_a_tenth_of_the_formula():
    config = transformers.GroundingDinoConfig(encoder_layers=1, decoder_layers=2)  # its layers work one by one
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    ids = torch.tensor([[101, 2000, 1012, 102]])
    with torch.inference_mode(), Peak() as peak:
        model(pixel_values=torch.zeros(1, 3, 512, 512), input_ids=ids, attention_mask=torch.ones_like(ids))
    assert 4 * shapes.detected(512, 256) == pytest.approx(peak.most, rel=0.1)


def test_lora_has_as_many_parameters_as_peft_gives_it():
    from peft import LoraConfig, get_peft_model

    config = transformers.AutoConfig.from_pretrained(ROOT / "miniature/weights/policy")
    for targets in ("q_proj", "v_proj"), ("all-linear",):
        named = list(targets) if targets != ("all-linear",) else "all-linear"
        with torch.device("meta"):
            model = get_peft_model(
                transformers.AutoModelForCausalLM.from_config(config),
                LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=named),
            )
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert memory.lora(shapes.policy(str(ROOT / "miniature/weights/policy")), 8, targets) == trained


# ----- the tables, counted again from the published configurations


def count(build) -> int:
    with torch.device("meta"):
        model = build()
    kept = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied ones once
    return sum(tensor.numel() for tensor in kept.values())


def qwen(width, inner, layers, heads, keys, words, tied):
    return lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=keys, vocab_size=words, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def sd3(width, layers, heads, size, dual=()):
    return lambda: diffusers.SD3Transformer2DModel(
        attention_head_dim=64, caption_projection_dim=width, num_layers=layers, num_attention_heads=heads,
        pos_embed_max_size=size, dual_attention_layers=dual, in_channels=16, out_channels=16, patch_size=2,
        joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm="rms_norm", sample_size=128,
    )  # fmt: skip


def clip_text(width, layers, heads, model=transformers.CLIPTextModelWithProjection):
    return lambda: model(
        transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            projection_dim=width,
        )
    )  # fmt: skip


def clip_h():
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 224, "projection_dim": 1024}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**text, "projection_dim": 1024}, vision_config=vision, projection_dim=1024
        )
    )


def open_clip_h():
    import open_clip

    return open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))


def imagereward():
    from rewards.imagereward import VISION, Network

    bert = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    bert |= {"num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    return Network(VISION, {**bert, "pad_token_id": 0})


def git():
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 420, "patch_size": 14}
    return transformers.GitForCausalLM(transformers.GitConfig(vision_config=vision))


def orm():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14}
    vision |= {"num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "vision_use_head": False}
    text = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    config = transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def t5_xxl():
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
    )


def vae_16():
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def qwen_vl():
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 4, "vocab_size": 152064},
        vision_config=vision,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_4b():
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        )
    )  # fmt: skip


P, S = (
    {path.partition("/")[2]: shape for path, shape in {**shapes.POLICIES, **shapes.PIPELINES}.items()},
    shapes.SCORERS,
)
COUNTED = {
    "Qwen2.5-0.5B": (qwen(896, 4864, 24, 14, 2, 151936, True), P["Qwen2.5-0.5B-Instruct"].parameters),
    "Qwen2.5-1.5B": (qwen(1536, 8960, 28, 12, 2, 151936, True), P["Qwen2.5-1.5B-Instruct"].parameters),
    "Qwen2.5-3B": (qwen(2048, 11008, 36, 16, 2, 151936, True), P["Qwen2.5-3B-Instruct"].parameters),
    "Qwen2.5-7B": (qwen(3584, 18944, 28, 28, 4, 152064, False), P["Qwen2.5-7B-Instruct"].parameters),
    "FLUX.1-dev": (lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), P["FLUX.1-dev"].transformer),
    "FLUX.1-schnell": (diffusers.FluxTransformer2DModel, P["FLUX.1-schnell"].transformer),
    "SD3.5-large": (sd3(2432, 38, 38, 192), P["stable-diffusion-3.5-large"].transformer),
    "SD3.5-medium": (sd3(1536, 24, 24, 384, tuple(range(13))), P["stable-diffusion-3.5-medium"].transformer),
    "Qwen-Image": (diffusers.QwenImageTransformer2DModel, P["Qwen-Image"].transformer),
    "Qwen-Image, text": (qwen_vl, P["Qwen-Image"].encoders),
    "Qwen-Image, VAE": (diffusers.AutoencoderKLQwenImage, P["Qwen-Image"].vae),
    "Z-Image": (diffusers.ZImageTransformer2DModel, P["Z-Image-Turbo"].transformer),
    "Z-Image, text": (qwen3_4b, P["Z-Image-Turbo"].encoders),
    "T5-XXL": (t5_xxl, shapes.T5_XXL),
    "CLIP-L": (clip_text(768, 12, 12, transformers.CLIPTextModel), shapes.CLIP_L),
    "CLIP-L, projected": (clip_text(768, 12, 12), shapes.CLIP_L_PROJECTED),
    "CLIP-bigG": (clip_text(1280, 32, 20), shapes.CLIP_BIG_G),
    "VAE of 16 channels": (vae_16, shapes.VAE_16),
    "HPS v2.1": (open_clip_h, S["hps"].parameters),
    "PickScore": (clip_h, S["pickscore"].parameters),
    "ImageReward": (imagereward, S["imagereward"].parameters),
    "GIT": (git, S["git"].parameters),
    "ORM": (orm, S["orm"].parameters),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_a_table_of_parameters_is_what_the_published_configuration_counts(name):
    build, parameters = COUNTED[name]
    assert count(build) == pytest.approx(parameters, rel=1e-4)  # counters and the like


def test_groundingdino_has_as_many_parameters_as_its_class():
    with torch.device("meta"):
        model = transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == S["gdino"].parameters
