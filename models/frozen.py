"""What frozen models share: the one way to load them, and to encode each picture once.

A frozen model is held by a plain object, deliberately not an `nn.Module`: nothing can prepare, shard or train it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed

from errors import UserError, listed
from interfaces import Sample
from models.hub import read

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arithmetic(dtype: str) -> torch.dtype:
    """The torch dtype of that name; UserError if it is unknown."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load(
    kind: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    unused: tuple[str, ...] = (),
    **options: Any,
) -> PreTrainedModel:
    """The model of class `kind` in a folder of `hub.resolve`, frozen. Of a pickle only tensors are read.

    Args:
        unused: how the names of weights begin that may be missing, because what we compute does not use them.
        options: of `from_pretrained`.

    Raises:
        UserError: as `read`; or a weight is missing, in whose place transformers puts random numbers.
    """
    options = {"dtype": dtype, "weights_only": True, "output_loading_info": True, **options}
    model, report = read(kind, folder, **options)
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(unused)):
        raise UserError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__} ({listed(missing, ', ')}): fetch it "
            "again, or name another folder"
        )
    return freeze(model, device)


def freeze(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`model` on `device`, in eval mode, without gradients."""
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def without_zero3_init() -> Iterator[None]:
    """Load frozen models with all their weights although a trainer is configured already.

    While ZeRO-3 is registered, transformers builds a model as empty shards; with FSDP's RAM-efficient loading every
    rank but the first gets placeholders. Both switches belong to the process, so both are put back afterwards.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref  # there is no public getter of the object, only of its dict
    zero = reference() if reference is not None else None
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if zero is not None:
            deepspeed.set_hf_deepspeed_config(zero)
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Arithmetic in `dtype` over float32 weights; nothing changes if that is float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def known_token(tokenizer: PreTrainedTokenizerBase, word: str, folder: Path, model: str) -> int:
    """The id of `word`, which `model` answers with or is marked up by; UserError if that is not one known token."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"the tokenizer in {folder} reads {word!r} as {ids}, {model} needs it as one known token: "
            "give the tokenizer that the model was trained with"
        )
    return ids[0]


def mean_cosines(
    samples: Sequence[Sample],
    encode_texts: Callable[[Sequence[str]], torch.Tensor],
    encode_images: Callable[[Sequence[Image.Image]], torch.Tensor],
    batch_size: int,
    scale: float = 1.0,
) -> list[float | None]:
    """For each sample `scale` times the mean cosine of its prompt and its pictures; None where it is not finite.

    Each distinct prompt and each distinct picture (the same PIL object) is encoded once, in batches, into rows (n, D).
    """
    if not samples:
        return []
    texts = list(dict.fromkeys(sample.prompt.text for sample in samples))
    images = distinct_pictures(samples)
    text_row = {text: row for row, text in enumerate(texts)}
    image_row = {id(image): row for row, image in enumerate(images)}
    text_TD, image_ID = (
        torch.cat([F.normalize(encode(some).float(), dim=-1).cpu() for some in batches(rows, batch_size)])
        for encode, rows in ((encode_texts, texts), (encode_images, images))
    )
    cosines = [
        (image_ID[[image_row[id(image)] for image in sample.images]] @ text_TD[text_row[sample.prompt.text]])
        .mean()
        .item()
        for sample in samples
    ]
    return [scale * cosine if math.isfinite(cosine) else None for cosine in cosines]


def mean(scores: Sequence[float]) -> float | None:
    """The mean of a sample's scores; None if it is not finite."""
    value = sum(scores) / len(scores)
    return value if math.isfinite(value) else None


def check_pictures(samples: Sequence[Sample], reward: str) -> None:
    """Raise ValueError for a sample without pictures, or with one that failed; the caller leaves such samples out."""
    for sample in samples:
        if not sample.images or any(image is None for image in sample.images):
            raise ValueError(
                f"prompt {sample.prompt.id} ({sample.prompt.text!r}) came with images {sample.images}: give {reward} "
                "only samples whose pictures are all there"
            )


def distinct_pictures(samples: Sequence[Sample]) -> list[Image.Image]:
    """Each picture of the samples once (the same PIL object, not the same pixels), in order of appearance."""
    return list({id(image): image for sample in samples for image in sample.images}.values())


def batches(rows: Sequence, size: int) -> Iterator[Sequence]:
    """`rows` in slices of at most `size`."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
