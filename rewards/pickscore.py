"""PickScore: which picture people pick for the ORIGINAL prompt, by a CLIP tuned on the choices of Pick-a-Pic.

    score = exp(logit_scale) * cos(text, image)

exactly as published, scale included: exp(logit_scale) is 100 in the released weights, so scores lie in [-100, 100]
(about 20 for a usual picture), and softmax over the scores of two pictures is the chance that each is picked.
Source: Pick-a-Pic, arXiv 2305.01569, and the model card of yuvalkirstain/PickScore_v1. Left out: the softmax over a
group's pictures, which would tie a score to its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from interfaces import Prompt, Reward, Sample
from models.frozen import arithmetic, autocast, check_pictures, load, mean_cosines
from models.hub import read, resolve
from models.weights import locked
from prompting import well_formed

PUBLISHED = locked("yuvalkirstain/PickScore_v1")
PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer_config.json")
# What the published example reads pictures and texts with; used where the checkpoint's folder has no such files.
PROCESSOR = locked("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


class PickScore(Reward):
    """Scaled cosine of a sample's pictures and its original prompt; the mean over its pictures.

    `range` is plus and minus exp(logit_scale) of the loaded weights, [-100, 100] for the published ones.

    Args:
        path: a folder with a transformers `CLIPModel` in safetensors, or `PUBLISHED.repo`, from the hub's local cache.
            If it lacks the image processor or the tokenizer (`PROCESSOR_FILES`), those of `PROCESSOR` are taken.
        dtype: "float32", or "float16"/"bfloat16": autocast over float32 weights.
        batch_size: pictures, or texts, per forward pass.

    Raises:
        UserError: no checkpoint at `path`, or one that cannot be used.
    """

    name = "pickscore"

    def __init__(
        self,
        path: str | Path = PUBLISHED.repo,
        *,
        device: str | torch.device,
        dtype: str = "float32",
        batch_size: int = 32,
    ):
        self.device, self.dtype, self.batch_size = torch.device(device), arithmetic(dtype), batch_size
        folder = resolve(path, ("config.json",))
        self.model = load(CLIPModel, folder, self.device)
        if not all((folder / name).is_file() for name in PROCESSOR_FILES):
            folder = resolve(PROCESSOR.repo, PROCESSOR_FILES)
        self.tokenizer, self.processor = read(AutoTokenizer, folder), read(CLIPImageProcessorPil, folder)
        self.max_tokens = self.model.config.text_config.max_position_embeddings
        self.scale = self.model.logit_scale.exp().item()
        self.range = (-self.scale, self.scale)

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score in `range` per sample, None where it is not finite.

        Each distinct prompt and each distinct picture (the same PIL object) is encoded once, in batches.
        """
        check_pictures(samples, self.name)
        return mean_cosines(samples, self.encode_texts, self.encode_images, self.batch_size, self.scale)

    def count_tokens(self, prompt: Prompt) -> int:
        """Of the prompt's text."""
        return len(self.tokenizer(well_formed(prompt.text), verbose=False).input_ids)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(T, D) features of a batch; what is beyond the model's context (77 tokens) is cut.

        Text is causal and read at its end token, so padding on the right changes nothing.
        """
        how = {"padding": True, "truncation": True, "max_length": self.max_tokens, "padding_side": "right"}
        read = self.tokenizer([well_formed(text) for text in texts], return_tensors="pt", **how).to(self.device)
        with autocast(self.device, self.dtype):
            out = self.model.get_text_features(input_ids=read.input_ids, attention_mask=read.attention_mask)
        return out.pooler_output

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(I, D) features of a batch; pictures of any size and mode, centre-cropped by the processor."""
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        with autocast(self.device, self.dtype):
            return self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
