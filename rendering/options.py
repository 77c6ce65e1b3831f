"""How pictures are drawn: each option is one field of `RenderOptions`, and is read where it takes effect.

An option with `where="drawer"` belongs to the machine that draws. One that also changes pictures is compared between a
run and its render servers, without further code.
"""

from __future__ import annotations

from dataclasses import dataclass

from clients.http import is_url
from models.devices import pick_dtype
from run.options import device, need, option

AUTO = "auto"
TEXT_LENGTHS = (128, 256, 512)  # tokens; the most of FLUX.1-dev, SD3.5 and Qwen-Image is 512 or above
QUANTIZATIONS = {"fp8": "torchao", "fp8_weights": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}


@dataclass
class RenderOptions:
    """Which renderer, and how it draws; every field is a flag of a program that draws and a key of its YAML files."""

    sdmodel_name: str = option(
        "black-forest-labs/FLUX.1-dev",
        "Renderer: folder or hub name of any diffusers text-to-image pipeline, or servers with an OpenAI "
        "images API, http://host:port/v1, separated by commas.",
        changes="pictures",
    )
    render_steps: int | None = option(None, "Denoising steps; unset: the pipeline's own.", changes="pictures", least=1)
    guidance: float | None = option(None, "Guidance scale; unset: the pipeline's own.", changes="pictures", least=0)
    resolution: int | None = option(
        None, "Side of the square pictures in pixels; unset: the pipeline's own size.", changes="pictures", least=1
    )
    max_sequence_length: int | str | None = option(
        None,
        "Renderer tokens read of a rewrite; all texts are padded to it, so fewer draw faster. auto: the "
        "least of 128, 256 and 512 that holds the rewrite of a full answer (r1_prompter.py).",
        changes="pictures",
        words=[AUTO],
        least=1,
    )
    render_plan: bool = option(False, "A Janus writes a plan for each text, and draws from both.", changes="pictures")
    render_dtype: str = option(
        AUTO,
        "Renderer's weights and arithmetic. auto: bfloat16 where GPU or CPU have it; else float16 on a GPU, float32 "
        "on a CPU; of servers: their own.",
        changes="pictures",
        choices=[AUTO, "bfloat16", "float16", "float32"],
    )
    render_batch_size: int | str | None = option(
        8,
        "Pictures per pipeline call; at 512 px a GPU is busy from about 8 on. auto: measured once at the "
        "start of a run, then fixed for all of it.",
        changes="nothing",
        words=[AUTO],
        least=1,
    )
    render_device: str | None = option(
        None, "Of the renderer; unset: the process's own.", changes="nothing", where="drawer", reads=device
    )
    render_compile: bool = option(
        False,
        "Compile the transformer's repeated blocks; the first pictures wait.",
        changes="pictures",
        where="drawer",
    )
    render_attention: str | None = option(
        None,
        "Attention backend of diffusers (_flash_3, sage, ...); unset: native.",
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
        False, "Keep text encoders in main memory while they do not encode.", changes="nothing", where="drawer"
    )
    render_slice_vae: bool = option(
        False, "Decode one picture at a time, in less memory.", changes="pictures", where="drawer"
    )
    render_lora: str | None = option(
        None, "LoRA to fuse: folder or hub name, :file.safetensors after it.", changes="pictures", where="drawer"
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
        120.0, "Seconds for one picture of a server, its turn included.", changes="nothing", above=0
    )
    render_batch_timeout: float = option(
        900.0, "Seconds for all pictures of a batch from servers; then the rest is absent.", changes="nothing", above=0
    )
    render_concurrency: int | None = option(
        None,
        "Pictures that a process asks of each server at once; unset: its share of what the "
        "server says it can use, or of 16.",
        changes="nothing",
        least=1,
    )

    @property
    def remote(self) -> bool:
        """Whether servers draw."""
        return self.sdmodel_name is not None and is_url(self.sdmodel_name)

    def __post_init__(self) -> None:
        """Ask packages and, if it is on this disk, the pipeline whether it can be drawn so; no weights are read.

        Raises:
            UserError: a package is missing, or the pipeline does not draw this size (with the nearest) or so.
        """
        if self.remote:
            return
        if self.render_quantization is not None:
            need(QUANTIZATIONS[self.render_quantization], f"--render_quantization {self.render_quantization}")
        if {self.render_attention, self.resolution, self.max_sequence_length} == {None}:
            return
        from rendering.settings import check  # diffusers: seconds that a program without pictures need not wait

        check(self)

    def settle(self, default_device: str) -> None:
        """Choose what `render_dtype` leaves open by the device that draws; servers choose for themselves."""
        if not self.remote:
            self.render_dtype = pick_dtype(self.render_dtype, self.render_device or default_device, frozen=True)

    def fit_text(self, completion: int, reasoning: bool) -> None:
        """Replace a `max_sequence_length` of auto by the smallest that holds a rewrite of `completion` tokens.

        One token of the policy counts as one of the renderer. If the policy reasons first, its reasoning takes half
        of the tokens. Longer rewrites are cut and counted (`rewrites/overflow`).
        """
        if self.max_sequence_length == AUTO:
            rewrite = completion // 2 if reasoning else completion
            self.max_sequence_length = next((most for most in TEXT_LENGTHS if most >= rewrite), TEXT_LENGTHS[-1])
