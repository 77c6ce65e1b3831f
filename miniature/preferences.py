"""Models of taste, trained from preferences between pictures of the world: HPS."""

from __future__ import annotations

import json
import random

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from data.grammar import TASKS
from interfaces import Prompt
from miniature import world
from miniature.fit import PADDED, TEXT_TOKENS, WEIGHTS, fit, pixels, word_tokenizer

MEAN, STD = [channel / 255 for channel in world.GROUND], [0.3] * 3  # of pictures: the ground is 0
WEIGHTS_FILE = "open_clip_model.safetensors"


def build_hps(caption_steps: int = 500, preference_steps: int = 2500, groups: int = 32) -> None:
    """An open_clip CLIP, taught to match scenes and layout captions, then, as HPS v2 is, tuned on preferences.

    A first recipe without captions, without centred pixels and with the default embeddings stayed blind to colour and
    relation: near misses in colour were told apart at chance after 3,000 steps. All three changed at once.
    """
    import open_clip

    torch.manual_seed(2)
    words = word_tokenizer()
    model_cfg = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": world.SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
        "text_cfg": {
            "context_length": TEXT_TOKENS, "vocab_size": len(words), "width": 128, "heads": 4, "layers": 3,
            "hf_tokenizer_name": ".", "pool_type": "eos", "eos_id": words.eos_token_id, "pad_id": words.pad_token_id,
        },
    }  # fmt: skip
    clip = open_clip.CLIP(**model_cfg)
    nn.init.normal_(clip.token_embedding.weight, std=0.1)

    def features(scenes: list[world.Scene], texts: list[str], rng: random.Random) -> tuple[torch.Tensor, ...]:
        shown = (pixels([world.draw(scene, rng) for scene in scenes]) + 1) / 2
        shown = (shown - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return clip(shown, words(texts, **PADDED).input_ids)

    def matching(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        scenes = [world.random_scene(rng, things=rng.choice((1, 1, 2, 3))) for _ in range(128)]
        image, text, scale = features(scenes, [world.describe(rng.sample(s, len(s))) for s in scenes], rng)
        logits, own = scale * text @ image.T, torch.arange(len(scenes))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def preference(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        prompts = [world.request(rng.choice(TASKS), rng) for _ in range(groups)]
        choices = [ballot(prompt, rng) for prompt in prompts]
        likings = [[world.taste(p, scene) for scene in row] for p, row in zip(prompts, choices, strict=True)]
        image, text, scale = features([scene for row in choices for scene in row], [p.text for p in prompts], rng)
        logits = scale * torch.einsum("pd,pkd->pk", text, image.view(groups, -1, image.shape[-1]))
        chosen = (torch.tensor(likings) / 0.05).softmax(-1)
        return -(chosen * logits.log_softmax(-1)).sum(-1).mean()

    fit("hps_clip", nn.ModuleDict({"clip": clip}), matching, steps=caption_steps, lr=1e-3)
    fit("hps", nn.ModuleDict({"clip": clip}), preference, steps=preference_steps, lr=1e-3)
    folder = WEIGHTS / "hps"
    words.save_pretrained(folder)
    save_file({key: value.half().contiguous() for key, value in clip.state_dict().items()}, folder / WEIGHTS_FILE)
    preprocess_cfg = {"mean": MEAN, "std": STD, "resize_mode": "longest", "interpolation": "bicubic"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def ballot(prompt: Prompt, rng: random.Random) -> list[world.Scene]:
    """Six scenes to choose between: one that keeps the prompt, three near misses, and two of another kind."""
    right = world.layout(prompt, rng)
    scenes = [right]
    while len(scenes) < 4:
        scene = world.spoil(right, rng)
        if rng.random() < 0.3:
            scene = world.spoil(scene, rng)
        if world.taste(prompt, scene) < world.taste(prompt, right):
            scenes.append(scene)
    return [*scenes, world.random_scene(rng), world.layout(prompt, rng)]
