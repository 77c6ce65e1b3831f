"""Where a model computes, and in which numbers."""

from __future__ import annotations

import os

import torch

from errors import UserError

DTYPES = ("auto", "bfloat16", "float32")  # of a policy; a frozen model may be in float16, too
WITH_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions of x86 and ARM
# What hides instructions from oneDNN, which multiplies; a level that leaves those for bfloat16 has one of the words.
HIDING, SHOWN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"), ("BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")


def pick_device(device: str) -> str:
    """`device`, or for "auto" the GPU if there is one (a Mac's is "mps"), else "cpu".

    Raises:
        UserError: a GPU is named that is not there.
    """
    if device == "auto":
        on_mac = "mps" if torch.backends.mps.is_available() else "cpu"
        return "cuda" if torch.cuda.is_available() else on_mac
    if device.startswith("cuda") and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is asked for and no such GPU is to be seen; use cpu")
    return device


def pick_dtype(dtype: str, device: str, *, frozen: bool = False) -> str:
    """`dtype`, or for "auto" what `device` is fast in; UserError for an unknown one.

    bfloat16 on a GPU that has it, and for a `frozen` model on a CPU that has it: on others the miniature draws 2 (with
    AVX-512) to 8 times (AVX2) as slowly as in float32. Else float16 for a frozen model on a GPU, float32 elsewhere.
    """
    known = (*DTYPES, "float16") if frozen else DTYPES
    if dtype not in known:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(known)}")
    if dtype != "auto":
        return dtype
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if has_bfloat16(device) and (on_gpu or frozen):
        return "bfloat16"
    return "float16" if on_gpu and frozen else "float32"


def has_bfloat16(device: str) -> bool:
    """Whether `device` has arithmetic in bfloat16 of its own; a GPU that is only planned is taken to have it."""
    if torch.cuda.is_available() and not device.startswith("cpu"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    levels = [os.environ[name].upper() for name in HIDING if name in os.environ]
    shown = all(any(word in level for word in SHOWN) for level in levels) and torch.backends.mkldnn.is_available()
    return device.startswith("cuda") or (shown and any(map(torch.cpu.get_capabilities().get, WITH_BFLOAT16)))
