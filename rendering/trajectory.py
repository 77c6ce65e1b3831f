"""Draws as `local` does, and remembers the way: for the trainer of the image model itself (`pref_grpo.py`).

The pipeline draws as it always does. Only its scheduler is exchanged for a `Recorder` with the same noise levels,
whose steps are those of `models.flow` and which keeps latents in float32; and a hook notes what the transformer was
called with. So conditioning, guidance, shift and decoding are the pipeline's own, and the transformer can be called
again in exactly the same way.

For pipelines with `FlowMatchEulerDiscreteScheduler` whose transformer takes one tensor of latents: FLUX.1, FLUX.2,
SD3, Qwen-Image and their kin.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from errors import Stopped, UserError
from models.flow import FORWARD, Taken, log_prob, transition
from models.hub import on_disk
from rendering.levers import denoiser_of
from rendering.local import LocalRenderer
from rendering.options import RenderOptions
from rendering.rows import draw_distinct
from rendering.settings import guidance_name, outline
from run.files import atomic_write

FEW_STEPS = ("schnell", "turbo", "lightning", "hyper-", "-lcm")  # in names of checkpoints


@dataclass(frozen=True)
class Sampling:
    """How a path is sampled: by `sde` of `models.flow` with strength `eta` in the steps of `window`, else by the ODE.

    `guided`: with the second pass of classifier-free guidance, where the pipeline has one.
    """

    sde: str
    eta: float
    window: tuple[int, ...]
    guided: bool


@dataclass(frozen=True)
class Step:
    """A stochastic step of a path: its number, x_σ and x_σ' (B, ...) in float32, σ and σ', what was sampled, and (B,)
    σ as the transformer takes it.
    """

    index: int
    x: Tensor
    x_next: Tensor
    sigma: float
    sigma_next: float
    taken: Taken
    timestep: Tensor


@dataclass
class Trajectory:
    """One batch of pictures, and how each was drawn.

    Attributes:
        images: None where one could not be drawn.
        steps: the stochastic ones.
        latents: (B, ...) of the finished pictures, float32.
        sigmas: noise levels of the schedule, the last 0.
    """

    sampling: Sampling
    generators: Sequence[torch.Generator]
    guidance: float = 1.0
    keeps_norm: bool = False  # Qwen-Image gives the guided velocity the norm of the conditional one
    images: list[Image.Image | None] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    latents: Tensor | None = None
    sigmas: list[float] = field(default_factory=list)
    calls: list[list[dict[str, Any]]] = field(default_factory=list)  # of the transformer, by step

    def advance(self, v: Tensor, x: Tensor, sigmas: list[float]) -> Tensor:
        """The pipeline's next latents from its velocity; `x` counts only at the first step, because it is rounded."""
        index = len(self.calls) - 1
        self.sigmas, x = sigmas, x.float() if self.latents is None else self.latents
        sigma, sigma_next = sigmas[index : index + 2]
        kind = self.sampling.sde if index in self.sampling.window else "ode"
        step = transition(kind, x, v, sigma, sigma_next, self.sampling.eta, sigmas[1])
        self.latents = step.mean
        if kind != "ode":
            noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in self.generators])
            self.latents = step.mean + step.std * noise.to(x.device)
            taken = Taken(log_prob(kind, self.latents, step), step, sigma_next - sigma)
            timestep = self.calls[index][0]["timestep"][: len(x)]
            self.steps.append(Step(index, x, self.latents, sigma, sigma_next, taken, timestep))
        self.calls.append([])
        return self.latents

    def retake(self, step: Step, v: Tensor) -> Taken:
        """The same step under another velocity."""
        kind, eta = self.sampling.sde, self.sampling.eta
        again = transition(kind, step.x, v, step.sigma, step.sigma_next, eta, self.sigmas[1])
        return Taken(log_prob(kind, step.x_next, again), again, step.taken.dt)

    def timestep(self, sigma: Tensor) -> Tensor:
        """(B,) σ in the transformer's own unit."""
        first = self.calls[0][0]["timestep"]
        return (sigma.to(first.device) * (first[0].float() / self.sigmas[0])).to(first.dtype)

    def velocity(self, model: torch.nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        """(B, ...) what the pipeline would be given by `model` at `x`, guidance included."""
        outputs = []
        for call in self.calls[0]:
            copies = len(call["timestep"]) // len(x)
            given = {name: value for name, value in call.items() if name not in ("dtype", "timestep")}
            hidden = torch.cat([x.to(call["dtype"])] * copies)
            output = model(hidden_states=hidden, timestep=timestep.repeat(copies), **given)[0]
            outputs += output.chunk(copies)
            if copies == 2:  # one call for both: the unconditional rows come first
                outputs.reverse()
        if len(outputs) == 1:
            return outputs[0]
        conditional, other = outputs
        guided = other + self.guidance * (conditional - other)
        if self.keeps_norm:
            guided = guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return guided


class Recorder(FlowMatchEulerDiscreteScheduler):
    """The pipeline's own noise levels; while it has a `path`, that path's steps."""

    path: Trajectory | None = None

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> tuple:
        """See `FlowMatchEulerDiscreteScheduler.step`."""
        if self.path is None:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        return (self.path.advance(model_output.float(), sample, self.sigmas.tolist()).to(sample.dtype),)


class FlowRenderer(LocalRenderer):
    """A pipeline whose transformer is being trained; what its text encoders said is kept on disk.

    Args:
        options: `render_batch_size` rows are drawn, and later trained on, at once.
        device: of all but the text encoders.
        texts: a folder for encoded texts, of one pipeline; several processes may share it.

    Raises:
        UserError: see `LocalRenderer`; or a pipeline that is not trained here.
    """

    def __init__(
        self, options: RenderOptions, device: str | torch.device, texts: Path, pipe: DiffusionPipeline | None = None
    ):
        super().__init__(replace(options, render_offload_text=True), device, pipe)
        self.pipe.scheduler = Recorder.from_config(self.pipe.scheduler.config)
        self._encoded = _Encoded(texts, self.device)
        self.denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The transformer."""
        return denoiser_of(self.pipe)

    def encode(self, texts: Sequence[str], guided: bool) -> None:
        """Encode these, so that no text encoder is needed for them again."""
        if texts:
            self._texts = list(texts)  # one step of one picture: the pipeline knows what to encode, and how
            self._draw_so([(texts[0], 0)], guided, num_inference_steps=1)

    @torch.no_grad()
    def sample(
        self, texts: Sequence[str], seeds: Sequence[int], noise_seeds: Sequence[int], sampling: Sampling
    ) -> Trajectory:
        """Draw `texts[i]` from noise `seeds[i]`, its SDE's own noise from `noise_seeds[i]`; `chunk_size` of them.

        Raises:
            Stopped: out of memory.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in noise_seeds]
        norm = type(self.pipe).__name__.startswith("QwenImage")
        guidance = self.settings["guidance_scale"] if sampling.guided else 1.0
        path = self.pipe.scheduler.path = Trajectory(sampling, generators, guidance, norm, calls=[[]])
        try:
            pictures = self._draw_so(list(zip(texts, seeds, strict=True)), sampling.guided)
        finally:
            self.pipe.scheduler.path = None
        if pictures is None:
            raise Stopped(f"out of memory drawing {len(texts)} pictures at once: give a lower --render_batch_size")
        path.images = [None if isinstance(picture, str) else picture for picture in pictures]
        path.calls = path.calls[:1]
        return path

    @torch.no_grad()  # not inference mode, which FSDP does not know
    def draw(self, texts: Sequence[str], seeds: Sequence[int], side: int | None = None) -> list[Image.Image | None]:
        """As `__call__`, but of `side` pixels if given."""
        kept = self._settings
        try:
            self._settings = kept if side is None else {**kept, "height": side, "width": side}
            return draw_distinct(texts, seeds, None, self.failures, self._draw_all)
        finally:
            self._settings = kept

    def save(self, folder: Path, state: Mapping[str, Tensor], lora: bool) -> None:
        """Write the transformer's weights as others load them: a LoRA of diffusers, or the whole pipeline."""
        if lora:
            config = self.denoiser.peft_config["default"]
            scale = config.lora_alpha / config.r  # goes into the weights, because loaders find no alpha and take 1
            layers = {
                name.replace(".default.", "."): value * (scale if ".lora_B." in name else 1)
                for name, value in state.items()
                if ".lora_" in name
            }
            self.pipe.save_lora_weights(str(folder), transformer_lora_layers=layers)
            return
        whole = type(self.denoiser).from_config(self.denoiser.config)
        whole.load_state_dict(state)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        parts = {
            **self.pipe.components,
            "transformer": torch.nn.Module.to(whole, self.pipe.dtype),  # without ModelMixin's warning
            "scheduler": scheduler,
        }
        type(self.pipe)(**parts).save_pretrained(folder)

    def _draw_so(self, rows: list[tuple[str, int]], guided: bool, **changes: int) -> list | None:
        """`_draw_chunk`, without true guidance unless `guided`; its encoders then return other values, too."""
        if not guided and has_true_guidance(self.pipe):
            changes[guidance_name(inspect.signature(type(self.pipe).__call__).parameters)] = 1.0
        self._lone = None
        try:
            return self._draw_chunk(rows, **changes)
        finally:
            self._lone = None
            self._forget()

    def _note(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (path := self.pipe.scheduler.path) is not None:
            dtype = kwargs["hidden_states"].dtype
            path.calls[-1].append({**{n: v for n, v in kwargs.items() if n != "hidden_states"}, "dtype": dtype})


class _Encoded:
    """What text encoders said of each text, on disk; in place of the dict of a `LocalRenderer`."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self._file(key).exists()

    def __getitem__(self, key: str) -> tuple[Tensor | None, ...]:
        values = load(self._file(key).read_bytes())
        return tuple(
            values[str(i)].to(self.device) if str(i) in values else None for i in range(int(values.pop("count")))
        )

    def update(self, rows: Iterable[tuple[str, Sequence[Tensor | None]]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key, values in rows:
            tensors = {str(i): value.contiguous() for i, value in enumerate(values) if value is not None}
            atomic_write(self._file(key), save({**tensors, "count": torch.tensor(len(values))}))

    def clear(self) -> None:
        """Nothing: what is on disk stays."""


def has_true_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether guidance takes a second pass; else it is distilled into the transformer, which is told its scale."""
    return not denoiser_of(pipe).config.get("guidance_embeds", False)


def check_method(name: str, loss: str, train_guidance: str) -> None:
    """Refuse what cannot be learnt with the pipeline `name`, if it is on this disk; UserError."""
    folder = on_disk(name)
    if folder is None or not (folder / "model_index.json").is_file():
        return
    pipe, scheduler = outline(folder), DiffusionPipeline.load_config(folder, local_files_only=True)["scheduler"][1]
    takes = inspect.signature(type(denoiser_of(pipe)).forward).parameters
    if scheduler != FlowMatchEulerDiscreteScheduler.__name__ or not {"hidden_states", "timestep"} <= {*takes}:
        raise UserError(
            f"--sdmodel_name {name}: {type(pipe).__name__} with {scheduler} is no flow-matching pipeline that is "
            "trained here; give one of FLUX.1, FLUX.2, SD3 or Qwen-Image"
        )
    if train_guidance == "cfg" and not has_true_guidance(pipe):
        raise UserError(f"--train_guidance cfg: the guidance of {name} is distilled, without a second pass; give none")
    if loss in FORWARD and _is_step_distilled(pipe, name):
        raise UserError(
            f"--loss {loss}: {name} was distilled to a few steps, which does not fit noising pictures again; give the "
            "undistilled pipeline, or --loss grpo"
        )


def _is_step_distilled(pipe: DiffusionPipeline, name: str) -> bool:
    """As far as configuration and name say: FLUX.1-schnell is without guidance, FLUX.2-klein says it itself."""
    known = type(pipe).__name__ == "FluxPipeline" and has_true_guidance(pipe) or pipe.config.get("is_distilled", False)
    return known or any(word in name.lower() for word in FEW_STEPS)
