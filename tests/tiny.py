"""Random pictures, and tiny random models of the real classes, for the tests of several readers of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

WORDS = "a red green blue car dog cat man person photo of is the reading kicked boy waved round square ?".split()
SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights each time, large enough that every input matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if "norm" in name.lower() and name.endswith("weight") else 0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_tokenizer(folder: Path, marks: list[str], end: str, words: list[str]) -> list[str]:
    """A tokenizer of whole words; `marks` are padding, unknown and start. Returns its vocabulary."""
    vocabulary = [*marks, *words, end]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token=marks[1]))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    brackets = [(name, vocabulary.index(name)) for name in (marks[2], end)]
    inner.post_processor = processors.TemplateProcessing(single=f"{marks[2]} $A {end}", special_tokens=brackets)
    names = {"pad_token": marks[0], "unk_token": marks[1], "cls_token": marks[2], "sep_token": end}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return vocabulary


def write_clip(folder: Path, words: list[str] = WORDS, hidden_act: str = "quick_gelu") -> Path:
    """A CLIP and its tokenizer, whose end is the highest id."""
    vocabulary = write_tokenizer(folder, ["<pad>", "<unk>", "<s>"], "</s>", words)
    ids = {"bos_token_id": 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    size = {**SIZE, "hidden_act": hidden_act}
    text = {**size, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 77}
    vision = {**size, "image_size": 48, "patch_size": 16}
    randomize(CLIPModel(CLIPConfig(projection_dim=16, text_config=text, vision_config=vision))).save_pretrained(folder)
    return folder
