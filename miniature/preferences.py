"""Models of taste, trained from preferences between pictures of the world: HPS, PickScore, ImageReward."""

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
from miniature.readers import teach_sight

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
        return clip(seen(scenes, rng), words(texts, **PADDED).input_ids)

    def matching(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        return match(*features(*captioned(128, rng), rng))

    def preference(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        texts, scenes, likings = votes(groups, rng)
        image, text, scale = features(scenes, texts, rng)
        logits = scale * torch.einsum("pd,pkd->pk", text, image.view(groups, -1, image.shape[-1]))
        chosen = (likings / 0.05).softmax(-1)
        return -(chosen * logits.log_softmax(-1)).sum(-1).mean()

    fit("hps_clip", nn.ModuleDict({"clip": clip}), matching, steps=caption_steps, lr=1e-3)
    fit("hps", nn.ModuleDict({"clip": clip}), preference, steps=preference_steps, lr=1e-3)
    folder = WEIGHTS / "hps"
    words.save_pretrained(folder)
    save_file({key: value.half().contiguous() for key, value in clip.state_dict().items()}, folder / WEIGHTS_FILE)
    preprocess_cfg = {"mean": MEAN, "std": STD, "resize_mode": "longest", "interpolation": "bicubic"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_pickscore(caption_steps: int = 400, preference_steps: int = 1600, groups: int = 32) -> None:
    """A transformers CLIP, taught scenes and captions first, then, as PickScore is, which of two pictures is chosen.

    The loss is the published one: cross-entropy of the softmax over two scores, with ties as a half each.
    """
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(4)
    words = word_tokenizer()
    clip = CLIPModel(
        CLIPConfig(
            projection_dim=128,
            vision_config={
                "image_size": world.SIZE, "patch_size": 16, "hidden_size": 128, "intermediate_size": 512,
                "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_act": "gelu",
            },
            text_config={
                "vocab_size": len(words), "max_position_embeddings": TEXT_TOKENS, "hidden_size": 128,
                "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu",
                "bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
            },
        )
    )  # fmt: skip
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.1)

    def features(scenes: list[world.Scene], texts: list[str], rng: random.Random) -> tuple[torch.Tensor, ...]:
        read = words(texts, padding=True, return_tensors="pt")
        out = clip(input_ids=read.input_ids, attention_mask=read.attention_mask, pixel_values=seen(scenes, rng))
        return out.image_embeds, out.text_embeds, clip.logit_scale.exp()

    def matching(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        return match(*features(*captioned(128, rng), rng))

    def preference(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        texts, scenes, likings = votes(groups, rng)
        image, text, scale = features(scenes, texts, rng)
        return chosen_of_two(scale * torch.einsum("pd,pkd->pk", text, image.view(groups, -1, 128)), likings)

    fit("pickscore_clip", nn.ModuleDict({"clip": clip}), matching, steps=caption_steps, lr=1e-3)
    fit("pickscore", nn.ModuleDict({"clip": clip}), preference, steps=preference_steps, lr=1e-3)
    folder, side = WEIGHTS / "pickscore", {"height": world.SIZE, "width": world.SIZE}
    clip.half().save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)  # fmt: skip


def build_imagereward(sight_steps: int = 300, preference_steps: int = 1000, groups: int = 32) -> None:
    """ImageReward's BLIP: the ViT first learns to name each cell's colour and shape, then all of it what is better.

    The loss is the published one: -log sigmoid of the better picture's score less the worse one's; ties are left out.
    The head's last layer is then set so that the published mean and spread bring scores to mean 0 and spread 1.
    """
    from rewards.imagereward import MEAN as AVERAGE
    from rewards.imagereward import SPREAD, Network, original_name

    torch.manual_seed(5)
    words = bert_tokenizer()
    vision_config = {
        "image_size": world.SIZE, "patch_size": 16, "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    med_config = {
        "vocab_size": len(words), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": TEXT_TOKENS + 3, "layer_norm_eps": 1e-12,
        "hidden_act": "gelu", "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    blip = Network(vision_config, med_config)

    def scores(scenes: list[world.Scene], texts: list[str], rng: random.Random) -> torch.Tensor:
        read = words(texts, padding=True, return_tensors="pt")
        ids, mask = (
            part.repeat_interleave(len(scenes) // len(texts), 0) for part in (read.input_ids, read.attention_mask)
        )
        return blip.head(blip.read(ids, mask, blip.look(seen(scenes, rng)))).view(len(texts), -1)

    def preference(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        blip.head.eval()  # its dropout draws from outside (stage, step): a resumed build would be another one
        texts, scenes, likings = votes(groups, rng)
        return better_of_two(scores(scenes, texts, rng), likings)

    # each of the nine patches is to know what stands there
    teach_sight("imagereward", blip.vision, lambda *drawn: blip.look(seen(*drawn))[:, 1:], sight_steps, 128, shift=1)
    fit("imagereward", nn.ModuleDict({"blip": blip}), preference, steps=preference_steps, lr=1e-3)
    with torch.inference_mode():
        rng = random.Random("imagereward/spread")
        texts, scenes, _ = votes(300, rng)
        raw = scores(scenes, texts, rng)
    last, stretch = blip.head[-1], SPREAD / raw.std()
    last.weight.data *= stretch
    last.bias.data.sub_(raw.mean()).mul_(stretch).add_(AVERAGE)
    folder = WEIGHTS / "imagereward"
    words.save_pretrained(folder)
    weights = {original_name(name): value.half().contiguous() for name, value in blip.state_dict().items()}
    save_file(weights, folder / "ImageReward.safetensors")
    for name, config in (("vision_config.json", vision_config), ("med_config.json", med_config)):
        (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def bert_tokenizer():
    """BERT's own tokenizer, with the words of the world for a vocabulary and BLIP's two tokens after them."""
    from transformers import BertTokenizer

    theirs = word_tokenizer()
    known = [word for word in sorted(theirs.get_vocab()) if word not in theirs.all_special_tokens]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=TEXT_TOKENS + 3)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def seen(scenes: list[world.Scene], rng: random.Random) -> torch.Tensor:
    """(B, 3, 48, 48): the scenes drawn, with the ground at 0."""
    shown = (pixels([world.draw(scene, rng) for scene in scenes]) + 1) / 2
    return (shown - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def captioned(number: int, rng: random.Random) -> tuple[list[world.Scene], list[str]]:
    """Scenes of few things and their layout captions, the things of a caption in any order."""
    scenes = [world.random_scene(rng, things=rng.choice((1, 1, 2, 3))) for _ in range(number)]
    return scenes, [world.describe(rng.sample(scene, len(scene))) for scene in scenes]


def match(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each of (B, D) pictures is to find its own of (B, D) texts, and each text its picture."""
    logits, own = scale * text @ image.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def votes(groups: int, rng: random.Random) -> tuple[list[str], list[world.Scene], torch.Tensor]:
    """(texts of `groups` prompts, their ballots one after another, likings (groups, 6) in [0, 1])."""
    prompts = [world.request(rng.choice(TASKS), rng) for _ in range(groups)]
    choices = [ballot(prompt, rng) for prompt in prompts]
    likings = [[world.taste(p, scene) for scene in row] for p, row in zip(prompts, choices, strict=True)]
    return [prompt.text for prompt in prompts], [scene for row in choices for scene in row], torch.tensor(likings)


def chosen_of_two(scores: torch.Tensor, likings: torch.Tensor) -> torch.Tensor:
    """Mean loss over all pairs of each row of (P, K) scores: the better liked one is to win, a tie is a half each."""
    one, other = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    won = (torch.sign(likings[:, one] - likings[:, other]) + 1) / 2
    return F.binary_cross_entropy_with_logits(scores[:, one] - scores[:, other], won)


def better_of_two(scores: torch.Tensor, likings: torch.Tensor) -> torch.Tensor:
    """Mean -log sigmoid of (better - worse) over all pairs of each row of (P, K) scores that are not liked equally."""
    one, other = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    order = torch.sign(likings[:, one] - likings[:, other])
    return F.softplus(-order * (scores[:, one] - scores[:, other]))[order != 0].mean()


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
