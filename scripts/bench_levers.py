"""`scripts/bench.py --target levers`: what each lever of the renderer gains, and what it does to the pictures.

On the miniature's trained weights, or with `--scale real` on FLUX.1-dev's shapes with random weights: their times
are true, and their differences say little of real pictures. Each lever is compared alone with the same renderer
without it. `gain` is the milliseconds without it over those with it, medians of 3; `most` and `mean` are differences
of all channels of all pixels in levels of 255. What is not installed, or not for this device, has that reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from errors import UserError, one_line
from miniature import build as miniature
from models.frozen import DTYPES
from rendering import RenderOptions, load_renderer
from rendering.local import LocalRenderer
from scripts.bench_common import measure
from scripts.bench_gpu import flux

ATTENTION = ("_native_cudnn", "_native_flash", "_native_efficient", "_native_math", "flash", "_flash_3", "sage")
BASES = {
    "real": {"render_batch_size": 8, "max_sequence_length": 256, "render_steps": 20, "resolution": 512},
    "tiny": {"render_batch_size": 16, "max_sequence_length": 32, "render_steps": 8},
}


def bench_levers(scale: str, minutes: float, device: torch.device, only: Sequence[str] = ()) -> dict:
    """A row for each lever, or for those that `only` names; the first row is the renderer without any."""
    base, until = BASES[scale], time.perf_counter() + 60 * minutes
    load = _load_real if scale == "real" else miniature.renderer
    texts = [f"a red circle and {index} blue squares" for index in range(2 * base["render_batch_size"])]
    chosen = [(name, changes) for name, changes in levers(base) if not only or name in only]
    rows, expected = [], []
    for name, changes in tqdm([("no lever", {}), *chosen], desc="levers", leave=False):
        if rows and time.perf_counter() > until:
            rows.append({"name": name, "skipped": f"the {minutes:g} minutes are over"})
            continue
        try:
            options = {**base, "render_device": str(device), **changes}
            row, pictures = _measure(lambda options=options: load(**options), texts, device)
        except (UserError, ValueError, RuntimeError) as error:  # RuntimeError: a kernel that this device does not have
            rows.append({"name": name, "skipped": one_line(error)})
            continue
        if expected:
            before, after = (np.stack([np.asarray(one, np.int16) for one in side]) for side in (expected, pictures))
            differences = np.abs(after - before)
            row |= {"gain": rows[0]["ms"] / row["ms"], "most": int(differences.max()), "mean": differences.mean()}
        expected = expected or pictures
        rows.append({"name": name, **row})
    return {"scale": scale, "device": str(device), "pictures": len(texts), **base, "rows": rows}


def levers(base: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name of each lever and the options that it changes, the most important first."""
    return [
        ("compiled blocks", {"render_compile": True}),
        ("text encoders away", {"render_offload_text": True}),
        ("VAE in slices", {"render_slice_vae": True}),
        *[(f"batch {size}", {"render_batch_size": size}) for size in (1, 2, 4, 8) if size < base["render_batch_size"]],
        *[(f"quantised, {name}", {"render_quantization": name}) for name in ("fp8", "fp8_weights", "int8", "nf4")],
        *[(f"attention {name}", {"render_attention": name}) for name in ATTENTION],
        ("half the text tokens", {"max_sequence_length": base["max_sequence_length"] // 2}),
        ("half the steps", {"render_steps": base["render_steps"] // 2}),
        ("float32", {"render_dtype": "float32"}),
    ]


def _load_real(**changes: Any) -> LocalRenderer:
    options = RenderOptions(**changes)
    pipe = flux(torch.device(options.render_device)).to(DTYPES[options.render_dtype])
    return load_renderer(options, "cpu", pipe=pipe)


def _measure(
    load: Callable[[], LocalRenderer], texts: Sequence[str], device: torch.device
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Figures of one renderer, and its pictures; the first call compiles and warms up."""
    renderer, pictures = load(), []
    first = measure(lambda: pictures.extend(renderer(texts, range(len(texts)))), device)
    if None in pictures:
        raise ValueError(f"not drawn: {dict(renderer.failures)}")
    seconds = sorted(measure(lambda: renderer(texts, range(len(texts))))["seconds"] for _ in range(3))[1]
    return {"first_s": first["seconds"], "ms": 1000 * seconds / len(texts), "peak_gb": first["peak_gb"]}, pictures
