"""Draws with a frozen diffusers text-to-image pipeline in this process.

Any checkpoint that `AutoPipelineForText2Image` knows: FLUX.1/2, SD3.5, Qwen-Image, Z-Image, Sana, SDXL, PixArt, ...
The settings that a pipeline takes are read from the signatures of its `__call__` and `encode_prompt`, never from its
name. `levers` makes it faster or smaller.

Left out: negative prompts, image conditioning.

Source: diffusers 0.42.1, `pipelines/*/pipeline_*.py`.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from errors import UserError, one_line
from interfaces import OnImage
from models.devices import pick_dtype
from models.frozen import DTYPES, without_zero3_init
from models.hub import let_count, resolve
from models.weights import check_folder, locked, parts_of
from rendering.levers import TRIAL_MEMORY_SHARE, apply, on_device, smallest_good_batch, text_encoders
from rendering.options import RenderOptions
from rendering.rows import OnRow, Outcome, Row, draw_distinct
from rendering.settings import call_settings, guidance_name
from run.folder import config_of
from run.signals import leaving

logger = logging.getLogger(__name__)
# Pipelines print every text that they cut, padding included; `LocalRenderer` warns once.
logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)

TRIAL_TEXT = "a photo of {} things, of no importance whatever"


class LocalRenderer:
    """A frozen diffusers pipeline as an `interfaces.Renderer`. A plain class, so that no trainer wraps or prepares it.

    A row's picture depends on its text and seed alone: noise comes from a CPU generator per row, and text encoders and
    pipeline always see exactly `chunk_size` rows.

    Args:
        options: the numbers of `render_batch_size` and `max_sequence_length` must be given, not auto.
        device: of every component.
        pipe: see `load_pipeline`.

    Attributes:
        failures: why rows came back as None, one count per row ("blank text", "safety checker", "black picture",
            "non-finite pixels", "out of memory", "told to leave").
        chunk_size: rows drawn at once; halved for good when the device runs out of memory. A last chunk is filled up
            by repeating its last row, which costs time; for single pictures choose 1.

    Raises:
        UserError: see `load_pipeline`; or a setting that this pipeline does not take.
    """

    def __init__(
        self, options: RenderOptions, device: str | torch.device, pipe: DiffusionPipeline | None = None
    ) -> None:
        self.pipe, self.device = load_pipeline(options, device, pipe), torch.device(device)
        self._settings = call_settings(options, self.pipe)
        self._away = text_encoders(self.pipe) if options.render_offload_text else []
        self._tokenizer = _longest_tokenizer(self.pipe)
        self.chunk_size = options.render_batch_size
        self.failures: Counter[str] = Counter()
        self._has_warned = False  # of a text that is cut
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

        A seed is in [-2**63, 2**64). None is a row that could not be drawn; the reason is counted in `failures`.
        """
        return draw_distinct(texts, seeds, on_image, self.failures, self._draw_all)

    def choose_batch_size(self) -> int:
        """Try batch sizes, and take the smallest that any process found; every process must call it.

        The result depends on what else the machine does, and pictures depend on the batch size by rounding. So a run
        that is continued must keep the size that it began with (`run.json`, derived).
        """
        self.chunk_size = min(gather_object([smallest_good_batch(self.trial)]))
        return self.chunk_size

    @torch.inference_mode()
    def trial(self, size: int, share: float = TRIAL_MEMORY_SHARE, **changes: int) -> float | None:
        """Seconds a picture when `size` are drawn at once, None if that does not fit; leaves `chunk_size` at `size`.

        One step, not timed, warms up.

        Args:
            size: pictures.
            share: of the GPU's memory that is free now; a batch that takes more does not fit.
            changes: settings of the pipeline's call that are others than this renderer's.
        """
        self.chunk_size = size
        rows = [(TRIAL_TEXT.format(index), index) for index in range(size)]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            room = torch.cuda.memory_allocated(self.device) + share * torch.cuda.mem_get_info(self.device)[0]
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            if self._draw_chunk(rows, **{**changes, "num_inference_steps": 1}) is None:
                return None
            self._forget()
            started = time.perf_counter()
            fits = self._draw_chunk(rows, **changes) is not None
            seconds = time.perf_counter() - started
            if on_gpu:
                fits = fits and torch.cuda.max_memory_allocated(self.device) <= room
            return seconds / size if fits else None
        finally:
            self._forget()

    def _forget(self) -> None:
        """Drop what was encoded: it is kept for one call."""
        self._encoded.clear()
        self._texts = []

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, special ones included, in the pipeline's longest-context tokenizer, before truncation.

        The chat template that language-model encoders (Qwen-Image, Z-Image, FLUX.2) put around a text is not counted.
        """
        return len(self._tokenizer(text).input_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that are read: `max_sequence_length` (given or default) or the tokenizer's lower limit."""
        limit = self._tokenizer.model_max_length
        return min(self.settings["max_sequence_length"] or limit, limit)

    @property
    def settings(self) -> dict[str, int | float | None]:
        """Settings of every picture, given or default, by their names in the images API; None if it has none."""
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        chosen = {name: parameter.default for name, parameter in parameters.items()} | self._settings
        return {
            "num_inference_steps": chosen.get("num_inference_steps"),
            "guidance_scale": chosen.get(guidance_name(parameters)),
            "max_sequence_length": chosen.get("max_sequence_length"),
        }

    @property
    def tokenizer_json(self) -> str | None:
        """The tokenizer of `count_tokens` as a tokenizer.json; None if it has no such form."""
        return self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else None

    def _draw_all(self, rows: list[Row], on_row: OnRow) -> dict[Row, Outcome]:
        """The outcome of distinct rows; stops between chunks when the run must leave."""
        self._texts = list(dict.fromkeys(text for text, _ in rows))
        longest = max(map(self.count_tokens, self._texts))
        if longest > self.max_tokens and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a text of %d tokens is longer than the %d that the renderer reads: its end is not drawn. Raise "
                "--max_sequence_length or ask for shorter rewrites. Further ones are not reported.",
                longest,
                self.max_tokens,
            )
        outcomes: dict[Row, Outcome] = {}
        try:
            while len(outcomes) < len(rows) and not leaving():
                chunk = rows[len(outcomes) : len(outcomes) + self.chunk_size]
                pictures = self._draw_chunk(chunk)
                if pictures is None and self.chunk_size > 1:
                    was, self.chunk_size = self.chunk_size, self.chunk_size // 2
                    told = "out of memory drawing %d pictures at once: from now on %d (--render_batch_size)"
                    logger.warning(told, was, self.chunk_size)
                    continue
                for row, picture in zip(chunk, pictures or ["out of memory"], strict=True):
                    outcomes[row] = picture
                    if not isinstance(picture, str):
                        on_row(row, picture)
        finally:
            self._forget()
        return {row: outcomes.get(row, "told to leave") for row in rows}

    def _draw_chunk(self, rows: list[Row], **changes: int) -> list[Outcome] | None:
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
        """Replaces the pipeline's own `encode_prompt`: distinct rows are encoded once, remembered, then stacked.

        The pipeline calls it with its usual arguments and reads the result as usual. So this function needs to know
        neither the arguments (Sana's instruction, FLUX.2's layers) nor the order of the returned values.
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
            with on_device(self._away, self.device):
                for start in range(0, len(new), self.chunk_size):
                    some = dict(list(new.items())[start : start + self.chunk_size])
                    self._encoded.update(zip(some, self._encode_rows(list(some.values())), strict=True))
        return tuple(_stack(values) for values in zip(*(self._encoded[key] for key in keys), strict=True))

    def _coming(self, row: dict) -> dict[str, dict]:
        """Key -> row of every text of this call, made after `row`; none if `row` holds a negative prompt.

        With them, offloaded text encoders come to the device once a call, not once a chunk.
        """
        if row["prompt"] not in [[text] for text in self._texts]:
            return {}
        same = [name for name, value in row.items() if isinstance(value, list) and value == row["prompt"]]
        rows = [{**row, **dict.fromkeys(same, [text])} for text in self._texts]
        return {key: other for other in rows if (key := repr(other)) not in self._encoded}

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


def _longest_tokenizer(pipe: DiffusionPipeline) -> PreTrainedTokenizerBase:
    """T5's for FLUX.1 and SD3, not CLIP's; the one inside the processor for FLUX.2."""
    components = pipe.components.values()
    tokenizers = [component.tokenizer for component in components if isinstance(component, ProcessorMixin)]
    tokenizers += [component for component in components if isinstance(component, PreTrainedTokenizerBase)]
    return max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)


# Loading ----------------------------------------------------------------------------------------------------------


def load_pipeline(
    options: RenderOptions, device: str | torch.device, pipe: DiffusionPipeline | None = None
) -> DiffusionPipeline:
    """The frozen pipeline at `sdmodel_name` with its levers; its components are on `device`.

    Args:
        options: `sdmodel_name`, a folder with a `model_index.json` or a Hub repository "org/name"; `render_dtype`; and
            the levers.
        device: of every component.
        pipe: a pipeline to use in place of the one at `sdmodel_name`. It is changed in place and keeps its dtype.

    Raises:
        UserError: nothing at `sdmodel_name`, Hub out of reach, incomplete weights, or a lever that cannot be had.
    """
    pipe = pipe or _load(options.sdmodel_name, DTYPES[pick_dtype(options.render_dtype, str(device), frozen=True)])
    pipe.set_progress_bar_config(disable=True)
    for component in map(let_count, pipe.components.values()):
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    _warn_of_size(options, pipe)
    apply(options, pipe, torch.device(device))
    return pipe


def _warn_of_size(options: RenderOptions, pipe: DiffusionPipeline) -> None:
    """Say so where a run of `pref_grpo` trained these weights at another size than is drawn; one process does."""
    for source in filter(None, (options.sdmodel_name, options.render_lora)):
        if config := config_of(Path(source.partition(":")[0])):
            own = pipe.default_sample_size * pipe.vae_scale_factor  # all that are trained there have them
            trained, drawn = config.get("resolution") or own, options.resolution or own
            if trained != drawn and os.environ.get("RANK", "0") == "0":
                logger.warning("%s was trained at %d pixels and draws at %d (--resolution)", source, trained, drawn)


def find_pipeline(path: str) -> Path:
    """The folder of the pipeline at `path`, downloaded if it must be; see `hub.resolve`."""
    return resolve(
        path,
        ("model_index.json",),
        download=lambda repo, revision: DiffusionPipeline.download(repo, revision=revision, use_safetensors=True),
    )


def _load(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    folder = find_pipeline(path)
    for part in parts_of(folder):
        check_folder(part)
    if os.environ.get("RANK", "0") == "0":
        print(f"loading {path}", file=sys.stderr, flush=True)
    try:
        with without_zero3_init():
            return AutoPipelineForText2Image.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError) as error:
        hint = "copy or save the folder again" if Path(path).is_dir() else f"fetch it with: {locked(path).command}"
        raise UserError(f"renderer {path} cannot be loaded ({one_line(error)}): {hint}") from error
