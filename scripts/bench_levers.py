"""`scripts/bench.py --target levers`: what each lever of the renderer gains, and what it does to the pictures.

On the miniature, trained weights on whatever device there is; with `--scale real`, FLUX.1-dev's shapes and random
weights, whose differences say little of real pictures and whose times are true. Each lever is taken alone, against
the same renderer without it: the gain is base seconds over its seconds, the medians of 3; max and mean are differences
of all channels of all pixels in levels of 255. What is not installed, or not for this device, has that reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from errors import UserError
from miniature import build as miniature
from rendering import RenderOptions, load_renderer
from rendering.levers import MAX_PIXEL_DIFFERENCE
from rendering.local import LocalRenderer
from scripts.bench_gpu import Clock, _peak, _reset_peak
from scripts.bench_models import SCALES, NoRoom, flux

ATTENTION = ("_native_cudnn", "_native_flash", "_native_efficient", "_native_math", "flash", "_flash_3", "sage")
Make = Callable[..., LocalRenderer]


@dataclass
class Lever:
    """One row.

    Attributes:
        name: what is changed.
        first: seconds of the first call, compilation and all.
        seconds: of a picture.
        gain: base over this.
        most, mean: difference of the pictures, levels of 255.
        peak_gb: the most memory of tensors, 10^9 bytes; None on a CPU.
        skipped: why there are no figures.
    """

    name: str
    first: float | None = None
    seconds: float | None = None
    gain: float | None = None
    most: int | None = None
    mean: float | None = None
    peak_gb: float | None = None
    skipped: str = ""


def bench_levers(scale: str | None, minutes: float, device: torch.device, only: Sequence[str] = ()) -> dict:
    """The table as plain data.

    Args:
        scale: of scripts/bench_models.py; None: the miniature.
        minutes: levers that come later are left out.
        device: where to draw.
        only: names of the levers to measure; none means all.
    """
    base, make, pictures = _base(scale, device)
    clock, rows = Clock(minutes), []
    texts = [f"a red circle and {index} blue squares" for index in range(pictures)]
    try:
        row, expected = _measure("as it is", make, {}, texts, device)
        rows.append(row)
        for name, changes in tqdm(levers(base), desc="levers", leave=False):
            if only and name not in only:
                continue
            if clock.left < 0:
                rows.append(Lever(name, skipped=f"the {minutes:g} minutes are over"))
                continue
            rows.append(_against(row, expected, *_measure(name, make, changes, texts, device)))
    except NoRoom as error:
        rows.append(Lever("as it is", skipped=f"FLUX {error}"))
    rows.append(Lever("few-step LoRA", skipped="needs its weights: --render_lora in a run, --render_steps with it"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "target": "levers", "device": name, "renderer": scale or "miniature", "pictures": pictures,
        "threads": torch.get_num_threads(), "tolerance": MAX_PIXEL_DIFFERENCE, "base": base,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def levers(base: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and what it changes of the `base` options, what matters most first."""
    batch, text, steps = base["render_batch_size"], base["max_sequence_length"], base["render_steps"]
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size < batch]
    return [
        ("compiled blocks", {"render_compile": True}),
        ("text encoders away", {"render_offload_text": True}),
        ("VAE in slices", {"render_slice_vae": True}),
        *[(f"batch {size}", {"render_batch_size": size}) for size in sizes],
        *[(f"quantised, {name}", {"render_quantization": name}) for name in ("fp8", "fp8_weights", "int8", "nf4")],
        *[(f"attention {name}", {"render_attention": name}) for name in ATTENTION],
        ("half the text tokens", {"max_sequence_length": text // 2}),
        ("half the steps", {"render_steps": max(1, steps // 2)}),
        ("float32", {"render_dtype": "float32"}),
    ]


def _base(scale: str | None, device: torch.device) -> tuple[dict[str, Any], Make, int]:
    """Options of the renderer without levers, what makes one with changes, and how many pictures are drawn."""
    if scale is None:
        base = {"render_batch_size": 16, "max_sequence_length": 32, "render_steps": 8}
        return base, lambda **changes: miniature.renderer(**{**base, "render_device": str(device), **changes}), 32
    shapes = SCALES[scale]
    side, steps, batch = shapes.recipe
    base = {"render_batch_size": batch, "max_sequence_length": shapes.text, "render_steps": steps, "resolution": side}

    def make(**changes: Any) -> LocalRenderer:
        options = RenderOptions(**{**base, **changes})
        pipe = flux(shapes, device)
        return load_renderer(
            options, str(device), pipe=pipe.to(torch.float32) if options.render_dtype == "float32" else pipe
        )

    return base, make, 2 * batch


def _measure(
    name: str, make: Make, changes: dict[str, Any], texts: Sequence[str], device: torch.device
) -> tuple[Lever, list[Image.Image | None]]:
    """The row, without what needs the base, and its pictures; the renderer is gone afterwards."""
    row = Lever(name)
    try:
        renderer = make(**changes)
        _reset_peak(device)
        started = time.perf_counter()
        pictures = renderer(texts, range(len(texts)))
        row.first = time.perf_counter() - started
        row.seconds = sorted(_seconds(renderer, texts) for _ in range(3))[1] / len(texts)
        row.peak_gb = _peak(device)
    except (UserError, RuntimeError) as error:  # RuntimeError: a kernel that this device does not have
        row.skipped = " ".join(str(error).split())[:160]
        return row, []
    if None in pictures:
        row.skipped = f"not drawn: {dict(renderer.failures)}"
    return row, pictures


def _seconds(renderer: LocalRenderer, texts: Sequence[str]) -> float:
    started = time.perf_counter()
    renderer(texts, range(len(texts)))
    return time.perf_counter() - started


def _against(base: Lever, expected: Sequence, row: Lever, pictures: Sequence) -> Lever:
    if row.skipped or base.skipped:
        return row
    row.gain = base.seconds / row.seconds
    differences = np.stack([difference(*pair) for pair in zip(expected, pictures, strict=True)])
    row.most, row.mean = int(differences.max()), float(differences.mean())
    return row


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    """(H, W, 3) absolute differences in levels of 255."""
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))


def table(rows: Sequence[dict]) -> str:
    """Lines for a terminal."""
    lines = [f"{'lever':28s}{'first s':>9s}{'ms/img':>9s}{'gain':>7s}{'max':>5s}{'mean':>8s}{'peak GB':>9s}"]
    for row in rows:
        if row["skipped"]:
            lines.append(f"{row['name']:28s}    skipped: {row['skipped']}")
            continue
        figures = f"{row['name']:28s}{row['first']:9.2f}{1000 * row['seconds']:9.1f}"
        if row["gain"] is not None:
            figures += f"{row['gain']:7.2f}{row['most']:5d}{row['mean']:8.3f}"
        else:
            figures += f"{'-':>7s}{'-':>5s}{'-':>8s}"
        lines.append(figures + (f"{row['peak_gb']:9.1f}" if row["peak_gb"] is not None else f"{'-':>9s}"))
    return "\n".join(lines)
