"""What a pipeline is called with, and whether it draws so: asked of its class and configuration, before its weights.

Source: diffusers 0.42.1, `check_inputs`, `vae_scale_factor` and `image_processor` of `pipelines/*/pipeline_*.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import attention_backend
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class

from errors import UserError, one_line
from models.hub import on_disk

if TYPE_CHECKING:
    from rendering.options import RenderOptions

DENOISERS = ("transformer", "unet")
MOST_STEP = 128  # pixels from a size that is drawn to the next


def check(options: RenderOptions) -> None:
    """Raise UserError for what will not be drawn as asked; a pipeline that is not here, or damaged, fails later."""
    if options.render_attention is not None:
        try:
            with attention_backend(options.render_attention):  # puts the process's own back
                pass
        except (RuntimeError, ImportError, ValueError, OSError) as error:
            raise UserError(f"--render_attention {options.render_attention}: {one_line(error, 600)}") from error
    folder = options.sdmodel_name and on_disk(options.sdmodel_name)
    if not folder or not (folder / "model_index.json").is_file():
        return
    try:
        pipe = outline(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    call_settings(options, pipe)


@lru_cache(1)
def outline(folder: Path) -> DiffusionPipeline:
    """The pipeline without weights, text encoders and scheduler."""
    index = DiffusionPipeline.load_config(folder, local_files_only=True)
    kind = _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, index["_class_name"])
    parts = dict.fromkeys(name for name, part in index.items() if isinstance(part, list))
    with torch.device("meta"):
        for name in parts.keys() & {"vae", *DENOISERS}:
            part = getattr(diffusers, index[name][1])
            parts[name] = part.from_config(part.load_config(folder / name, local_files_only=True))
    return kind(**parts)


def call_settings(options: RenderOptions, pipe: DiffusionPipeline) -> dict:
    """The keyword arguments of every call of `pipe`: the given options under this pipeline's own names.

    With a given size, Sana and PixArt draw at this very size instead of the nearest trained one.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    guided_by = guidance_name(parameters)
    asked = {
        "num_inference_steps": options.render_steps,
        guided_by: options.guidance,
        "height": options.resolution,
        "width": options.resolution,
        "max_sequence_length": options.max_sequence_length,
    }
    settings = {name: value for name, value in asked.items() if value is not None}
    for name, value in settings.items():
        if name not in parameters:
            raise UserError(f"{type(pipe).__name__} takes no {name} (given: {value}): leave it out")
    _check_call(pipe, options.resolution, options.max_sequence_length)
    if guided_by == "true_cfg_scale":
        settings["negative_prompt"] = " "  # without one Qwen-Image silently draws unguided; " " is its model card's
    if "use_resolution_binning" in parameters and options.resolution is not None:
        settings["use_resolution_binning"] = False
    return settings


def guidance_name(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Qwen-Image: true_cfg_scale=4.0 and an unused guidance_scale=None; FLUX.1: 1.0 and a live guidance_scale=3.5."""
    true_cfg = parameters.get("true_cfg_scale")
    return "true_cfg_scale" if true_cfg is not None and true_cfg.default > 1 else "guidance_scale"


def _check_call(pipe: DiffusionPipeline, side: int | None, tokens: int | str | None) -> None:
    """Refuse a size that `pipe` would round (FLUX, Qwen-Image), and what its own `check_inputs` refuses."""
    own, name = vars(pipe), type(pipe).__name__
    parts = [pipe.components[part] for part in DENOISERS if part in pipe.components]
    patches = [part.config["patch_size"] for part in parts if isinstance(part.config.get("patch_size"), int)]
    factors = [own["image_processor"].config.vae_scale_factor] if "image_processor" in own else []
    step = math.lcm(*factors, *(own["vae_scale_factor"] * patch for patch in patches if "vae_scale_factor" in own))
    asks = pipe.check_inputs if "check_inputs" in dir(type(pipe)) else lambda **_: None
    parameters = inspect.signature(asks).parameters.items()

    def objection(size: int, **more: int) -> str | None:
        given = {"prompt": "a", "height": size, "width": size, "callback_steps": 1, **more}
        try:
            asks(**{n: given.get(n) for n, p in parameters if n in given or p.default is p.empty})
        except ValueError as error:
            return one_line(error)
        return None

    def fits(size: int) -> bool:
        return size % step == 0 and objection(size) is None

    if side is not None and not fits(side):
        ways = (range(side, 0, -1), range(side, side + MOST_STEP))
        if nearest := [str(size) for way in ways if (size := next(filter(fits, way), None))]:
            raise UserError(f"--resolution {side}: {name} draws no such size, the nearest are {' and '.join(nearest)}")
    if isinstance(tokens, int) and (why := objection(side or MOST_STEP * step, max_sequence_length=tokens)):
        raise UserError(f"--max_sequence_length {tokens}: {name} says that {why}")
