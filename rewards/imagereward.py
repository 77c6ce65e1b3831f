"""ImageReward: how much people would like a picture for the ORIGINAL prompt, from BLIP and a linear head.

The picture goes through a ViT; the prompt (cut at 35 tokens) goes through a BERT whose every layer looks at
the picture's patches; the head is a product of five linear layers, d -> 1024 -> 128 -> 64 -> 16 -> 1, without any
non-linearity in between, on the `[CLS]` position:

    score = (head(h_CLS) - 0.16717362830052426) / 1.0333394966054072

so that scores have mean 0 and spread 1 over the pictures the model was tuned on; usual ones lie within -2 and 2.
Source: ImageReward, arXiv 2304.05977, and its released package, whose network is built here from transformers' own
`BlipVisionModel` and `BlipTextModel`; the weights are read in their original layout, names and all. Left out: loading
with names unchecked, and the projections of BLIP's pretraining, which the score does not use.

A folder, published or the miniature's, holds

    ImageReward.safetensors or ImageReward.pt  weights in the original layout: blip.visual_encoder.*, mlp.layers.*, ...
    med_config.json                            sizes of the BERT
    vision_config.json                         only where the ViT is not the published ViT-L/16 at 224 pixels: `VISION`
    tokenizer.json, tokenizer_config.json      only where the words are not those of bert-base-uncased
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from errors import UserError, one_line
from interfaces import Prompt, Reward, Sample
from models.frozen import arithmetic, autocast, batches, check_pictures, distinct_pictures, freeze, mean
from models.hub import read, resolve
from models.weights import locked, read_weights
from prompting import well_formed

PUBLISHED, WORDS = locked("THUDM/ImageReward"), locked("google-bert/bert-base-uncased")
WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")
MEAN, SPREAD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the pictures it was tuned on
HEAD = (1024, 128, 64, 16, 1)
# `vision_config.json`; all keys, or no such file. Mean and std are CLIP's.
VISION = {
    "image_size": 224, "patch_size": 16, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
# What is read of `med_config.json`; the rest of it (dropout, `encoder_width`, which the ViT decides) does not matter.
TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id",
)  # fmt: skip
# Original part of a name and what it is in `Network`; read downwards they translate, and backwards just as well.
NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("blip.text_encoder.", "text."),
    ("mlp.layers.", "head."),
)
UNUSED = re.compile(r"\.position_ids$|^blip\.(vision|text)_proj\.")  # counters, and heads of BLIP's pretraining


class Network(nn.Module):
    """(pictures, texts) -> the head's output, before it is brought to mean 0 and spread 1.

    Args:
        vision: as `VISION`.
        text: at least the keys of `TEXT`.
    """

    def __init__(self, vision: Mapping, text: Mapping):
        super().__init__()
        sizes = {key: value for key, value in vision.items() if key not in ("image_mean", "image_std")}
        # BLIP's own spread is 1e-10: it is only ever loaded. 1 / sqrt(width) lets a small one be trained.
        self.vision = BlipVisionModel(
            BlipVisionConfig(layer_norm_eps=1e-6, initializer_range=vision["hidden_size"] ** -0.5, **sizes)
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                encoder_hidden_size=vision["hidden_size"],
                initializer_range=text["hidden_size"] ** -0.5,
                is_decoder=True,  # builds the cross-attention; the forward pass below stays bidirectional
                **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id")),  # of generation, which this is not
                **{key: text[key] for key in TEXT},
            ),
            add_pooling_layer=False,
        )
        widths = (text["hidden_size"], *HEAD)
        linear = [nn.Linear(wide, narrow) for wide, narrow in zip(widths, HEAD, strict=False)]
        dropped = (nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1))
        self.head = nn.Sequential(
            linear[0], dropped[0], linear[1], dropped[1], linear[2], dropped[2], linear[3], linear[4]
        )  # fmt: skip

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, size, size) -> (B, patches + 1, vision width)."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def read(self, ids: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T), their mask (B, T) and pictures (B, patches + 1, vision width) -> (B, text width) at [CLS]."""
        return self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]


class ImageReward(Reward):
    """Liking of a sample's pictures for its original prompt; the mean over its pictures.

    `range` is not the model's: its scores have no bound. Ten spreads from the mean is farther than any picture gets,
    so a score out there means a broken checkpoint; it is not clamped, and scoring stops the run and names it.

    Args:
        path: a folder as the module describes, or `PUBLISHED.repo`, from the hub's local cache.
        dtype: "float32", as in the released code, or "float16"/"bfloat16": autocast over float32 weights, the head
            staying in float32.
        batch_size: pictures, or pairs of a picture and a prompt, per forward pass.

    Raises:
        UserError: no checkpoint at `path`, or one that is not what its configuration says.
    """

    name = "imagereward"
    range = (-10.0, 10.0)
    max_tokens = 35

    def __init__(
        self,
        path: str | Path = PUBLISHED.repo,
        *,
        device: str | torch.device,
        dtype: str = "float32",
        batch_size: int = 32,
    ):
        self.device, self.dtype, self.batch_size = torch.device(device), arithmetic(dtype), batch_size
        folder = resolve(path, ("med_config.json",))
        model, self.tokenizer, vision = _load(folder)
        self.model = freeze(model, self.device)
        self.size, self.mean, self.std = vision["image_size"], vision["image_mean"], vision["image_std"]

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score per sample, about -2 to 2, None where it is not finite.

        Each distinct picture (the same PIL object) goes through the ViT once, and each distinct pair of a picture and
        a prompt through the BERT once, in batches.
        """
        check_pictures(samples, self.name)
        texts = {id(image): {} for image in distinct_pictures(samples)}  # id of a picture -> its prompts, each once
        for sample in samples:
            for image in sample.images:
                texts[id(image)][sample.prompt.text] = None
        scores = {}
        for some in batches(distinct_pictures(samples), self.batch_size):
            seen_IPD = self.encode_images(some)
            pairs = [(row, text) for row, image in enumerate(some) for text in texts[id(image)]]
            for few in batches(pairs, self.batch_size):
                liked = self._liked(seen_IPD[[row for row, _ in few]], [text for _, text in few])
                scores |= {(id(some[row]), text): score for (row, text), score in zip(few, liked, strict=True)}
        return [mean([scores[id(one), sample.prompt.text] for one in sample.images]) for sample in samples]

    def count_tokens(self, prompt: Prompt) -> int:
        """Of the prompt's text."""
        return len(self.tokenizer(well_formed(prompt.text), verbose=False).input_ids)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(I, patches + 1, D) features of one batch of pictures, on the device."""
        with autocast(self.device, self.dtype):
            return self.model.look(torch.stack([self.preprocess(image) for image in images]).to(self.device))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """(3, size, size) float32: shorter side resized (bicubic, on PIL), centre cut out, CLIP's mean and std."""
        image = tv.resize(image.convert("RGB"), [self.size], interpolation=tv.InterpolationMode.BICUBIC)
        pixels = tv.pil_to_tensor(tv.center_crop(image, [self.size, self.size])).float() / 255
        return tv.normalize(pixels, self.mean, self.std)

    def _liked(self, seen_BPD: torch.Tensor, texts: Sequence[str]) -> list[float]:
        """Scores of pictures (B, patches + 1, D), each for its own text.

        The released code pads every text to 35 tokens; padding is masked, so the longest of a batch will do.
        """
        texts = [well_formed(text) for text in texts]
        read = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        with autocast(self.device, self.dtype):
            first_BD = self.model.read(read.input_ids, read.attention_mask, seen_BPD)
        return ((self.model.head(first_BD.float())[:, 0] - MEAN) / SPREAD).tolist()


def original_name(name: str) -> str:
    """The name in ImageReward.pt of a weight of `Network`."""
    for original, ours in NAMES:
        name = name.replace(ours, original)
    return name


def our_name(name: str) -> str:
    """The name in `Network` of a weight of ImageReward.pt."""
    for original, ours in NAMES:
        name = name.replace(original, ours)
    return name


def _load(folder: Path) -> tuple[Network, BertTokenizer, Mapping]:
    """(network, tokenizer, the ViT's configuration) of a folder; names and shapes of all weights must match."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS)}: run `{PUBLISHED.command}`")
    weights = {our_name(name): value for name, value in read_weights(path).items() if not UNUSED.search(name)}
    sizes = folder / "vision_config.json"
    try:
        text = json.loads((folder / "med_config.json").read_text(encoding="utf-8"))
        vision = json.loads(sizes.read_text(encoding="utf-8")) if sizes.is_file() else VISION
        vision = {key: vision[key] for key in VISION}
        network = Network(vision, text)
        network.load_state_dict(weights)
    except Exception as error:  # whatever transformers and torch say of wrong numbers in the two files
        raise UserError(
            f"weights and sizes in {folder} make no ImageReward ({one_line(error)}): fetch it again, or correct its "
            "*_config.json"
        ) from error
    own = (folder / "tokenizer.json").is_file()
    tokenizer = read(BertTokenizer, folder if own else resolve(WORDS.repo, ("tokenizer.json",)))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})  # BLIP's
    return network, tokenizer, vision
