"""The shapes of models for doctor/memory.py, without their weights: from a folder's configuration, or from tables.

A model that lies on this disk is counted there (headers of its safetensors files), its widths are its config.json's.
The tables hold published models that may not be here; their counts are of the classes built from the published
configurations, and tests/test_doctor.py counts them again.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from clients.http import is_url
from doctor.memory import Pipeline, Policy, Scorer
from errors import UserError
from models.weights import locked

WORDS = 151936  # rows of Qwen2.5's embeddings; 152064 in 7B
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


POLICIES = {
    "Qwen/Qwen2.5-0.5B-Instruct": Policy(494_032_768, WORDS * 896, 24, 896, 128, 4864, WORDS),
    "Qwen/Qwen2.5-1.5B-Instruct": Policy(1_543_714_304, WORDS * 1536, 28, 1536, 256, 8960, WORDS),
    "Qwen/Qwen2.5-3B-Instruct": Policy(3_085_938_688, WORDS * 2048, 36, 2048, 256, 11008, WORDS),
    "Qwen/Qwen2.5-7B-Instruct": Policy(7_615_616_512, 2 * 152064 * 3584, 28, 3584, 512, 18944, 152064),
}
T5_XXL, CLIP_L, CLIP_BIG_G, VAE_16 = 4_762_310_656, 123_060_480, 694_659_840, 83_819_683
CLIP_L_PROJECTED = CLIP_L + 768 * 768
FLUX = Pipeline(11_901_408_320, T5_XXL + CLIP_L, VAE_16, 3072, 12288, 16, 256)
SD3_TEXT = T5_XXL + CLIP_L_PROJECTED + CLIP_BIG_G
ELSEWHERE = Pipeline(0, 0, 0, 0, 0, 1, 0)  # servers draw: no memory here
PIPELINES = {
    "black-forest-labs/FLUX.1-dev": FLUX,
    "black-forest-labs/FLUX.1-schnell": Pipeline(11_891_178_560, T5_XXL + CLIP_L, VAE_16, 3072, 12288, 16, 256),
    "stabilityai/stable-diffusion-3.5-large": Pipeline(8_146_280_768, SD3_TEXT, VAE_16, 2432, 9728, 16, 256, 2),
    "stabilityai/stable-diffusion-3.5-medium": Pipeline(2_469_663_936, SD3_TEXT, VAE_16, 1536, 6144, 16, 256, 2),
    "Qwen/Qwen-Image": Pipeline(20_430_401_088, 8_292_166_656, 126_892_531, 3072, 12288, 16, 192),
    "Tongyi-MAI/Z-Image-Turbo": Pipeline(6_154_908_736, 4_022_468_096, VAE_16, 3840, 10240, 16, 256, 2),
}


def seen(tokens: int, width: int, inner: int, heads: int = 0) -> int:
    """Elements alive at once in a transformer for one picture: tokens x (4 width + 3 inner), as memory.alive; and
    1.5 x heads x tokens^2 where attention scores are held (`heads` above 0)."""
    return tokens * (4 * width + 3 * inner) + 3 * heads * tokens**2 // 2


def detected(side: int, width: int, levels: int = 4, points: int = 4) -> int:
    """Of GroundingDINO on side x side pixels: its tokens (patches of 8, 16, ... pixels) x levels x points x width x 4.

    Deformable attention holds the sampled values of all levels and points about four times.
    """
    tokens = sum((side // 2 ** (level + 3)) ** 2 for level in range(levels))
    return tokens * levels * points * width * 4


PATCHES_H = (224 // 14) ** 2 + 1
ANSWERED = 128  # tokens of an ORM's question, beside the picture's
SCORERS = {
    "hps": Scorer("hps", 986_109_441, 4, seen(PATCHES_H, 1280, 5120)),
    "pickscore": Scorer("pickscore", 986_109_441, 4, seen(PATCHES_H, 1280, 5120)),
    "imagereward": Scorer("imagereward", 446_206_689, 4, seen((224 // 16) ** 2 + 1, 1024, 4096)),
    "git": Scorer("git", 394_855_482, 4, seen((420 // 14) ** 2 + 1, 1024, 4096, heads=16)),
    "gdino": Scorer("gdino", 172_250_626, 4, detected(800, 256)),
    "orm": Scorer("orm", 8_030_348_832, 2, seen((384 // 14) ** 2 + 1 + ANSWERED, 3584, 18944)),
}


# What lies on this disk -------------------------------------------------------------------------------------------


def folder_of(path: str) -> Path | None:
    """The folder at `path`, or that of the hub's local cache; None if this disk has neither."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or Path(path).exists() or path.startswith((".", "/")):
        return None
    try:
        return Path(snapshot_download(path, revision=locked(path).revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def missing_files(folder: Path) -> list[str]:
    """What a checkpoint's folder lacks: weights, shards that an index names, or parts that model_index.json names.

    Raises:
        UserError: one of its JSON files is damaged.
    """
    parts, lacking = [folder], []
    if (folder / "model_index.json").is_file():
        named = [name for name, of in _json(folder / "model_index.json").items() if isinstance(of, list) and of[0]]
        lacking += [f"{name}/" for name in named if not (folder / name).is_dir()]
        parts = [folder / name for name in named if (folder / name / "config.json").is_file()]
    for part in parts:
        if not any(file for pattern in WEIGHTS for file in part.glob(pattern)):
            lacking.append(f"weights in {part.name}/")
    for index in (file for part in parts for file in part.glob("*.index.json")):
        shards = sorted(set(_json(index)["weight_map"].values()))
        lacking += [
            str((index.parent / shard).relative_to(folder)) for shard in shards if not (index.parent / shard).is_file()
        ]
    return lacking


def bytes_of(path: Path) -> int:
    """Of a file, or of all files in a folder; links are followed."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def count(folder: Path) -> int:
    """Parameters in the safetensors files of a folder itself: what their headers say; 0 if there is none."""
    return sum(_count(file) for file in folder.glob("*.safetensors"))


def _count(file: Path) -> int:
    """A safetensors file begins with 8 bytes, the length of the JSON that follows: name -> {"shape": ...}."""
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except (struct.error, ValueError) as error:
        raise UserError(f"{file} is no safetensors file ({error}): fetch it again") from error
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def policy(path: str) -> Policy | None:
    """Of the folder at `path` or in the hub's cache, of its base model for an adapter; else of POLICIES; else None."""
    path = base_of(path) or path
    folder = folder_of(path)
    if folder is None or not (folder / "config.json").is_file():
        return POLICIES.get(path)
    config = _json(folder / "config.json")
    if "num_attention_heads" not in config:  # not a plain decoder
        return None
    heads, width, words = config["num_attention_heads"], config["hidden_size"], config["vocab_size"]
    keys = config.get("num_key_value_heads", heads) * config.get("head_dim", width // heads)
    embeddings = words * width * (1 if config.get("tie_word_embeddings", True) else 2)
    layers, inner = config["num_hidden_layers"], config["intermediate_size"]
    return Policy(count(folder), embeddings, layers, width, keys, inner, words)


def base_of(path: str) -> str | None:
    """The base model of the adapter folder at `path`; None if it is no adapter."""
    file = Path(path, "adapter_config.json")
    return _json(file)["base_model_name_or_path"] if file.is_file() else None


def adapter(path: str) -> int:
    """Parameters of the adapter at `path`; 0 if it is none."""
    return count(Path(path)) if base_of(path) else 0


def pipeline(path: str) -> Pipeline | None:
    """Of the diffusers folder at `path` or in the hub's cache; else of PIPELINES; else None. Servers: ELSEWHERE."""
    if is_url(path):
        return ELSEWHERE
    folder = folder_of(path)
    if folder is None:
        return PIPELINES.get(path)
    core = next((part for part in ("transformer", "unet") if (folder / part / "config.json").is_file()), None)
    if core is None or not (folder / "vae" / "config.json").is_file():
        return None
    shape, vae = _json(folder / core / "config.json"), _json(folder / "vae" / "config.json")
    channels = vae.get("block_out_channels") or [vae.get("base_dim", 128) * times for times in (1, 2, 4, 4)]
    width = shape.get("dim") or shape.get("num_attention_heads", 0) * shape.get("attention_head_dim", 0)
    side = 2 ** (len(channels) - 1) * (2 if core == "transformer" else 1)
    known = PIPELINES.get(path)
    return Pipeline(
        count(folder / core),
        sum(count(part) for part in folder.glob("text_encoder*")),
        count(folder / "vae"),
        width or 2 * shape["block_out_channels"][0],
        4 * (width or 2 * shape["block_out_channels"][0]),
        side,
        channels[1],
        known.passes if known else 1 if "Flux" in shape["_class_name"] else 2,
    )


def scorer(name: str, path: str, size: int) -> Scorer | None:
    """Of a reward's folder at `path` or in the hub's cache; else of SCORERS; None for a reward without weights.

    Args:
        name: of the reward.
        path: its folder, or a published name.
        size: bytes of a parameter as it is loaded.
    """
    if name not in SCORERS:
        return None
    folder = folder_of(path)
    if folder is None or not count(folder):
        known = SCORERS[name]
        return Scorer(name, known.parameters, size, known.elements)
    return Scorer(name, count(folder), size, _elements(name, folder))


def _elements(name: str, folder: Path) -> int:
    """Elements alive at once for one picture, as `SCORERS` has them, by the folder's own configuration."""
    if name == "hps":
        vision = _json(folder / "open_clip_config.json")["model_cfg"]["vision_cfg"]
        inner = int(vision["width"] * vision.get("mlp_ratio", 4))
        return seen((vision["image_size"] // vision["patch_size"]) ** 2 + 1, vision["width"], inner)
    if name == "imagereward":
        own = folder / "vision_config.json"
        return _vit(_json(own)) if own.is_file() else SCORERS[name].elements
    config = _json(folder / "config.json")
    if name == "gdino":
        side = _json(folder / "preprocessor_config.json")["size"]["shortest_edge"]
        return detected(side, config["d_model"], config["num_feature_levels"], config["encoder_n_points"])
    vision = config.get("vision_config", {})
    if "image_size" not in vision:
        return SCORERS[name].elements
    if name == "orm":
        tokens, text = (vision["image_size"] // vision["patch_size"]) ** 2 + 1 + ANSWERED, config["text_config"]
        return seen(tokens, text["hidden_size"], text["intermediate_size"])
    return _vit(vision, heads=vision["num_attention_heads"] if name == "git" else 0)


def _vit(vision: dict[str, Any], heads: int = 0) -> int:
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    return seen(tokens, vision["hidden_size"], vision["intermediate_size"], heads)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
