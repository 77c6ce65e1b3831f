"""Draws with a frozen diffusers text-to-image pipeline in this process.

Any checkpoint that `AutoPipelineForText2Image` knows: FLUX.1/2, SD3.5, Qwen-Image, Z-Image, Sana, SDXL, PixArt, ...
What a pipeline takes is read from the signatures of its `__call__` and `encode_prompt`, never from its name.

Left out: negative prompts, image conditioning. What makes it faster or smaller: `levers`.

Source: diffusers 0.42.1, `pipelines/*/pipeline_*.py`.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from errors import UserError
from interfaces import OnImage
from models.frozen import without_zero3_init
from models.hub import resolve
from models.weights import check_folder, locked
from rendering import notify_rows
from rendering.levers import TRIAL_MEMORY_SHARE, Levers, apply, on_device, text_encoders
from run.signals import leaving

# Pipelines print every text that they cut, padding included; `LocalRenderer.truncated` counts them and warns once.
logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TRIAL_TEXT = "a photo of {} things, of no importance whatever"


class LocalRenderer:
    """A frozen diffusers pipeline as an `interfaces.Renderer`. A plain class, so that no trainer wraps or prepares it.

    A row's picture depends on its text and seed alone: noise comes from a CPU generator per row, and text encoders and
    pipeline always see exactly `chunk_size` rows.

    Attributes:
        failures: why rows came back as None, one count per row ("blank text", "safety checker", "black picture",
            "non-finite pixels", "out of memory", "told to leave").
        truncated: texts longer than `max_tokens` that were drawn all the same, their ends unread.
        chunk_size: rows drawn at once; halved for good when the device runs out of memory.
    """

    def __init__(
        self,
        path: str | DiffusionPipeline,
        *,
        device: str | torch.device,
        dtype: str,
        steps: int | None,
        guidance: float | None,
        height: int | None,
        width: int | None,
        max_sequence_length: int | None,
        chunk_size: int,
        levers: Levers | None = None,
    ) -> None:
        """Load `path` onto `device` and freeze it. None leaves a setting at the pipeline's own default.

        Args:
            path: a folder with a `model_index.json`, or a Hub repository "org/name"; or a pipeline that is built
                already, which is changed in place and whose `dtype` is its own.
            device: of every component.
            dtype: "bfloat16", "float16" or "float32".
            steps: denoising steps, >= 1.
            guidance: the pipeline's guidance scale (Qwen-Image: `true_cfg_scale`, its `guidance_scale` being unused).
            height, width: pixels. When either is given, Sana and PixArt draw at this very size instead of drawing at
                the nearest trained one and resizing.
            max_sequence_length: text tokens read; fewer are cheaper, since every text is padded to this length.
            chunk_size: rows drawn at once, >= 1. A last chunk is filled up by repeating its last row, which costs
                time; for single pictures choose 1.
            levers: what makes it faster or smaller; none by default.

        Raises:
            UserError: nothing at `path`, Hub out of reach, or weights that did not load whole.
            ValueError: a setting or lever that this pipeline does not take, or out of range.
        """
        if dtype not in DTYPES:
            raise ValueError(f"unknown renderer dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if chunk_size < 1:
            raise ValueError(f"renderer chunk_size is {chunk_size}: give 1 or more rows")
        self.pipe, self.device = _load(path, DTYPES[dtype]) if isinstance(path, str) else path, torch.device(device)
        self.pipe.set_progress_bar_config(disable=True)
        for component in self.pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
        levers = levers or Levers()
        apply(levers, self.pipe, self.device)
        self._away = text_encoders(self.pipe) if levers.offload_text else []
        self.chunk_size = chunk_size
        self.failures: Counter[str] = Counter()
        self.truncated = 0
        self._settings = _call_settings(
            self.pipe,
            num_inference_steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            max_sequence_length=max_sequence_length,
        )
        self._tokenizer = _longest_tokenizer(self.pipe)
        self._encoded: dict[str, tuple] = {}
        self._texts: list[str] = []  # of this call
        self._lone: tuple | None = None  # what `encode_prompt` returns for one row
        # A few pipelines (Kandinsky, Stable Cascade, ...) have no encode_prompt: they encode each row of each chunk.
        if "encode_prompt" in dir(type(self.pipe)):
            self._encode = self.pipe.encode_prompt
            self.pipe.encode_prompt = self._encode_each_text_once

    @torch.inference_mode()
    def __call__(
        self, texts: Sequence[str], seeds: Sequence[int], on_image: OnImage | None = None
    ) -> list[Image.Image | None]:
        """Draw `texts[i]` from noise `seeds[i]`, once per distinct pair; equal rows share one picture object.

        Args:
            texts: B texts of any length.
            seeds: B seeds in [-2**63, 2**64).
            on_image: told index and picture of a row after its chunk.

        Returns:
            B RGB pictures; None where a row could not be drawn, with the reason counted in `failures`.

        Raises:
            ValueError: as many texts as seeds are needed.
        """
        if len(texts) != len(seeds):
            raise ValueError(f"renderer got {len(texts)} texts but {len(seeds)} seeds: give one seed per text")
        rows = list(zip(texts, seeds, strict=True))
        distinct = [row for row in dict.fromkeys(rows) if row[0].strip()]
        self._texts = list(dict.fromkeys(text for text, _ in distinct))
        self._count_truncated(set(self._texts))
        try:
            drawn = self._draw_all(distinct, notify_rows(rows, on_image))
        finally:
            self._forget()
        outcomes = [drawn.get(row, "told to leave" if row[0].strip() else "blank text") for row in rows]
        self.failures.update(outcome for outcome in outcomes if isinstance(outcome, str))
        return [None if isinstance(outcome, str) else outcome for outcome in outcomes]

    @torch.inference_mode()
    def trial(self, size: int, share: float = TRIAL_MEMORY_SHARE, **changes: int) -> float | None:
        """Seconds a picture when `size` are drawn at once, None if that does not fit; leaves `chunk_size` at `size`.

        One step warms up, off the clock.

        Args:
            size: pictures.
            share: of the GPU's memory that is free now; a batch that takes more does not fit.
            changes: settings of the pipeline's call that are others than this renderer's.
        """
        self.chunk_size = size
        rows = [(TRIAL_TEXT.format(index), index) for index in range(size)]
        on_gpu = self.device.type == "cuda"
        room = 0.0
        if on_gpu:
            torch.cuda.empty_cache()
            room = torch.cuda.memory_allocated(self.device) + share * torch.cuda.mem_get_info(self.device)[0]
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            if self._draw_chunk(rows, **{**changes, "num_inference_steps": 1}) is None:
                return None
            self._forget()
            started = time.perf_counter()
            if (
                self._draw_chunk(rows, **changes) is None
                or on_gpu
                and torch.cuda.max_memory_allocated(self.device) > room
            ):
                return None
            return (time.perf_counter() - started) / size
        finally:
            self._forget()

    def _forget(self) -> None:
        """What was encoded is kept for one call."""
        self._encoded.clear()
        self._texts = []

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, special ones included, in the pipeline's longest-context tokenizer, before truncation.

        The chat template that language-model encoders (Qwen-Image, Z-Image, FLUX.2) put around a text is not counted.
        """
        return len(self._tokenizer(text, verbose=False).input_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that are read: `max_sequence_length` (given or default) or the tokenizer's lower limit."""
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        limit = self._tokenizer.model_max_length
        if "max_sequence_length" not in parameters:
            return limit
        return min(self._settings.get("max_sequence_length", parameters["max_sequence_length"].default), limit)

    @property
    def settings(self) -> dict[str, int | float | None]:
        """`steps`, `guidance`, `max_sequence_length` of every picture, given or default; None if it has none."""
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        chosen = {name: parameter.default for name, parameter in parameters.items()} | self._settings
        names = {
            "steps": "num_inference_steps",
            "guidance": _guidance_name(parameters),
            "max_sequence_length": "max_sequence_length",
        }
        return {ours: chosen.get(theirs) for ours, theirs in names.items()}

    @property
    def tokenizer_json(self) -> str | None:
        """The tokenizer of `count_tokens` as a tokenizer.json; None if it has no such form."""
        return self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else None

    def _count_truncated(self, texts: set[str]) -> None:
        lengths = [self.count_tokens(text) for text in texts]
        cut = sum(length > self.max_tokens for length in lengths)
        if cut and not self.truncated:
            warnings.warn(
                f"a text of {max(lengths)} tokens is longer than the {self.max_tokens} that the renderer reads: its "
                "end is not drawn. Raise max_sequence_length or ask for shorter rewrites. From now on only counted.",
                stacklevel=2,
            )
        self.truncated += cut

    def _draw_all(
        self, rows: list[tuple[str, int]], tell: Callable[[tuple[str, int], Image.Image], None]
    ) -> dict[tuple[str, int], Image.Image | str]:
        """Distinct (text, seed) -> picture, or why there is none; cut short between chunks when told to leave."""
        drawn: dict[tuple[str, int], Image.Image | str] = {}
        while len(drawn) < len(rows) and not leaving():
            chunk = rows[len(drawn) : len(drawn) + self.chunk_size]
            pictures = self._draw_chunk(chunk)
            if pictures is None and self.chunk_size == 1:
                pictures = ["out of memory"]
            if pictures is not None:
                for row, picture in zip(chunk, pictures, strict=True):
                    drawn[row] = picture
                    if not isinstance(picture, str):
                        tell(row, picture)
            else:
                warnings.warn(
                    f"out of memory drawing {self.chunk_size} pictures at once: from now on {self.chunk_size // 2}. "
                    f"Start with chunk_size={self.chunk_size // 2} to save the failed attempt.",
                    stacklevel=2,
                )
                self.chunk_size //= 2
        return drawn

    def _draw_chunk(self, rows: list[tuple[str, int]], **changes: int) -> list[Image.Image | str] | None:
        """At most `chunk_size` rows -> picture or reason each; None if the device ran out of memory.

        `changes` are settings of this call alone.

        The pipeline always gets `chunk_size` rows, the last one repeated: matrix products of another shape may sum in
        another order, and a picture would then depend on how many rows came with it. Measured on a CPU, tiny models
        in bfloat16, 4 steps: up to 4 of 255 levels between 1 row at once and 4; none with the chunk filled up.
        """
        padded = rows + [rows[-1]] * (self.chunk_size - len(rows))
        settings = {**self._settings, **changes}
        if "negative_prompt" in settings:
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(padded)
        try:
            output = self.pipe(
                prompt=[text for text, _ in padded],
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in padded],
                output_type="np",  # not "pil": NaN would be cast to a valid colour
                **settings,
            )
        except torch.OutOfMemoryError:
            output = None
        if output is None:  # outside `except`, whose traceback keeps the failed attempt's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None
        flags = output.get("nsfw_content_detected") or [False] * len(padded)
        return [
            "safety checker" if flag else _to_picture(pixels)
            for pixels, flag, _ in zip(output.images, flags, rows, strict=False)
        ]

    def _encode_each_text_once(self, *args, **kwargs) -> tuple:
        """Stands in for the pipeline's own `encode_prompt`: distinct rows are encoded once, remembered, then stacked.

        The pipeline itself calls it, with the arguments that it would have given, and reads the result as usual; so
        neither those (Sana's instruction, FLUX.2's layers) nor the order of the returned values, which differs between
        pipelines, need be known here.
        """
        arguments = inspect.signature(self._encode).bind(*args, **kwargs).arguments
        prompts = arguments["prompt"]
        size = 1 if isinstance(prompts, str) else len(prompts)
        rows = [{name: _row_of(name, value, index) for name, value in arguments.items()} for index in range(size)]
        keys = [repr(row) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._encoded}
        if new and self._away:
            new |= self._coming(rows[0])
        if new:
            self._encode_new(new)
        return tuple(_stack(values) for values in zip(*(self._encoded[key] for key in keys), strict=True))

    def _coming(self, row: dict) -> dict[str, dict]:
        """Key -> row of every text of this call, made after `row`; none if `row` is no text of it but a negative one.

        So that text encoders that are in main memory come to the device once a call, not once a chunk.
        """
        if row["prompt"] not in [[text] for text in self._texts]:
            return {}
        same = [name for name, value in row.items() if isinstance(value, list) and value == row["prompt"]]
        rows = [{**row, **dict.fromkeys(same, [text])} for text in self._texts]
        return {key: other for other in rows if (key := repr(other)) not in self._encoded}

    def _encode_new(self, new: dict[str, dict]) -> None:
        """Encode and remember rows by their keys, `chunk_size` of them at a time."""
        keys = list(new)
        with on_device(self._away, self.device):
            for start in range(0, len(keys), self.chunk_size):
                some = keys[start : start + self.chunk_size]
                self._encoded.update(zip(some, self._encode_rows([new[key] for key in some]), strict=True))

    def _encode_rows(self, rows: list[dict]) -> list[tuple]:
        """Each row's values as if it had been encoded alone, from one pass over `chunk_size` rows where that is safe.

        Safe means that the pass returns, row for row, the shapes that a lone row has (one is encoded once to see
        them): then nothing was padded to the longest neighbour. Qwen-Image and Z-Image do pad; they are encoded row
        by row. The pass is always filled up to `chunk_size`, for the reason given at `_draw_chunk`.
        """
        if self._lone is None:
            self._lone = self._encode_row(rows[0])
        padding = "prompt_embeds_mask" in rows[0] or any(isinstance(value, list) for value in self._lone)
        if self.chunk_size > 1 and not padding:
            padded = rows + [rows[-1]] * (self.chunk_size - len(rows))
            together = self._encode(**{name: _merged(name, [row[name] for row in padded]) for name in rows[0]})
            split = [_split(one, many, len(padded)) for one, many in zip(self._lone, together, strict=True)]
            if None not in split:
                return list(zip(*split, strict=True))[: len(rows)]
        return [self._encode_row(row) for row in rows]

    def _encode_row(self, row: dict) -> tuple:
        copied = {name: list(value) if isinstance(value, list) else value for name, value in row.items()}
        values = self._encode(**copied)  # a copy: Z-Image rewrites the list of prompts that it is given
        if "prompt_embeds_mask" in row:  # Qwen-Image pads to the batch's longest text, and lone rows have no mask
            embeds, mask = values
            padding = row["max_sequence_length"] - embeds.shape[1]
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
            values = torch.nn.functional.pad(embeds, (0, 0, 0, padding)), torch.nn.functional.pad(mask, (0, padding))
        return values


def _merged(name: str, values: list) -> object:
    """The rows' values of one argument of `encode_prompt` as one: prompts side by side, anything else is shared."""
    if isinstance(values[0], list) and name.startswith(("prompt", "negative_prompt")):
        return [text for value in values for text in value]
    return values[0]


def _split(alone: torch.Tensor | None, together: torch.Tensor | None, size: int) -> list | None:
    """`together`, of `size` rows, as one value per row shaped like `alone`; None if it cannot be cut that way."""
    if alone is None and together is None:
        return [None] * size
    if alone.shape[0] == 1 and together.shape == (size, *alone.shape[1:]):
        return list(together.split(1))
    return [together] * size if together.shape == alone.shape else None  # FLUX.1's text_ids (L, 3) are shared


def _row_of(name: str, value: object, index: int) -> object:
    """Row `index` of an argument of `encode_prompt`; only prompts differ by row (Sana has another list of strings)."""
    per_row = isinstance(value, list) and name.startswith(("prompt", "negative_prompt"))
    return [value[index]] if per_row else value


def _stack(values: Sequence) -> torch.Tensor | list | None:
    """One value of `encode_prompt` per row -> the batch's. Row: tensor (1, ...), list of 1, or shared by all rows."""
    first = values[0]
    if isinstance(first, list):  # Z-Image: one tensor (L_i, D) per row
        return [item for value in values for item in value]
    if isinstance(first, torch.Tensor) and first.shape[0] == 1:
        return torch.cat(values)
    return first  # None, or FLUX.1's text_ids (L, 3)


def _to_picture(pixels: np.ndarray) -> Image.Image | str:
    """(H, W, 3) floats in [0, 1] -> RGB picture, or why it is none. Rounds as diffusers' `numpy_to_pil` does."""
    if not np.isfinite(pixels).all():
        return "non-finite pixels"
    levels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(levels) if levels.any() else "black picture"


def _call_settings(pipe: DiffusionPipeline, *, guidance: float | None, **wanted: int | None) -> dict:
    """The keyword arguments of every call of `pipe`: what was asked for under this pipeline's own names."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    guided_by = _guidance_name(parameters)
    wanted[guided_by] = guidance
    settings = {name: value for name, value in wanted.items() if value is not None}
    for name, value in settings.items():
        if name not in parameters:
            raise ValueError(f"{type(pipe).__name__} takes no {name} (given: {value}): leave it out")
    if guided_by == "true_cfg_scale":
        settings["negative_prompt"] = " "  # without one Qwen-Image silently draws unguided; " " is its model card's
    if "use_resolution_binning" in parameters and settings.keys() & {"height", "width"}:
        settings["use_resolution_binning"] = False
    return settings


def _guidance_name(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Qwen-Image: true_cfg_scale=4.0 and an unused guidance_scale=None; FLUX.1: 1.0 and a live guidance_scale=3.5."""
    true_cfg = parameters.get("true_cfg_scale")
    return "true_cfg_scale" if true_cfg is not None and true_cfg.default > 1 else "guidance_scale"


def _longest_tokenizer(pipe: DiffusionPipeline) -> PreTrainedTokenizerBase:
    """T5's for FLUX.1 and SD3, not CLIP's; the one inside the processor for FLUX.2."""
    components = pipe.components.values()
    tokenizers = [component.tokenizer for component in components if isinstance(component, ProcessorMixin)]
    tokenizers += [component for component in components if isinstance(component, PreTrainedTokenizerBase)]
    return max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)


def _load(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    try:
        folder = _folder(path)
        for part in (part for part in folder.iterdir() if part.is_dir()):
            check_folder(part)
        with without_zero3_init():
            pipe = AutoPipelineForText2Image.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except (OSError, httpx.HTTPError) as error:  # missing file, gated repository, lost connection
        raise UserError(_missing(path, f"cannot be loaded ({_first_line(error)})")) from error
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for parameter_name, parameter in component.named_parameters():
                if parameter.numel() == 0 or parameter.is_meta:
                    raise UserError(
                        f"{path}: {name}.{parameter_name} is empty after loading, as under DeepSpeed ZeRO-3: load the "
                        "renderer before the Accelerator exists, or use deepspeed_2.yaml (ZeRO-2)"
                    )
    return pipe


def _folder(path: str) -> Path:
    """Where the pipeline lies on this disk; what is missing of it is downloaded if the hub can be reached."""

    def download(repo: str, revision: str | None) -> str:
        return DiffusionPipeline.download(repo, revision=revision, use_safetensors=True)

    return resolve(path, ("model_index.json",), download=download)


def _missing(path: str, problem: str) -> str:
    """One line: what is missing, its size and licence where known, and the command that fetches it."""
    if Path(path).is_dir():
        return f"renderer checkpoint {path} {problem}. Copy or save the whole diffusers folder again"
    known = locked(path)
    about = f", {known.size}, licence: {known.licence} (accept it on the model's page if asked)" if known.size else ""
    return f"renderer checkpoint {path}{about} {problem}. Fetch it with: {known.command}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
