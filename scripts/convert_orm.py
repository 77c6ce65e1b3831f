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

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from errors import UserError
from models.hub import resolve
from rewards.orm import HALF, PUBLISHED
from run.options import option, parse, run_main

NAMES = {  # prefix there -> prefix here; the other prefixes are the same
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
}
TEXT = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "max_position_embeddings", "rope_theta", "rms_norm_eps", "vocab_size",
)  # fmt: skip
TOWER = {  # of mm_vision_tower; without its last layer, which the original drops before its weights are loaded
    "model_type": "siglip_vision_model", "vision_use_head": False, "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip


@dataclass
class Options:
    """The command line."""

    out: str = option(help="New folder, for the converted copy.", changes="run")
    source: str = option(PUBLISHED.repo, "Folder or hub name of the original.", changes="run")


def convert(folder: Path, out: Path) -> None:
    """Write `folder`, in the original layout, to `out` in transformers' own, shard by shard; config.json comes last.

    Raises:
        UserError: another kind of model, a weight that is missing or unknown, or `out` exists.
    """
    original = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if original["model_type"] != "llava_qwen":
        raise UserError(f"{folder / 'config.json'} has model_type {original['model_type']!r}: give a llava_qwen")
    if out.exists():
        raise UserError(f"--out {out} exists: name a new folder")
    tied = original.get("tie_word_embeddings", False)
    text = {key: original[key] for key in TEXT} | {"model_type": "qwen2", "tie_word_embeddings": tied}
    config = LlavaOnevisionConfig(
        text_config=text, vision_config=TOWER, vision_feature_layer=-1, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        expected = set(LlavaOnevisionForConditionalGeneration(config).state_dict())
    shards, names = sorted(folder.glob("*.safetensors")), {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names |= {name: _renamed(name) for name in file.keys()}
    unread = ("model.vision_tower.head.", f"model.vision_tower.encoder.layers.{TOWER['num_hidden_layers']}.")
    unknown = sorted(name for name, ours in names.items() if ours not in expected and not ours.startswith(unread))
    missing = sorted(expected - set(names.values()) - ({"lm_head.weight"} if tied else set()))
    if unknown or missing:
        raise UserError(f"{folder} is no ORM in the original layout: missing {missing[:5]}, unknown {unknown[:5]}")
    out.mkdir(parents=True)
    index = {"metadata": {}, "weight_map": {}}
    for shard in shards:
        kept = {names[name]: tensor for name, tensor in load_file(shard).items() if names[name] in expected}
        save_file(kept, out / shard.name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(kept, shard.name)
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (out / "preprocessor_config.json").write_text(json.dumps(HALF), encoding="utf-8")
    for file in (*folder.glob("*token*.json"), *folder.glob("vocab.json"), *folder.glob("merges.txt")):
        shutil.copyfile(file, out / file.name)
    config.save_pretrained(out)


def _renamed(name: str) -> str:
    prefix = next((there for there in NAMES if name.startswith(there)), None)
    return name if prefix is None else NAMES[prefix] + name.removeprefix(prefix)


def main(argv: Sequence[str]) -> None:
    (options,) = parse((Options,), None, argv)
    convert(resolve(options.source, ("config.json", "tokenizer_config.json")), Path(options.out))


if __name__ == "__main__":
    sys.exit(run_main("convert_orm", lambda: main(sys.argv[1:])))
