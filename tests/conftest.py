"""The toy stack: real classes, tiny and random, saved as real checkpoints are, to run the real scripts on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.processes import ENVIRONMENT, ROOT

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LESSONS = 120  # enough that most answers can be read and some cannot
PROMPTS = ["a photo of a red cat", "a photo of two dogs", "a photo of a cat left of a dog", "a photo of a blue cup"]


@dataclass(frozen=True)
class ToyStack:
    """Paths of the toy checkpoints, and the YAML that runs the trainer on them."""

    prompts: Path
    policy: Path
    flux: Path
    hps: Path
    config: Path


def pytest_configure(config: pytest.Config) -> None:
    """A build of DeepSpeed's helper that was killed leaves a lock, for which every later run would wait in vain."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for lock in Path(ENVIRONMENT["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
            lock.unlink()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test has not run: the suite fails, unless it lacks a GPU or Chromium (which .ci/run brings)."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = terminal.stats.get("skipped", []) if terminal else []
    reasons = [str(report.longrepr) for report in skipped]
    if any("needs a GPU" not in why and "needs Chromium" not in why for why in reasons):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> ToyStack:
    root = tmp_path_factory.mktemp("toy")
    stack = ToyStack(root / "prompts.txt", root / "policy", root / "flux", root / "hps", root / "toy.yaml")
    torch.manual_seed(0)
    stack.prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    _flux().save_pretrained(stack.flux)
    save_policy(stack.policy)
    _save_hps(stack.hps)
    stack.config.write_text(yaml.safe_dump(_options(stack)), encoding="utf-8")
    return stack


@pytest.fixture(scope="session")
def tiny_janus(tmp_path_factory) -> Path:
    """A Janus with the miniature's words, and random weights."""
    from tests.tiny import random_janus

    folder = tmp_path_factory.mktemp("janus") / "tiny"
    random_janus().save(folder)
    return folder


@pytest.fixture(scope="session")
def flow_runs(tmp_path_factory) -> dict[str, Path]:
    """A run of pref_grpo.py on the miniature that trained a LoRA, and one that trained all weights; one step each."""
    import pref_grpo

    words = f"--config {ROOT}/configs/miniature_flow.yaml --max_steps 1 --prompts_per_step 2 --num_generations 2 "
    words += "--render_batch_size 4 --render_steps 2 --resolution 16 --rewards git --reward_weights 1 "
    words += "--eval_prompts 4 --learning_rate"
    kinds = {"lora": "0.1 --use_peft true --lora_r 4 --lora_alpha 12", "full": "0.002"}
    runs = {kind: tmp_path_factory.mktemp("flow") / kind for kind in kinds}
    for kind, more in kinds.items():
        assert pref_grpo.main([*words.split(), *more.split(), "--outdir", str(runs[kind])]) == 0
    return runs


def _options(stack: ToyStack) -> dict:
    paths = {"data": stack.prompts, "gpt_path": stack.policy, "sdmodel_name": stack.flux, "hps_path": stack.hps}
    drawing = {"render_steps": 1, "resolution": 16, "max_sequence_length": 64, "render_dtype": "float32"}
    batch = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    numbers = {"dtype": "float32", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    length = {"max_completion_length": 40, "length_low": 4, "length_high": 40, "learning_rate": 1e-3}
    rewards = {"rewards": ["hps", "format", "length"]}
    record = {"max_steps": 2, "save_steps": 1, "save_images_every": 1}
    return {**{k: str(v) for k, v in paths.items()}, **drawing, **batch, **numbers, **length, **rewards, **record}


def _characters(length: int, *, bos: bool = False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", *map(chr, range(32, 127)), "\n", "</s>"]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [(name, names.index(name)) for name in ("<s>", "</s>")]
    single = "<s> $A </s>" if bos else "$A </s>"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **marks)


def _flux():
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=100,
        projection_dim=32, bos_token_id=2, eos_token_id=99, pad_token_id=0,
    )  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=_characters(77, bos=True),
        text_encoder_2=T5EncoderModel(
            T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=100)
        ),
        tokenizer_2=_characters(512),
        transformer=transformer,
    )


def save_policy(folder: Path, prompts: Sequence[str] = PROMPTS) -> None:
    """A Qwen2 that has half learnt the format, so that a group holds readable and unreadable answers to `prompts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from prompting import completion, messages

    answers = [completion(f"a {c} {n}", f"a {c} {n}") for c in ("red", "blue", "big") for n in ("cat", "dog", "cup")]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([m["content"] for text in PROMPTS for m in messages(text)] + answers * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    policy = Qwen2ForCausalLM(config)
    chats = [
        tokenizer.apply_chat_template(messages(prompts[i % len(prompts)]), tokenize=False, add_generation_prompt=True)
        + f"{answer}<|im_end|>"
        for i, answer in enumerate(answers * math.ceil(len(prompts) / len(answers)))
    ]
    ids = tokenizer(chats, return_tensors="pt", padding=True)
    labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(LESSONS):
        policy(**ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_hps(folder: Path) -> None:
    import json

    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    tokenizer = _characters(77, bos=True)
    tokenizer.save_pretrained(folder)
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "hf_tokenizer_name": "."}
    pooling = {"pool_type": "eos", "eos_id": 99, "pad_id": 0}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, **pooling}}
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
