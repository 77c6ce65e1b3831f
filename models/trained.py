"""What a trainer that owns its loop does with weights: chooses which are trained, copies them, saves them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import UserError
from run.loop_options import LoopArguments


class Shadow:
    """A copy of the weights that a module trains, as they are now: an average, an old policy, the reference.

    It is in float32, and sharded as the weights are (DDP, ZeRO-2, FSDP2). It takes their place for the length of a
    `with` block, so that one network serves as many policies. It has a state for checkpoints.
    """

    def __init__(self, module: torch.nn.Module):
        self.live = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.copies = {name: weight.detach().float().clone() for name, weight in self.live.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """copy = `decay` · copy + (1 - `decay`) · weight."""
        for name, weight in self.live.items():
            self.copies[name].lerp_(weight.detach().float(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The copy in place of the weights. No graph that needs the weights may be waiting for its gradient."""
        kept = {name: weight.detach().clone() for name, weight in self.live.items()}
        try:
            self._write(self.copies)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.live.items():
            weight.data.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The whole copy, on every process."""
        return {name: _whole(copy) for name, copy in self.copies.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the values of a `state_dict`."""
        for name, copy in self.copies.items():
            value = state[name].to(copy.device)
            if isinstance(copy, DTensor):
                value = distribute_tensor(value, copy.device_mesh, copy.placements)
            copy.copy_(value)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_trainable(net: ModelMixin, options: LoopArguments) -> list[torch.nn.Parameter]:
    """The parameters to train: of a new LoRA, or all of the transformer, in float32.

    Raises:
        UserError: no layer has such a name.
    """
    if options.use_peft:
        lora = LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=options.lora_target_modules)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(options.seed)
                net.add_adapter(lora)
        except ValueError as error:
            raise UserError(f"--lora_target_modules {' '.join(options.lora_target_modules)}: {error}") from error
    else:
        net.float().requires_grad_(True)
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()
    if options.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    return trained


def save_trained_alone(accelerator: Accelerator, net: torch.nn.Module) -> None:
    """Leave frozen weights out of checkpoints of one process and of DDP; others write their own way."""
    names = {name for name, weight in net.named_parameters() if weight.requires_grad}

    def on_save(models: list, states: list[dict], folder: str) -> None:
        states[:] = [{n: v for n, v in state.items() if n.removeprefix("module.") in names} for state in states]

    def on_load(models: list, folder: str) -> None:
        for model in models:
            model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
        models.clear()

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)
