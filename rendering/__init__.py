"""Text + seed -> picture: `local` draws with a diffusers pipeline in this process, `janus` with a Janus, `remote` on
other machines.

`options` says what a user may choose. A pipeline's packages are imported only when a renderer is loaded. See
`interfaces.Renderer`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from errors import UserError
from models.devices import pick_device
from models.hub import contents_of, is_janus
from rendering.options import AUTO, RenderOptions
from run.files import Contents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from rendering.janus import JanusRenderer
    from rendering.local import LocalRenderer
    from rendering.remote import RemoteRenderer

__all__ = ["AUTO", "RenderOptions", "load_renderer", "renderer_contents"]


def renderer_contents(options: RenderOptions) -> Contents:
    """What renderer and LoRA hold, downloaded if they must be; of servers, what they say of themselves."""
    if options.remote:
        from rendering.remote import RemoteRenderer

        return {"sdmodel_name": (options.sdmodel_name, RemoteRenderer(options).card_hash)}
    if is_janus(options.sdmodel_name):
        from models.janus import find_janus

        return contents_of({"sdmodel_name": find_janus(options.sdmodel_name)})
    from rendering.levers import find_lora
    from rendering.local import find_pipeline

    lora = {"render_lora": find_lora(options.render_lora)} if options.render_lora is not None else {}
    return contents_of({"sdmodel_name": find_pipeline(options.sdmodel_name), **lora})


def load_renderer(
    options: RenderOptions, device: str, *, measuring: bool = False, pipe: DiffusionPipeline | None = None
) -> LocalRenderer | JanusRenderer | RemoteRenderer:
    """Servers, or a pipeline in this process.

    Args:
        options: what to draw with.
        device: of a pipeline, where `render_device` is unset.
        measuring: whether the caller will call `LocalRenderer.choose_batch_size` for a `render_batch_size` of auto;
            until then it draws one picture at a time.
        pipe: a pipeline to use in place of the one at `sdmodel_name`.

    Raises:
        UserError: nothing at `sdmodel_name`, incomplete weights, or an option that this renderer does not take.
    """
    if measuring and options.render_batch_size == AUTO and not options.remote:
        options = replace(options, render_batch_size=1)
    if AUTO in (options.render_batch_size, options.max_sequence_length):
        raise UserError(
            "--render_batch_size and --max_sequence_length can be auto only in r1_prompter.py, the first only without "
            "servers: give numbers; those of a run are in its run.json"
        )
    if options.remote:
        from rendering.remote import RemoteRenderer

        return RemoteRenderer(options, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if is_janus(options.sdmodel_name):
        from rendering.janus import load_janus_renderer

        return load_janus_renderer(options, pick_device(options.render_device or device))
    from rendering.local import LocalRenderer  # diffusers: seconds that a bad option need not cost

    return LocalRenderer(options, pick_device(options.render_device or device), pipe)
