"""Ways to draw faster or in less memory, each a flag, and the search for the batch size.

    flag                    off by default because                     a picture against the one without it
    --render_compile        the first chunk waits for the compiler     fused kernels round otherwise, in bfloat16 a lot
    --render_attention      the fastest differs by GPU and package     another order of sums; sage: int8 products
    --render_quantization   it changes the renderer                    another renderer: judge it by its pictures
    --render_offload_text   moving takes seconds a generation          the same (tests/test_levers.py)
    --render_slice_vae      decoding in one batch is faster            convolutions of one picture may round otherwise
    --render_lora           it changes the renderer                    another renderer

A lever that changes no pixel by more than MAX_PIXEL_DIFFERENCE is the same renderer. `bench.py --target levers`
measures each one's gain and difference; RESULTS.md has the table. With every lever a row's picture still depends on
its text and seed alone: fp8 arithmetic has a scale for each row of each product, not one for the batch.

Left out: caches that skip steps (the skipped steps depend on the text, which adds noise to the reward), CUDA graphs,
tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend
from huggingface_hub import snapshot_download

from errors import UserError, one_line
from models.weights import check_folder, locked
from rendering.options import RenderOptions

MAX_PIXEL_DIFFERENCE = 1  # level of 255, the largest difference of any channel of any pixel
MAX_TRIAL_IMAGES = 64  # the largest batch that is tried
MIN_GAIN = 0.05  # share of the time for a picture; a smaller batch that is slower by no more is preferred
TRIAL_MEMORY_SHARE = 0.5  # a trial may use this share of the free memory, because the policy is loaded afterwards


def apply(options: RenderOptions, pipe: DiffusionPipeline, device: torch.device) -> None:
    """Put `pipe` on `device` with the levers of `options`; text encoders that are offloaded stay in main memory.

    A LoRA is fused before weights are quantised, and both before anything is moved, so that a quantised transformer
    is never on the device in full precision.

    Raises:
        UserError: no such LoRA, or a lever that this pipeline, device or installation does not have.
    """
    if options.render_lora is not None:
        _fuse(pipe, options.render_lora, options.render_lora_scale)
    if options.render_quantization is not None:
        _quantize(denoiser_of(pipe), options.render_quantization, device)
    encoders = text_encoders(pipe) if options.render_offload_text else []
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to("cpu" if component in encoders else device)
    if options.render_attention is not None:
        _set_attention(denoiser_of(pipe), options.render_attention)
    if options.render_slice_vae:
        _slice(pipe)
    if options.render_compile:
        _compile(denoiser_of(pipe))


def denoiser_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The network that runs at every step."""
    return pipe.components["transformer" if "transformer" in pipe.components else "unet"]


def text_encoders(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    parts = pipe.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)]


@contextmanager
def on_device(encoders: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """`encoders` on `device` within, in main memory afterwards.

    T5-XXL and CLIP, 9.8 GB in bfloat16, take about 1 s each way over PCIe Gen4 (derived).
    """
    try:
        _move(encoders, device)
        yield
    finally:
        _move(encoders, torch.device("cpu"))
        if encoders and device.type == "cuda":
            torch.cuda.empty_cache()


def _move(modules: Sequence[torch.nn.Module], device: torch.device) -> None:
    with torch.inference_mode(False):  # parameters that are moved must stay ordinary tensors
        for module in modules:
            module.to(device)


# Each lever -------------------------------------------------------------------------------------------------------


def _compile(denoiser: torch.nn.Module) -> None:
    """Regional compilation: one block of each kind is compiled, all of its kind share it; shapes are fixed here."""
    if not type(denoiser)._repeated_blocks:
        raise UserError(f"--render_compile true: {type(denoiser).__name__} names no repeated blocks: leave it out")
    denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False)


def _set_attention(denoiser: torch.nn.Module, name: str) -> None:
    """Of this transformer alone: diffusers would also make it the default of every other model in the process."""
    parts = [part for part in denoiser.modules() if isinstance(part, AttentionModuleMixin)]
    if not any("_attention_backend" in dir(part.processor) for part in parts):
        raise UserError(
            f"--render_attention {name}: the attention of {type(denoiser).__name__} cannot be exchanged: leave it out"
        )
    with attention_backend("native"):  # puts the process's own back
        denoiser.set_attention_backend(name)


def _slice(pipe: DiffusionPipeline) -> None:
    vae = pipe.components.get("vae")
    if vae is None or "use_slicing" not in dir(vae):
        raise UserError(f"--render_slice_vae true: the VAE of {type(pipe).__name__} cannot: leave it out")
    vae.enable_slicing()


def _quantize(denoiser: torch.nn.Module, name: str, device: torch.device) -> None:
    """Weights of all linear layers but those that are too narrow for the kernels (a multiple of 16)."""
    flag = f"--render_quantization {name}"
    if name == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError(f"{flag} needs a GPU of compute capability 8.9 or above (H100, L40S), not {device}: "
                         "fp8_weights and int8 store weights so and compute as before")  # fmt: skip
    if name == "nf4":
        _to_nf4(denoiser, device)
        return
    from torchao import quantization

    made = {
        "fp8": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow()),
        "fp8_weights": quantization.Float8WeightOnlyConfig,
        "int8": quantization.Int8WeightOnlyConfig,
    }
    quantization.quantize_(denoiser, made[name](), filter_fn=lambda part, _: _wide(part), device=device)


def _wide(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear) and part.in_features % 16 == 0 and part.out_features % 16 == 0


def _to_nf4(module: torch.nn.Module, device: torch.device) -> None:
    """Every wide linear layer as bitsandbytes' 4-bit one, moved to `device`, which is when its weights are packed."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, part in list(module.named_children()):
        if not _wide(part):
            _to_nf4(part, device)
            continue
        kind = part.weight.dtype
        packed = Linear4bit(
            part.in_features, part.out_features, part.bias is not None, compute_dtype=kind, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        packed.weight = Params4bit(part.weight.data, requires_grad=False, quant_type="nf4")
        packed.bias = part.bias
        setattr(module, name, packed.to(device))


def _fuse(pipe: DiffusionPipeline, source: str, scale: float) -> None:
    """Add a LoRA's product to the weights for good, so that drawing costs nothing more.

    `source` is a folder or a hub name, ":file.safetensors" after it where there are several files.
    """
    if "load_lora_weights" not in dir(pipe):
        raise UserError(f"--render_lora {source}: {type(pipe).__name__} takes no LoRA: leave it out")
    path = find_lora(source)
    folder, file = (path.parent, path.name) if path.is_file() else (path, None)
    check_folder(folder)
    try:
        pipe.load_lora_weights(str(folder), weight_name=file, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--render_lora {source} is no LoRA of this pipeline ({one_line(error)}): give one") from error
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()


def find_lora(source: str) -> Path:
    """The folder or file of a LoRA, downloaded if it must be; UserError if there is none."""
    place, _, file = source.partition(":")
    folder = Path(place)
    try:
        if not folder.exists():
            files = {"revision": locked(place).revision, "allow_patterns": file or "*.safetensors"}
            folder = Path(snapshot_download(place, **files))
        (folder / file).stat()  # raises if there is none
        return folder / file
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"--render_lora {source} cannot be loaded ({one_line(error)}): give a folder with its .safetensors file, "
            f"or fetch it with: {locked(place).command} {file}".rstrip()
        ) from error


# The batch size ---------------------------------------------------------------------------------------------------


def smallest_good_batch(trial: Callable[[int], float | None], most: int = MAX_TRIAL_IMAGES) -> int:
    """The smallest batch that draws a picture within MIN_GAIN of the best time found; 1 if none fits.

    Sizes are doubled from 1 until one does not fit or gains no more than MIN_GAIN.

    Args:
        trial: batch size -> seconds a picture, None if it does not fit.
    """
    seconds: dict[int, float] = {}
    size = 1
    while size <= most and (found := trial(size)) is not None:
        gains = not seconds or found < (1 - MIN_GAIN) * min(seconds.values())
        seconds[size] = found
        if not gains:
            break
        size *= 2
    good = [size for size, found in seconds.items() if found <= (1 + MIN_GAIN) * min(seconds.values())]
    return min(good, default=1)
