"""Rewrite + seed -> picture: `local` draws with a diffusers pipeline in this process, `remote` on other machines.

What a user may choose is here; the pipeline's packages are imported only when one is loaded. `levers` makes drawing
here faster or smaller. See `interfaces.Renderer`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from PIL import Image

from clients.http import is_url
from interfaces import OnImage
from run.options import option

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from rendering.local import LocalRenderer
    from rendering.remote import RemoteRenderer


AUTO = "auto"
TEXT_LENGTHS = (128, 256, 512)  # tokens; the most of FLUX.1-dev, SD3.5 and Qwen-Image is 512 or above
QUANTIZATIONS = ("fp8", "fp8_weights", "int8", "nf4")


@dataclass
class RenderOptions:
    """Which renderer, and how it draws; every field is a flag of a program that draws and a key of its YAML files."""

    sdmodel_name: str = option(
        "black-forest-labs/FLUX.1-dev",
        "Renderer: folder or hub name of any diffusers text-to-image pipeline, or servers with an OpenAI "
        "images API, http://host:port/v1, separated by commas.",
        changes="pictures",
    )
    render_steps: int | None = option(None, "Denoising steps; unset: the pipeline's own.", changes="pictures")
    guidance: float | None = option(None, "Guidance scale; unset: the pipeline's own.", changes="pictures")
    resolution: int | None = option(
        None, "Side of the square pictures in pixels; unset: the pipeline's own size.", changes="pictures"
    )
    max_sequence_length: int | str | None = option(
        None,
        "Renderer tokens read of a rewrite; all texts are padded to it, so fewer draw faster. auto: the "
        "least of 128, 256 and 512 that holds the rewrite of a full --max_completion_length.",
        changes="pictures",
    )
    render_dtype: str = option(
        "bfloat16",
        "Renderer's weights and arithmetic.",
        changes="pictures",
        choices=["bfloat16", "float16", "float32"],
    )
    render_batch_size: int | str | None = option(
        8,
        "Pictures per pipeline call; at 512 px a GPU is busy from about 8 on. auto: measured once at the "
        "start of a run, then fixed for all of it.",
        changes="nothing",
    )
    render_device: str | None = option(
        None, "Of the renderer; unset: the process's own.", changes="nothing", where="drawer"
    )
    render_compile: bool = option(
        False,
        "Compile the repeated blocks of the transformer; the first pictures wait.",
        changes="pictures",
        where="drawer",
    )
    render_attention: str | None = option(
        None,
        "Attention backend of diffusers (_native_cudnn, _flash_3, sage, ...); unset: native.",
        changes="pictures",
        where="drawer",
    )
    render_quantization: str | None = option(
        None,
        "Transformer's weights: fp8 (arithmetic too), fp8_weights or int8 (torchao), nf4 (bitsandbytes).",
        changes="pictures",
        choices=list(QUANTIZATIONS),
        where="drawer",
    )
    render_offload_text: bool = option(
        False,
        "Text encoders wait in main memory and come to the device once a generation, to encode.",
        changes="nothing",
        where="drawer",
    )
    render_slice_vae: bool = option(
        False,
        "Decode one picture at a time: less memory, where decoding needs the most.",
        changes="pictures",
        where="drawer",
    )
    render_lora: str | None = option(
        None,
        "LoRA fused into the renderer: folder or hub name, :file.safetensors to say which of it.",
        changes="pictures",
        where="drawer",
    )
    render_lora_scale: float = option(
        1.0, "Its strength; few-step ones name theirs.", changes="pictures", where="drawer"
    )

    render_model: str | None = option(
        None, "The renderer's name at its servers; unset: the only one that they serve.", changes="pictures"
    )
    render_tokenizer: str | None = option(
        None, "Folder or hub name of its longest tokenizer, for servers that do not give one.", changes="pictures"
    )
    render_timeout: float = option(
        120.0,
        "Seconds for one picture of a server, its turn included, and to wait while all are gone.",
        changes="nothing",
    )
    render_batch_timeout: float = option(
        900.0, "Seconds for all pictures of a batch from servers; then the rest is absent.", changes="nothing"
    )
    render_concurrency: int | None = option(
        None,
        "Pictures that a process asks of each server at once; unset: its share of what the "
        "server says it can use, or of 16.",
        changes="nothing",
    )

    @property
    def remote(self) -> bool:
        """Whether servers draw."""
        return is_url(self.sdmodel_name)

    def __post_init__(self) -> None:
        """A command line gives numbers as text.

        Raises:
            ValueError: neither a whole number nor auto.
        """
        self.render_batch_size = _number("render_batch_size", self.render_batch_size)
        if self.max_sequence_length is not None:
            self.max_sequence_length = _number("max_sequence_length", self.max_sequence_length)

    def fit_text(self, completion: int, reasoning: bool) -> None:
        """Settle a `max_sequence_length` of auto for rewrites that are written within `completion` tokens.

        The rule: a token of the policy counts as one of the renderer, and where the policy thinks first, its
        reasoning takes half. Rewrites that are longer all the same are counted (`rewrites/overflow`).
        """
        if self.max_sequence_length == AUTO:
            rewrite = completion // 2 if reasoning else completion
            self.max_sequence_length = next((most for most in TEXT_LENGTHS if most >= rewrite), TEXT_LENGTHS[-1])

    def load(
        self, device: str, *, measuring: bool = False, pipe: DiffusionPipeline | None = None
    ) -> LocalRenderer | RemoteRenderer:
        """The renderer: servers, or here on `render_device` or else on `device`.

        Args:
            measuring: whether the caller will call `levers.choose_batch_size` for a `render_batch_size` of auto; until
                then one picture is drawn at a time.
            pipe: a pipeline that is built already, in place of the one at `sdmodel_name`.

        Raises:
            UserError: nothing at `sdmodel_name`, or weights that did not load whole.
            ValueError: a setting that this pipeline does not take, or out of range.
        """
        if self.remote:
            return self._load_remote()
        batch = 1 if measuring and self.render_batch_size == AUTO else self.render_batch_size
        if AUTO in (batch, self.max_sequence_length):
            raise ValueError("auto is settled by r1_prompter.py alone: give numbers for --render_batch_size and "
                             "--max_sequence_length, those of a run are in its run.json")  # fmt: skip
        from rendering.levers import Levers  # diffusers: seconds that a bad option need not cost
        from rendering.local import LocalRenderer

        return LocalRenderer(
            pipe or self.sdmodel_name,
            device=self.render_device or device,
            dtype=self.render_dtype,
            steps=self.render_steps,
            guidance=self.guidance,
            height=self.resolution,
            width=self.resolution,
            max_sequence_length=self.max_sequence_length,
            chunk_size=batch,
            levers=Levers(
                compile=self.render_compile,
                attention=self.render_attention,
                quantization=self.render_quantization,
                offload_text=self.render_offload_text,
                slice_vae=self.render_slice_vae,
                lora=self.render_lora,
                lora_scale=self.render_lora_scale,
            ),
        )

    def _load_remote(self) -> RemoteRenderer:
        from rendering.remote import RemoteRenderer, Settings

        if self.render_batch_size == AUTO:
            raise ValueError(f"--render_batch_size {AUTO} tries a renderer of this process: leave it out with servers")
        given = asdict(self)
        for one in fields(self):
            if one.metadata["where"] == "drawer" and given[one.name] != one.default:
                raise ValueError(
                    f"--{one.name} {given[one.name]} is an option of the server that draws: leave it out here"
                )
        settings = Settings(
            steps=self.render_steps,
            guidance=self.guidance,
            size=None if self.resolution is None else (self.resolution, self.resolution),
            max_sequence_length=self.max_sequence_length,
            dtype=None if self.render_dtype == RenderOptions.render_dtype else self.render_dtype,
        )
        return RemoteRenderer(
            self.sdmodel_name,
            model=self.render_model,
            tokenizer=self.render_tokenizer,
            settings=settings,
            timeout=self.render_timeout,
            batch_timeout=self.render_batch_timeout,
            concurrency=self.render_concurrency,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
        ).load()


def notify_rows(
    rows: Sequence[tuple[str, int]], on_image: OnImage | None
) -> Callable[[tuple[str, int], Image.Image], None]:
    """A function of (text, seed) and image that calls `on_image` once for each row with this (text, seed)."""
    places: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows if on_image else ()):
        places.setdefault(row, []).append(i)

    def tell(row: tuple[str, int], picture: Image.Image) -> None:
        for i in places.get(row, ()):
            on_image(i, picture)

    return tell


def _number(name: str, value: int | str | None) -> int | str:
    if value == AUTO or isinstance(value, int):
        return value
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--{name} {value}: give a whole number, or {AUTO}") from error
