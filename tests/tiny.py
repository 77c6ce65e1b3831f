"""What several test files of tiny random models share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from interfaces import Prompt, Sample

BERT_MARKS, CLIP_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), ("<pad>", "<unk>", "<s>", "</s>")
WORDS = "a red green blue car dog cat man person photo of is the reading kicked boy waved round square ?".split()
SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


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


def write_bert_tokenizer(folder: Path, vocab: dict[str, int], marks: tuple[str, ...] = BERT_MARKS) -> None:
    """BERT's pipeline on a small vocabulary; `marks` are padding, unknown, start and end."""
    pad, unknown, start, end = marks
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    brackets = [(name, vocab[name]) for name in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=brackets)
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad_token": pad, "unk_token": unknown, "cls_token": start, "sep_token": end}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights each time, large enough that every input matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if "norm" in name.lower() and name.endswith("weight") else 0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_words(folder: Path, words: list[str], marks: tuple[str, ...] = CLIP_MARKS) -> dict[str, int]:
    """A tokenizer of these words between padding, unknown, start (0 to 2) and end (the last); text model's ids."""
    vocab = {word: i for i, word in enumerate([*marks[:3], *words, marks[3]])}
    write_bert_tokenizer(folder, vocab, marks)
    return {"vocab_size": len(vocab), "bos_token_id": 2, "eos_token_id": len(vocab) - 1, "pad_token_id": 0}


def write_clip(folder: Path, words: list[str] = WORDS, hidden_act: str = "quick_gelu") -> Path:
    """A CLIP and its tokenizer."""
    size = {**SIZE, "hidden_act": hidden_act}
    text = {**size, **write_words(folder, words), "max_position_embeddings": 77}
    vision = {**size, "image_size": 48, "patch_size": 16}
    randomize(CLIPModel(CLIPConfig(projection_dim=16, text_config=text, vision_config=vision))).save_pretrained(folder)
    return folder


def random_janus():
    """With the miniature's words and sizes but a VQ that has every kind of block."""
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    from miniature.janus import WIDTH, new_janus

    torch.manual_seed(0)
    vq = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=8, num_embeddings=64, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1, 2],
            num_res_blocks=1, num_patches=6, projection_dim=WIDTH, image_token_embed_dim=WIDTH,
        )
    )  # fmt: skip
    return new_janus(vq).eval()
