"""Models that read a picture, trained from the world alone: GroundingDINO finds things, GIT and the ORM answer.

Each has a vision tower that is taught to see before the model is taught to speak, as the real ones have theirs from
CLIP, SigLIP or ImageNet: every cell of the picture is to know its thing's colour and shape (`teach_sight`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data.grammar import TASKS
from interfaces import Prompt
from miniature import world
from miniature.fit import WEIGHTS, byte_level_bpe, fit

CELL = world.SIZE // 3  # pixels a side of one place
LOOKS = (len(world.COLORS) + 1, len(world.SHAPES) + 1)  # the last of each is "nothing"
See = Callable[[Sequence[world.Scene], random.Random], torch.Tensor]  # scenes drawn with rng -> (B, 9, 128)


def shown(scenes: Sequence[world.Scene], rng: random.Random, mean: Sequence[float], std: Sequence[float]):
    """Pictures of the scenes as the models take them: (B, 3, 48, 48), normalised."""
    stacked = np.stack([np.asarray(world.draw(scene, rng), dtype=np.float32) for scene in scenes])
    pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def teach_sight(name: str, tower: nn.Module, see: See, steps: int, batch: int = 64, shift: int = 0) -> None:
    """Pretrain a vision tower: from `see`'s (B, 9, 128), colour and shape of each of the nine places.

    `shift` 1 makes "nothing" the first class instead of the last.
    """
    heads = nn.ModuleList([nn.Linear(128, n) for n in LOOKS])

    def tagging(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        scenes = [world.random_scene(rng) for _ in range(batch)]
        tags = torch.tensor([LOOKS[0] - 1, LOOKS[1] - 1]).repeat(len(scenes), 9, 1)
        for row, scene in zip(tags, scenes, strict=True):
            for thing in scene:
                looks = (list(world.COLORS).index(thing.color), world.SHAPES.index(thing.shape))
                row[thing.place] = torch.tensor(looks)
        tags = (tags + shift) % torch.tensor(LOOKS)
        cells = see(scenes, rng)
        return sum(F.cross_entropy(head(cells).flatten(0, 1), tags[..., i].flatten()) for i, head in enumerate(heads))

    fit(f"{name}_sight", nn.ModuleDict({"tower": tower, "heads": heads}), tagging, steps=steps, lr=1e-3)


# ---------------------------------------------------------------- GroundingDINO

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_gdino(sight_steps: int = 400, steps: int = 3000, batch: int = 48) -> None:
    """GroundingDinoForObjectDetection: Swin, BERT, two-stage deformable decoder, trained with its own set loss.

    A batch shares one caption: transformers 5.17 looks the labels of all rows but the first up in the second row's
    caption (`_get_target_classes_one_hot` adds one caption's length where it should add those of all rows before).
    """
    import transformers

    torch.manual_seed(4)
    words = bert_tokenizer()
    model = transformers.GroundingDinoForObjectDetection(
        transformers.GroundingDinoConfig(
            backbone_config=transformers.SwinConfig(
                image_size=world.SIZE, patch_size=4, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8],
                window_size=6, out_features=["stage2", "stage3"], drop_path_rate=0.0,
            ),
            text_config=transformers.BertConfig(
                vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=128, max_position_embeddings=64, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            num_queries=12, num_feature_levels=2, d_model=64, encoder_layers=2, decoder_layers=2,
            encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4,
            max_text_len=32, dropout=0.0, fusion_droppath=0.0, auxiliary_loss=True, disable_custom_kernels=True,
        )
    )  # fmt: skip
    swin = model.model.backbone.conv_encoder.model

    def see(scenes: Sequence[world.Scene], rng: random.Random) -> torch.Tensor:
        pixels = shown(scenes, rng, IMAGENET_MEAN, IMAGENET_STD)
        return swin(pixels).feature_maps[-1].flatten(2).transpose(1, 2)

    teach_sight("gdino", swin, see, sight_steps)

    def detection(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        nouns = rng.sample(world.SHAPES, rng.choice((1, 1, 2, 2, 3, 4)))
        scenes = [_with_one_of(nouns, rng) for _ in range(batch)]
        caption = words([" . ".join(nouns) + "."] * batch, return_tensors="pt")
        labels = [_boxes(scene, nouns) for scene in scenes]
        pixels = shown(scenes, rng, IMAGENET_MEAN, IMAGENET_STD)
        return model(pixel_values=pixels, **caption, labels=labels).loss

    fit("gdino", nn.ModuleDict({"gdino": model}), detection, steps=steps, lr=1e-3, weight_decay=1e-4)
    folder = WEIGHTS / "gdino"
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    edges = {"shortest_edge": world.SIZE, "longest_edge": world.SIZE}
    normal = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    transformers.GroundingDinoImageProcessor(size=edges, **normal).save_pretrained(folder)


def _with_one_of(nouns: Sequence[str], rng: random.Random) -> world.Scene:
    """A scene that holds one of the nouns at least: the set loss of transformers 5.17 needs a box in each batch."""
    scene = world.random_scene(rng)
    return scene if rng.random() < 0.15 or any(t.shape in nouns for t in scene) else _with_one_of(nouns, rng)


def _boxes(scene: world.Scene, nouns: Sequence[str]) -> dict[str, torch.Tensor]:
    """Class index and cxcywh box, in [0, 1], of each thing that a noun names."""
    named = [thing for thing in scene if thing.shape in nouns]
    boxes = [[(8 + 16 * (t.place % 3)) / 48, (8 + 16 * (t.place // 3)) / 48, 11.6 / 48, 11.6 / 48] for t in named]
    return {
        "class_labels": torch.tensor([nouns.index(thing.shape) for thing in named], dtype=torch.long),
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
    }


def bert_tokenizer():
    """The world's words behind BERT's special tokens, at the ids that GroundingDINO's code has written into it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    vocabulary = {**{f"[unused{i}]": i for i in range(1030) if i not in fixed.values()}, **fixed}
    for word in (*world.SHAPES, *world.COLORS, "yes", "no"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 101), ("[SEP]", 102)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32, padding_side="right",
    )  # fmt: skip


# ---------------------------------------------------------------- GIT

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build_git(sight_steps: int = 300, steps: int = 1500, batch: int = 96) -> None:
    """GitForCausalLM, asked "circle?" or "red circle?" of a scene; the word after the question is yes or no."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitVisionConfig

    torch.manual_seed(5)
    words = bert_tokenizer()
    model = GitForCausalLM(
        GitConfig(
            vision_config=GitVisionConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                image_size=world.SIZE, patch_size=CELL,
            ).to_dict(),
            vocab_size=len(words), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.09,
        )
    )  # fmt: skip
    tower = model.git.image_encoder

    def see(scenes: Sequence[world.Scene], rng: random.Random) -> torch.Tensor:
        return tower(shown(scenes, rng, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]

    teach_sight("git", tower, see, sight_steps)
    answers = torch.tensor(words.convert_tokens_to_ids(["no", "yes"]))

    def asking(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        colored = rng.random() < 0.7  # questions of a batch are of one length, so the last token is the last position
        scenes = [world.random_scene(rng) for _ in range(batch)]
        asked = [_item(scene, colored, rng) for scene in scenes]
        ids = words([f"{item}?" for item, _ in asked], add_special_tokens=False, return_tensors="pt").input_ids
        ids = F.pad(ids, (1, 0), value=words.cls_token_id)
        logits = model(input_ids=ids, pixel_values=shown(scenes, rng, CLIP_MEAN, CLIP_STD)).logits[:, -1]
        return F.cross_entropy(logits, answers[[there for _, there in asked]])

    fit("git", nn.ModuleDict({"git": model}), asking, steps=steps, lr=1e-3)
    folder = WEIGHTS / "git"
    model.half().save_pretrained(folder)
    sizes = {"size": {"shortest_edge": world.SIZE}, "crop_size": {"height": world.SIZE, "width": world.SIZE}}
    CLIPImageProcessor(image_mean=CLIP_MEAN, image_std=CLIP_STD, **sizes).save_pretrained(folder)
    words.save_pretrained(folder)


def _item(scene: world.Scene, colored: bool, rng: random.Random) -> tuple[str, int]:
    """("red circle", is there one) or ("circle", is there one), as often there as not; near misses among the nots."""
    there = {f"{thing.color} {thing.shape}" if colored else thing.shape for thing in scene}
    if rng.random() < 0.5:
        return rng.choice(sorted(there)), 1
    one, other = rng.choice(scene), rng.choice(scene)
    near = [f"{one.color} {rng.choice(world.SHAPES)}", f"{rng.choice(tuple(world.COLORS))} {one.shape}"]
    near += [f"{one.color} {other.shape}", f"{rng.choice(tuple(world.COLORS))} {rng.choice(world.SHAPES)}"]
    item = rng.choice(near) if colored else rng.choice(world.SHAPES)
    return item, int(item in there)


# ---------------------------------------------------------------- the ORM

ORM_MEAN = ORM_STD = (0.5, 0.5, 0.5)


def build_orm(
    sight_steps: int = 300, caption_steps: int = 600, easy_steps: int = 400, steps: int = 2000, batch: int = 64
) -> None:
    """LlavaOnevisionForConditionalGeneration, asked whether a picture keeps a prompt, in the ORM's own words.

    As LLaVA was, it is first taught to say what a picture shows. Asked yes or no from the start, it was at the level
    of a coin (loss 0.66) after 670 steps of 64.
    """
    from transformers import SiglipImageProcessor

    from rewards.orm import AFTER_IMAGE, ANSWER, BEFORE_IMAGE

    torch.manual_seed(6)
    words = answer_tokenizer()
    model = _llava(words)
    tower = model.model.vision_tower

    def see(scenes: Sequence[world.Scene], rng: random.Random) -> torch.Tensor:
        return tower(shown(scenes, rng, ORM_MEAN, ORM_STD), output_hidden_states=True).hidden_states[-1]

    teach_sight("orm", tower, see, sight_steps)
    before, end = (words(text).input_ids for text in (BEFORE_IMAGE, ANSWER))
    picture = [words.convert_tokens_to_ids("<image>")] * 10  # nine places and `image_newline`
    answers = torch.tensor(words.convert_tokens_to_ids(["no", "yes"]))

    def read(scenes: Sequence[world.Scene], after: Sequence[list[int]], rng: random.Random, keep: int):
        """Padded ids (B, T) of the chats, and logits (B, keep, V) of their last positions."""
        both = words.pad({"input_ids": [before + picture + ids for ids in after]}, return_tensors="pt")
        features = model.model.multi_modal_projector(see(scenes, rng))
        features = torch.cat([features, model.model.image_newline.expand(len(scenes), 1, -1)], dim=1)
        embeds = model.get_input_embeddings()(both.input_ids)
        embeds = embeds.masked_scatter((both.input_ids == picture[0])[..., None], features)
        places = (both.attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            inputs_embeds=embeds, attention_mask=both.attention_mask, position_ids=places, logits_to_keep=keep
        ).logits
        return both.input_ids, logits

    def captioning(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        scenes = [world.random_scene(rng) for _ in range(batch)]
        captions = [words(world.describe(sorted(s, key=lambda t: t.place))).input_ids for s in scenes]
        longest = max(map(len, captions)) + 1
        ids, logits = read(scenes, [end + caption + [words.eos_token_id] for caption in captions], rng, longest + 1)
        said = torch.tensor([[i >= longest - 1 - len(caption) for i in range(longest)] for caption in captions])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, -longest:].masked_fill(~said, -100).flatten())

    def judging_of(tasks: Sequence[str]) -> Callable[[random.Random, torch.Generator], torch.Tensor]:
        def judging(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
            claims = [_claim(rng.choice(tasks), rng) for _ in range(batch)]
            asked = [words(AFTER_IMAGE.format(prompt=prompt.text)).input_ids + end for prompt, _, _ in claims]
            _, logits = read([scene for _, scene, _ in claims], asked, rng, 1)
            return F.cross_entropy(logits[:, -1], answers[[kept for _, _, kept in claims]])

        return judging

    modules = nn.ModuleDict({"orm": model})
    fit("orm_captions", modules, captioning, steps=caption_steps, lr=1e-3)
    fit("orm_easy", modules, judging_of(("single_object", "two_object", "colors")), steps=easy_steps, lr=1e-3)
    fit("orm", modules, judging_of(TASKS), steps=steps, lr=1e-3)
    folder = WEIGHTS / "orm"
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    SiglipImageProcessor(size={"height": world.SIZE, "width": world.SIZE}).save_pretrained(folder)


def _llava(words):
    """A LLaVA-OneVision with SigLIP's tower and a Qwen2, as the ORM is, at toy size."""
    import transformers

    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                image_size=world.SIZE, patch_size=CELL, vision_use_head=False,
            ),
            text_config=transformers.Qwen2Config(
                vocab_size=len(words), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.09,
                bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
                tie_word_embeddings=True,
            ),
            image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
            vision_feature_select_strategy="full", tie_word_embeddings=True,
        )
    )  # fmt: skip


def _claim(task: str, rng: random.Random) -> tuple[Prompt, world.Scene, int]:
    """A prompt, a scene and whether it holds there, as often as not; where it does not, it nearly does."""
    prompt = world.request(task, rng)
    scene = right = world.layout(prompt, rng)
    if rng.random() < 0.5:
        while world.keeps(prompt, scene):
            scene = world.spoil(right if rng.random() < 0.7 else scene, rng)
        return prompt, scene, 0
    for _ in range(rng.choice((0, 0, 1))):
        crowded = world.spoil(scene, rng)
        scene = crowded if world.keeps(prompt, crowded) else scene
    return prompt, scene, 1


def answer_tokenizer():
    """The ORM's tokenizer, with `<image>`."""
    from rewards.orm import AFTER_IMAGE, ANSWER, BEFORE_IMAGE

    rng = random.Random("answers")
    prompts = [world.request(task, rng).text for task in TASKS for _ in range(500)]
    asked = [BEFORE_IMAGE + AFTER_IMAGE.format(prompt=prompt) + ANSWER for prompt in prompts]
    return byte_level_bpe([question + word for question in asked for word in ("yes", "no")], 600, ("<image>",))
