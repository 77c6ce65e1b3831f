"""Rewrite + seed -> picture: `local` draws with a diffusers pipeline in this process. See `interfaces.Renderer`.

What a user may choose is here; the pipeline's packages are imported only when one is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rendering.local import LocalRenderer


class CheckpointError(RuntimeError):
    """A checkpoint is not there, cannot be fetched or did not load whole. The message says what to do."""


@dataclass
class RenderOptions:
    """Which renderer, and how it draws; every field is a flag of a program that draws and a key of its YAML files."""

    sdmodel_name: str = field(
        default="black-forest-labs/FLUX.1-dev",
        metadata={"help": "Renderer: folder or hub name of any diffusers text-to-image pipeline."},
    )
    render_steps: int | None = field(default=None, metadata={"help": "Denoising steps; unset: the pipeline's own."})
    guidance: float | None = field(default=None, metadata={"help": "Guidance scale; unset: the pipeline's own."})
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the square pictures in pixels; unset: the pipeline's own size."}
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "Renderer tokens read of a rewrite; all texts are padded to it, so fewer draw faster."},
    )
    render_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Renderer's weights and arithmetic.", "choices": ["bfloat16", "float16", "float32"]},
    )
    render_batch_size: int = field(
        default=8, metadata={"help": "Pictures per pipeline call; at 512 px a GPU is busy from about 8 on."}
    )
    render_device: str | None = field(default=None, metadata={"help": "Of the renderer; unset: the process's own."})

    def load(self, device: str) -> LocalRenderer:
        """The renderer, on `render_device` or else on `device`.

        Raises:
            CheckpointError: nothing at `sdmodel_name`, or weights that did not load whole.
            ValueError: a setting that this pipeline does not take, or out of range.
        """
        from rendering.local import LocalRenderer  # diffusers: seconds that a bad option need not cost

        return LocalRenderer(
            self.sdmodel_name,
            device=self.render_device or device,
            dtype=self.render_dtype,
            steps=self.render_steps,
            guidance=self.guidance,
            height=self.resolution,
            width=self.resolution,
            max_sequence_length=self.max_sequence_length,
            chunk_size=self.render_batch_size,
        )
