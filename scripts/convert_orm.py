"""Convert the ORM from its original layout (`llava_qwen`, as published) to that of transformers, which `orm` reads.

    hf download CaraJ/ORM-T2I-R1
    python scripts/convert_orm.py --out orm-native          then train with --orm_path orm-native

Only names differ: the weights are the same tensors in the same precision, but for the last layer and the head of the
vision tower, which the original never uses. `--out` takes as much room as the source, 16 GB.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from errors import UserError
from models.hub import resolve
from rewards.orm import HALF, PUBLISHED
from run.options import option, parse, run_main

NAMES = {  # prefix there -> prefix here
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "max_position_embeddings", "rope_theta", "rms_norm_eps", "vocab_size",
)  # fmt: skip
TOWERS = {  # repository of the vision tower -> its shape, which the original configuration does not say
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
)  # fmt: skip
KIND = {  # the one kind of checkpoint that this is right for
    "model_type": "llava_qwen", "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_layer": -2, "rope_scaling": None, "use_sliding_window": False,
}  # fmt: skip


@dataclass
class Options:
    """The command line."""

    out: str = option(help="New folder, for the converted copy.", changes="run")
    source: str = option(PUBLISHED.repo, "Folder or hub name of the original.", changes="run")


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> None:
        (options,) = parse((Options,), None, sys.argv[1:] if argv is None else argv)
        convert(resolve(options.source, ("config.json", "tokenizer_config.json")), Path(options.out))

    return run_main("convert_orm", work)


def convert(folder: Path, out: Path) -> None:
    """Write `folder`, in the original layout, to `out` in transformers' own, shard by shard; config.json comes last.

    Raises:
        UserError: another kind of model, a weight that is missing or unknown, or `out` exists.
    """
    original = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in KIND.items():
        if original.get(key, value) != value:
            raise UserError(f"{folder / 'config.json'} has {key} {original[key]!r}: only {value!r} can be converted")
    if out.exists():
        raise UserError(f"--out {out} exists: name a new folder")
    config = native_config(original)
    shards = sorted(folder.glob("*.safetensors"))
    names = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names |= {name: native_name(name) for name in file.keys()}
    with torch.device("meta"):
        expected = set(LlavaOnevisionForConditionalGeneration(config).state_dict())
    last = f"model.vision_tower.encoder.layers.{config.vision_config.num_hidden_layers}."
    unread = ("model.vision_tower.head.", last)
    unknown = sorted(name for name, ours in names.items() if ours not in expected and not ours.startswith(unread))
    missing = sorted(expected - set(names.values()) - ({"lm_head.weight"} if config.tie_word_embeddings else set()))
    if unknown or missing:
        raise UserError(f"{folder} is no ORM in the original layout: missing {missing[:5]}, unknown {unknown[:5]}")
    out.mkdir(parents=True)
    weight_map = {}
    for shard in shards:
        kept = {names[name]: tensor for name, tensor in load_file(shard).items() if names[name] in expected}
        save_file(kept, out / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, shard.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (out / "preprocessor_config.json").write_text(json.dumps(HALF), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config.save_pretrained(out)


def native_name(name: str) -> str:
    """The name in transformers' layout of a weight in the original one."""
    for there, here in NAMES.items():
        if name.startswith(there):
            return here + name.removeprefix(there)
    return name


def native_config(original: dict[str, Any]) -> LlavaOnevisionConfig:
    """The configuration in transformers' layout."""
    tower = TOWERS.get(Path(original["mm_vision_tower"]).name)
    if tower is None:
        raise UserError(
            f"mm_vision_tower is {original['mm_vision_tower']!r}: only {', '.join(TOWERS)} can be converted"
        )
    tied = original.get("tie_word_embeddings", False)
    text = {key: original[key] for key in TEXT_FIELDS}
    return LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", "tie_word_embeddings": tied, **text},
        vision_config={  # without the last layer, which the original drops before its weights are loaded
            "model_type": "siglip_vision_model", "vision_use_head": False, **tower,
            "num_hidden_layers": tower["num_hidden_layers"] - 1,
        },
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
