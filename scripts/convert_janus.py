"""Convert a Janus from its authors' layout (`multi_modality`) to that of transformers, which `t2i_r1.py` reads.

    hf download CaraJ/T2I-R1
    python scripts/convert_janus.py --source CaraJ/T2I-R1 --out t2i-r1-native

Weights are the same tensors in the same precision; only names differ, and the vision tower's q, k and v are one tensor
there. deepseek-community/Janus-Pro-1B and -7B are converted already.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from errors import UserError
from models.hub import OLD_JANUS, model_type, read, resolve
from models.janus import Janus, Settings
from models.weights import read_weights
from run.options import option, parse, run_main

THERE, HERE = r"vision_model\.vision_tower", "model.vision_model"
NAMES = (  # pattern there -> name here; the first that fits
    (r"language_model\.lm_head\.(.*)", r"lm_head.\1"),
    (r"language_model\.model\.(.*)", r"model.language_model.\1"),
    (rf"{THERE}\.pos_embed", f"{HERE}.embeddings.position_embedding.weight"),
    (rf"{THERE}\.patch_embed\.proj\.(.*)", rf"{HERE}.embeddings.patch_embedding.\1"),
    (rf"{THERE}\.norm\.(.*)", rf"{HERE}.post_layernorm.\1"),
    (rf"{THERE}\.blocks\.(\d+)\.norm(\d)\.(.*)", rf"{HERE}.encoder.layers.\1.layer_norm\2.\3"),
    (rf"{THERE}\.blocks\.(\d+)\.attn\.proj\.(.*)", rf"{HERE}.encoder.layers.\1.self_attn.projection_layer.\2"),
    (rf"{THERE}\.blocks\.(\d+)\.attn\.(.*)", rf"{HERE}.encoder.layers.\1.self_attn.\2"),
    (rf"{THERE}\.blocks\.(\d+)\.(.*)", rf"{HERE}.encoder.layers.\1.\2"),
    (r"gen_vision_model\.(encoder|decoder)\.mid\.0\.(.*)", r"model.vqmodel.\1.mid.block_1.\2"),
    (r"gen_vision_model\.(encoder|decoder)\.mid\.1\.(.*)", r"model.vqmodel.\1.mid.attn_1.\2"),
    (r"gen_vision_model\.(encoder|decoder)\.mid\.2\.(.*)", r"model.vqmodel.\1.mid.block_2.\2"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.(.*)", r"model.vqmodel.encoder.down.\1.block.\2"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.(.*)", r"model.vqmodel.decoder.up.\1.block.\2"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(.*)", r"model.vqmodel.encoder.down.\1"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(.*)", r"model.vqmodel.decoder.up.\1"),
    (r"gen_vision_model\.(.*)", r"model.vqmodel.\1"),
    (r"gen_aligner\.layers\.0\.(.*)", r"model.generation_aligner.fc1.\1"),
    (r"gen_aligner\.layers\.2\.(.*)", r"model.generation_aligner.hidden_layers.0.\1"),
    (r"aligner\.layers\.0\.(.*)", r"model.aligner.fc1.\1"),
    (r"aligner\.layers\.2\.(.*)", r"model.aligner.hidden_layers.0.\1"),
    (r"gen_head\.output_mlp_projector\.(.*)", r"model.generation_head.proj_out.\1"),
    (r"gen_head\.(.*)", r"model.generation_head.\1"),
    (r"gen_embed\.(.*)", r"model.generation_embeddings.\1"),
)
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")
TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
)  # fmt: skip
LOOKS = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")
MARKS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image_placeholder>{{ '\\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


@dataclass
class Options:
    """The command line."""

    out: str = option(help="New folder, for the converted copy.", changes="run")
    source: str = option(help="Folder or hub name of the original.", changes="run")


def convert(folder: Path, out: Path) -> dict[str, list[str]]:
    """Write `folder`, in the authors' layout, to `out` in transformers' own; returns the names that are not used.

    Raises:
        UserError: another kind of model, a weight that is missing or unknown, or `out` exists.
    """
    if model_type(folder) != OLD_JANUS:
        raise UserError(f"{folder / 'config.json'} has model_type {model_type(folder)!r}: give a {OLD_JANUS!r}")
    if out.exists():
        raise UserError(f"--out {out} exists: name a new folder")
    original = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = read(AutoTokenizer, folder, extra_special_tokens=MARKS, padding_side="left")
    given = dict(weights(folder))
    state = dict(renamed(given))
    config = new_config(original, tokenizer, state)
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    expected, unknown = set(model.state_dict()), sorted(name for name in given if new_name(name) is None)
    unused = [name for name in unknown if name.startswith(UNUSED)]
    unmatched = sorted({*unknown} - {*unused}) + sorted({*state} - expected)
    missing = sorted(expected - {*state})
    if unmatched or missing:
        raise UserError(f"{folder} is no Janus in its authors' layout: missing {missing[:5]}, unknown {unmatched[:5]}")
    model.load_state_dict(state, assign=True)
    looks = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    side = config.vision_config.image_size
    images = JanusImageProcessor(
        size={"height": side, "width": side}, **{key: looks[key] for key in LOOKS if key in looks}
    )
    processor = JanusProcessor(
        images, tokenizer, chat_template=TEMPLATE, num_image_tokens=config.vision_config.num_image_tokens
    )
    janus = Janus(model, processor)
    janus.keep_settings(Settings())
    janus.save(out)
    return {"unused": unused}


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder, by their names there."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} has neither *.safetensors nor pytorch_model*.bin: fetch it again")
    for file in files:
        yield from read_weights(file).items()


def new_name(name: str) -> str | None:
    """What a weight is called here, None if it is not used or not known."""
    if name.startswith(UNUSED):
        return None
    for pattern, here in NAMES:
        if found := re.fullmatch(pattern, name):
            return found.expand(here)
    return None


def renamed(given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All weights that have a name here, the vision tower's attention in three."""
    for name, tensor in given.items():
        if (here := new_name(name)) is None:
            continue
        if ".self_attn.qkv." in here:
            for part, which in zip(tensor.chunk(3), "qkv", strict=True):
                yield here.replace(".qkv.", f".{which}_proj."), part.clone()
        else:
            yield here, tensor[0] if here.endswith("position_embedding.weight") and tensor.dim() == 3 else tensor


def new_config(original: Mapping[str, Any], tokenizer: Any, state: Mapping[str, Tensor]) -> JanusConfig:
    """What transformers wants to know, of the original's config and the shapes of its weights."""
    params = {part: original[f"{part}_config"]["params"] for part in ("vision", "aligner", "gen_vision", "gen_head")}
    text = {key: original["language_config"][key] for key in TEXT if key in original["language_config"]}
    width, _, patch, _ = state["model.vision_model.embeddings.patch_embedding.weight"].shape
    places = len(state["model.vision_model.embeddings.position_embedding.weight"])
    layers = 1 + max(
        int(name.split(".")[4]) for name in state if name.startswith("model.vision_model.encoder.layers.")
    )
    vision = JanusVisionConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64), patch_size=patch,
        image_size=params["vision"]["image_size"], num_image_tokens=places,
        projection_dim=params["aligner"]["n_embed"], depth=params["aligner"]["depth"],
    )  # fmt: skip
    codes, dim = state["model.vqmodel.quantize.embedding.weight"].shape
    vq = JanusVQVAEConfig(
        embed_dim=dim, num_embeddings=codes, projection_dim=params["gen_head"]["n_embed"],
        image_token_embed_dim=params["gen_head"]["image_token_embed"], **vq_shape(state),
    )  # fmt: skip
    language = LlamaConfig(
        **text, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return JanusConfig(
        text_config=language, vision_config=vision, vq_config=vq,
        tie_word_embeddings=False, image_token_id=tokenizer.convert_tokens_to_ids(MARKS["image_token"]),
    )  # fmt: skip


def vq_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The VQ's sizes, of its encoder's weights."""
    prefix = "model.vqmodel.encoder."
    base = len(state[f"{prefix}conv_in.weight"])
    levels = 1 + max(int(name.split(".")[4]) for name in state if name.startswith(f"{prefix}down."))
    blocks = {name.split(".")[6] for name in state if name.startswith(f"{prefix}down.0.block.")}
    outputs = [
        len(state[f"{prefix}down.{level}.block.{len(blocks) - 1}.conv2.weight"]) // base if blocks else 1
        for level in range(levels)
    ]
    return {
        "base_channels": base, "num_res_blocks": len(blocks), "channel_multiplier": outputs,
        "latent_channels": len(state[f"{prefix}conv_out.weight"]),
    }  # fmt: skip


def main() -> None:
    (options,) = parse((Options,), None, sys.argv[1:])
    folder = resolve(
        options.source, ("config.json", "tokenizer_config.json", "preprocessor_config.json"), pickles=True
    )
    found = convert(folder, Path(options.out))
    print(f"{options.out}: every weight of transformers' Janus is there; {len(found['unused'])} of the original's are "
          f"not used: {', '.join(found['unused'][:8])}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main("convert_janus", main))
