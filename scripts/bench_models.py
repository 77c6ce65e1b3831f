"""Models of the real shapes with random weights, built on the device and saved nowhere; and toy ones, for any machine.

Speed and memory do not depend on what weights say, so nothing needs to be fetched to measure them. Words and pictures
are prepared by the tokenizers and processors of the miniature, whose ids every vocabulary here is large enough for;
pictures get the size that the published checkpoint reads. Configurations: those that tests/test_doctor.py counts.
FLOPs are counted by running each model once without data (device "meta"): 2 for a multiplication and an addition.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from interfaces import Reward
from models.frozen import freeze
from rewards import RewardContext, RewardOptions, build

WEIGHTS = Path(__file__).resolve().parent.parent / "miniature" / "weights"
REWARDS = ("hps", "git", "gdino", "orm")


class NoRoom(RuntimeError):
    """A model that does not fit: what it needs and what there is."""


@dataclass(frozen=True)
class Scale:
    """One set of shapes, and the sizes that are measured with it.

    Attributes:
        sides, steps, batches: pixels, denoising steps and pictures a call, all combinations.
        recipe: the side, steps and batch that are measured first.
        published_steps: of the plain loop as it was published (RePrompt's for the real shapes).
        text: tokens that the renderer reads.
        prompt, completion, rollouts, group, micro: of the GRPO step: tokens, tokens, rows, rows a group, rows at once.
        transformer, vae, clip, t5, policy: of the classes' configurations.
        sizes: reward -> side of the pictures that its model reads, None for the miniature's.
        matrix: side of the square matrices whose product is the ceiling.
    """

    name: str
    sides: tuple[int, ...]
    steps: tuple[int, ...]
    batches: tuple[int, ...]
    recipe: tuple[int, int, int]
    published_steps: int
    text: int
    prompt: int
    completion: int
    rollouts: int
    group: int
    micro: int
    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    t5: dict[str, Any]
    policy: dict[str, Any]
    sizes: dict[str, int | None]
    matrix: int


VAE_16 = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
VAE_4 = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
REAL = Scale(
    "real", (512, 1024), (4, 20, 28, 50), (1, 2, 4, 8, 16), (512, 20, 8), 50, 256, 350, 512, 16, 8, 4,
    transformer={"guidance_embeds": True},
    vae=VAE_16,
    clip={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768},
    t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu"},
    policy={"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    sizes={"hps": 224, "git": 420, "gdino": 800, "orm": 384},
    matrix=8192,
)  # fmt: skip
TINY = Scale(
    "tiny", (32, 64), (1, 2), (1, 2), (32, 2, 2), 4, 32, 8, 6, 4, 2, 2,
    transformer={"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                 "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                 "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
    vae=VAE_4,
    clip={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "projection_dim": 32},
    t5={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    policy={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    sizes=dict.fromkeys(REWARDS),
    matrix=256,
)  # fmt: skip
SCALES = {"real": REAL, "tiny": TINY}


# Building ---------------------------------------------------------------------------------------------------------


def flux(scale: Scale, device: torch.device) -> diffusers.FluxPipeline:
    """FLUX.1-dev's components, bfloat16; the same weights at every call.

    Raises:
        NoRoom: it does not fit on `device`.
    """
    torch.manual_seed(0)
    made = {name: _made(build, device) for name, build in _parts(scale).items()}
    words = {"tokenizer": 77, "tokenizer_2": 512}
    for name, length in words.items():
        folder = WEIGHTS / "flux" / name
        made[name] = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=length)
    return diffusers.FluxPipeline(scheduler=_scheduler(), **made)


def _parts(scale: Scale) -> dict[str, Callable[[], torch.nn.Module]]:
    return {
        "transformer": lambda: diffusers.FluxTransformer2DModel(**scale.transformer),
        "vae": lambda: diffusers.AutoencoderKL(**scale.vae),
        "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**scale.clip)),
        "text_encoder_2": lambda: transformers.T5EncoderModel(transformers.T5Config(**scale.t5)),
    }


def _scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def policy(scale: Scale, device: torch.device) -> transformers.PreTrainedModel:
    """A decoder of Qwen2.5's class, bfloat16.

    Raises:
        NoRoom: it does not fit on `device`.
    """
    config = transformers.Qwen2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0, **scale.policy)
    return _made(lambda: transformers.Qwen2ForCausalLM(config), device)


def reward(name: str, scale: Scale, device: torch.device) -> Reward:
    """The project's own reward around a model of the published shapes: what is measured is its code.

    Raises:
        NoRoom: it does not fit on `device`.
    """
    options = RewardOptions(**{f"{name}_path": str(WEIGHTS / name)}, reward_batch_size=8)
    (made,) = build([name], options, RewardContext(str(device)))
    dtype = torch.bfloat16 if name == "orm" else torch.float32
    model = _made(lambda: MODELS[name](scale), device, dtype)
    made.model = freeze(model, device, f"random {name}")
    _fit(made, name, scale.sizes[name])
    return made


def _fit(made: Any, name: str, side: int | None) -> None:
    """Let the reward prepare words and pictures for its new model."""
    folder = WEIGHTS / name
    if name == "hps":
        made.tokenize = functools.partial(made.tokenize, context_length=made.model.context_length)
        made.size = made.model.visual.image_size[0]
    elif name == "git":
        made.longest = made.model.config.max_position_embeddings
        if side:
            made.processor = transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, backend="pil", size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
            )  # fmt: skip
    elif name == "gdino":
        made.max_tokens = made.model.config.max_text_len
        if side:
            made.image_processor = transformers.GroundingDinoImageProcessorPil.from_pretrained(
                folder, local_files_only=True, size={"shortest_edge": side, "longest_edge": 1333}
            )
    else:
        made.size = made.model.config.vision_config.image_size


def _hps(scale: Scale) -> torch.nn.Module:
    here = json.loads((WEIGHTS / "hps" / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    return open_clip.CLIP(**(open_clip.get_model_config("ViT-H-14") if scale.sizes["hps"] else here))


def _git(scale: Scale) -> torch.nn.Module:
    config = _config("git")
    if scale.sizes["git"]:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = transformers.GitConfig(vision_config={**vision, "image_size": scale.sizes["git"], "patch_size": 14})
    return transformers.GitForCausalLM(config)


def _gdino(scale: Scale) -> torch.nn.Module:
    config = transformers.GroundingDinoConfig() if scale.sizes["gdino"] else _config("gdino")
    return transformers.GroundingDinoForObjectDetection(config)


def _orm(scale: Scale) -> torch.nn.Module:
    config = _config("orm")
    if scale.sizes["orm"]:
        vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                  "patch_size": 14, "num_hidden_layers": 26, "num_attention_heads": 16,
                  "image_size": scale.sizes["orm"], "vision_use_head": False}  # fmt: skip
        text = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                "tie_word_embeddings": False}  # fmt: skip
        config = transformers.LlavaOnevisionConfig(
            vision_config=vision, text_config=text, vision_feature_layer=-1, tie_word_embeddings=False
        )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


MODELS = {"hps": _hps, "git": _git, "gdino": _gdino, "orm": _orm}


def _config(name: str) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.from_pretrained(WEIGHTS / name, local_files_only=True)


@contextmanager
def _built_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _made(
    build: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> torch.nn.Module:
    """A model in eval mode, its parameters random and on `device` from the start."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    needs, room = count * dtype.itemsize, free(device)
    if needs > room:
        raise NoRoom(f"needs {needs / 1e9:.1f} GB of weights, has {room / 1e9:.1f}")
    with _built_in(dtype, device):
        return build().to(dtype).eval().requires_grad_(False)


def free(device: torch.device) -> int:
    """Bytes of memory that nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


# Counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of one picture: encoding its text; by side in pixels one step, attention in it, and decoding."""

    text: int
    step: dict[int, int]
    attention: dict[int, int]
    decode: dict[int, int]

    def picture(self, side: int, steps: int) -> int:
        return self.text + steps * self.step[side] + self.decode[side]


@torch.inference_mode()
def count_flops(scale: Scale) -> Flops:
    """Of `flux(scale)`, by running it on the meta device."""
    with _built_in(torch.bfloat16, torch.device("meta")):
        parts = {name: build().eval() for name, build in _parts(scale).items()}
        transformer, vae = parts["transformer"], parts["vae"]
        ids = torch.zeros(1, scale.text, dtype=torch.long)
        text, _ = _counted(lambda: parts["text_encoder_2"](ids))
        more, _ = _counted(lambda: parts["text_encoder"](ids.new_zeros(1, 77)))
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        step, attention, decode = {}, {}, {}
        for side in scale.sides:
            cells = side // shrink
            step[side], attention[side] = _counted(lambda cells=cells: _one_step(transformer, cells // 2, scale.text))
            latents = torch.zeros(1, vae.config.latent_channels, cells, cells)
            decode[side], _ = _counted(lambda latents=latents: vae.decode(latents))
    return Flops(text + more, step, attention, decode)


def _one_step(transformer: torch.nn.Module, patches: int, text: int) -> None:
    config, places = transformer.config, patches**2
    transformer(
        hidden_states=torch.zeros(1, places, config.in_channels),
        encoder_hidden_states=torch.zeros(1, text, config.joint_attention_dim),
        pooled_projections=torch.zeros(1, config.pooled_projection_dim),
        timestep=torch.ones(1),
        guidance=torch.ones(1),
        img_ids=torch.zeros(places, 3),
        txt_ids=torch.zeros(text, 3),
        return_dict=False,
    )


def _counted(run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of a call, and of its attention: products of batches of matrices, or a fused kernel."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_kernel = counter.get_flop_counts()["Global"]
    products = [count for kernel, count in by_kernel.items() if "bmm" in str(kernel) or "attention" in str(kernel)]
    return counter.get_total_flops(), sum(products)
