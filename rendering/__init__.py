"""Rewrite + seed -> picture: `local` draws with a diffusers pipeline in this process, `remote` on other machines.

What a user may choose is here; the pipeline's packages are imported only when one is loaded. See
`interfaces.Renderer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training.api import is_url

if TYPE_CHECKING:
    from rendering.local import LocalRenderer
    from rendering.remote import RemoteRenderer


class CheckpointError(RuntimeError):
    """A checkpoint is not there, cannot be fetched or did not load whole. The message says what to do."""


@dataclass
class RenderOptions:
    """Which renderer, and how it draws; every field is a flag of a program that draws and a key of its YAML files."""

    sdmodel_name: str = field(
        default="black-forest-labs/FLUX.1-dev",
        metadata={
            "help": "Renderer: folder or hub name of any diffusers text-to-image pipeline, or servers with an OpenAI "
            "images API, http://host:port/v1, separated by commas."
        },
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

    render_model: str | None = field(
        default=None, metadata={"help": "The renderer's name at its servers; unset: the only one that they serve."}
    )
    render_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of its longest tokenizer, for servers that do not give one."},
    )
    render_timeout: float = field(
        default=120.0, metadata={"help": "Seconds for one picture of a server, and to wait while all are gone."}
    )
    render_batch_timeout: float = field(
        default=900.0, metadata={"help": "Seconds for all pictures of a batch from servers; then the rest is absent."}
    )
    render_concurrency: int | None = field(
        default=None,
        metadata={"help": "Pictures asked of each server at once; unset: what it says it can use, or 16."},
    )

    @property
    def remote(self) -> bool:
        """Whether servers draw."""
        return is_url(self.sdmodel_name)

    def load(self, device: str) -> LocalRenderer | RemoteRenderer:
        """The renderer: servers, or here on `render_device` or else on `device`.

        Raises:
            CheckpointError: nothing at `sdmodel_name`, or weights that did not load whole.
            ValueError: a setting that this pipeline does not take, or out of range.
        """
        if self.remote:
            return self._load_remote()
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

    def _load_remote(self) -> RemoteRenderer:
        from rendering.remote import RemoteRenderer, Settings

        if self.render_device is not None:
            raise ValueError(f"render_device {self.render_device} is of no use with servers that draw: leave it out")
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
        ).load()
