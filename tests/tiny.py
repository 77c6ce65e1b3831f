"""What several test files of tiny random models share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interfaces import Prompt, Sample


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def sample(prompt: Prompt | str, *images: Image.Image) -> Sample:
    return Sample(prompt if isinstance(prompt, Prompt) else Prompt(prompt), "completion", "a rewrite", images)


def count_rows(monkeypatch: pytest.MonkeyPatch, module: torch.nn.Module) -> list[int]:
    """The rows of each forward pass of `module`, from now on."""
    rows, forward = [], module.forward

    def counted(*args, **kwargs):
        rows.append(len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))))
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return rows


def write_bert_tokenizer(folder: Path, vocab: dict[str, int]) -> None:
    """BERT's pipeline on a small vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    brackets = [(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=brackets)
    tokenizer.decoder = decoders.WordPiece()
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
