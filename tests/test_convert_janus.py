"""Claims about scripts/convert_janus.py: no weight is lost, and both layouts are one model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.janus import find_janus, load_janus
from run.options import UserError
from scripts.convert_janus import MARKS, convert

LAYER = r"model\.vision_model\.encoder\.layers\.(\d+)"
BACK = (  # native name -> the authors', one line a part
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.vision_model\.embeddings\.position_embedding\.weight", "vision_model.vision_tower.pos_embed"),
    (r"model\.vision_model\.embeddings\.patch_embedding\.", "vision_model.vision_tower.patch_embed.proj."),
    (r"model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    (rf"{LAYER}\.layer_norm", r"vision_model.vision_tower.blocks.\1.norm"),
    (rf"{LAYER}\.self_attn\.projection_layer", r"vision_model.vision_tower.blocks.\1.attn.proj"),
    (rf"{LAYER}\.self_attn", r"vision_model.vision_tower.blocks.\1.attn"),
    (r"model\.vision_model\.encoder\.layers\.", "vision_model.vision_tower.blocks."),
    (r"model\.vqmodel\.(encoder|decoder)\.mid\.block_1", r"gen_vision_model.\1.mid.0"),
    (r"model\.vqmodel\.(encoder|decoder)\.mid\.attn_1", r"gen_vision_model.\1.mid.1"),
    (r"model\.vqmodel\.(encoder|decoder)\.mid\.block_2", r"gen_vision_model.\1.mid.2"),
    (r"model\.vqmodel\.encoder\.down\.(\d+)\.block", r"gen_vision_model.encoder.conv_blocks.\1.res"),
    (r"model\.vqmodel\.decoder\.up\.(\d+)\.block", r"gen_vision_model.decoder.conv_blocks.\1.res"),
    (r"model\.vqmodel\.encoder\.down", "gen_vision_model.encoder.conv_blocks"),
    (r"model\.vqmodel\.decoder\.up", "gen_vision_model.decoder.conv_blocks"),
    (r"model\.vqmodel\.", "gen_vision_model."),
    (r"model\.generation_aligner\.fc1", "gen_aligner.layers.0"),
    (r"model\.generation_aligner\.hidden_layers\.0", "gen_aligner.layers.2"),
    (r"model\.aligner\.fc1", "aligner.layers.0"),
    (r"model\.aligner\.hidden_layers\.0", "aligner.layers.2"),
    (r"model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
    (r"model\.generation_head\.", "gen_head."),
    (r"model\.generation_embeddings\.", "gen_embed."),
)  # fmt: skip


def old_name(name: str) -> str:
    return next(re.sub(f"^{here}", there, name) for here, there in BACK if re.match(here, name))


@pytest.fixture
def authors(tiny_janus, tmp_path):
    """The same model in its authors' layout."""
    native, folder = load_file(tiny_janus / "model.safetensors"), tmp_path / "authors"
    folder.mkdir()
    state = {old_name(name): value for name, value in native.items()}
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    state["vision_model.vision_tower.pos_embed"] = state["vision_model.vision_tower.pos_embed"][None]
    state["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")
    config = json.loads((tiny_janus / "config.json").read_text())
    wide = config["text_config"]["hidden_size"]
    old = {
        "model_type": "multi_modality", "language_config": config["text_config"],
        "vision_config": {"params": {"image_size": config["vision_config"]["image_size"]}},
        "aligner_config": {"params": {"n_embed": wide, "depth": 2}}, "gen_vision_config": {"params": {}},
        "gen_head_config": {"params": {"n_embed": wide, "image_token_embed": wide}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(old))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    shutil.copy(tiny_janus / "tokenizer.json", folder)
    tokenizer = json.loads((tiny_janus / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in tokenizer.items() if name not in (*MARKS, "extra_special_tokens")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def test_both_layouts_draw_the_same_pictures(authors, tiny_janus, tmp_path):
    found = convert(authors, tmp_path / "native")
    assert found == {"unused": ["vision_model.vision_tower.attn_pool.latent"]}
    one, other = load_janus(str(tiny_janus), "float32", "cpu"), load_janus(str(tmp_path / "native"), "float32", "cpu")
    weights = other.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())
    prefixes = [janus.image_prefix("a photo of a circle") for janus in (one, other)]
    assert prefixes[0] == prefixes[1] and one.plan_prefix("a red cross") == other.plan_prefix("a red cross")
    drawn = [
        janus.pictures(janus.draw([prefix], [7]).tokens)[0]
        for janus, prefix in zip((one, other), prefixes, strict=True)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()


@pytest.mark.parametrize("change", ["lost", "unknown"])
def test_a_weight_that_is_missing_or_unknown_is_named(authors, tmp_path, change):
    state = load_file(authors / "model.safetensors")
    if change == "lost":
        del state["gen_embed.weight"]
    else:
        state["gen_extra.weight"] = torch.zeros(1)
    save_file(state, authors / "model.safetensors")
    with pytest.raises(UserError, match="generation_embeddings" if change == "lost" else "gen_extra"):
        convert(authors, tmp_path / "native")


def test_the_authors_layout_is_refused_with_the_command_that_converts_it(authors):
    with pytest.raises(UserError, match="convert_janus.py"):
        find_janus(str(authors))
