"""What a trainer that owns its loop does with weights: chooses which are trained, copies them, saves them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather
from diffusers import ModelMixin
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from trl.models.utils import add_hooks, remove_hooks

from errors import UserError
from run.loop_options import LoopArguments


def merged(state: Mapping[str, Tensor], options: LoopArguments) -> dict[str, Tensor]:
    """The weights of a model, from those of the model with an unmerged LoRA; without one, as they are.

    Names lose the first part, which is that of the wrapper.
    """
    scale, found = options.lora_alpha / options.lora_r, {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            a, b = (state[name.replace("base_layer", f"lora_{which}.default")].float() for which in "AB")
            weight = (weight.float() + scale * b @ a).to(weight.dtype)
        found[name.partition(".")[2].replace(".base_layer.", ".")] = weight
    return found


@contextmanager
def whole(net: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """All weights are on every process, for passes that processes do not make in step (ZeRO-3, FSDP2)."""
    parts = [part for part in net.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with _gathered(net) if is_zero3(accelerator) else nullcontext():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@contextmanager
def _gathered(net: torch.nn.Module) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        remove_hooks(net)  # which would shard each layer again behind its pass
        try:
            yield
        finally:
            add_hooks(net)


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether weights are sharded by DeepSpeed."""
    return accelerator.distributed_type == "DEEPSPEED" and accelerator.deepspeed_plugin.zero_stage == 3


def whole_state(net: torch.nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """All weights of `net`, for the main process."""
    if not is_zero3(accelerator):
        return accelerator.get_state_dict(net)
    with _gathered(net):
        return {
            name: value.detach().cpu().clone() for name, value in accelerator.unwrap_model(net).state_dict().items()
        }


class Shadow:
    """A copy of the weights that a module trains, as they are now: an average, an old policy, the reference.

    It is sharded as the weights are (DDP, ZeRO, FSDP2). It takes their place for the length of a `with` block, so that
    one network serves as many policies. It has a state for checkpoints.

    Args:
        module: one without weights stands for those that are trained themselves.
        dtype: of the copy, which needs float32 to follow; None: the weights' own.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype | None = torch.float32):
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.shards = {name for name, weight in trained.items() if _is_shard(weight)}
        self.live = {name: weight.ds_tensor if name in self.shards else weight for name, weight in trained.items()}
        self.copies = {name: weight.detach().clone().to(dtype or weight.dtype) for name, weight in self.live.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """copy = `decay` · copy + (1 - `decay`) · weight."""
        for name, weight in self.live.items():
            self.copies[name].lerp_(weight.detach().float(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The copy in place of the weights. No graph that needs the weights may be waiting for its gradient."""
        kept = self._exchange({})
        try:
            yield
        finally:
            self._exchange(kept)

    @torch.no_grad()
    def _exchange(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the copy in place, or what is `kept`; tensors of one dtype change places, so only others need room."""
        aside = {}
        for name, weight in self.live.items():
            now, copy = weight.detach().clone(), self.copies[name]
            weight.data.copy_(kept.get(name, copy))
            if copy.dtype == weight.dtype:
                copy.copy_(now)
            elif not kept:
                aside[name] = now
        return aside

    def state_dict(self) -> dict[str, Tensor]:
        """The whole copy, on every process; of weights under ZeRO-3 all shards in a row."""
        return {name: gather(copy) if name in self.shards else _whole(copy) for name, copy in self.copies.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the values of a `state_dict`."""
        ranks = PartialState()
        for name, copy in self.copies.items():
            value = state[name].to(copy.device)
            if name in self.shards:
                value = value.chunk(ranks.num_processes)[ranks.process_index]
            if isinstance(copy, DTensor):
                value = distribute_tensor(value, copy.device_mesh, copy.placements)
            copy.copy_(value)


def average(module: torch.nn.Module, decay: float) -> Shadow:
    """Of the weights over the training; at `decay` 0 it is they, and needs no room."""
    return Shadow(module if decay else torch.nn.Module())


def _is_shard(weight: torch.nn.Parameter) -> bool:
    """Whether this process keeps but a part of it, beside the parameter, which is empty (ZeRO-3)."""
    return "ds_tensor" in vars(weight)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_trainable(net: ModelMixin | PreTrainedModel, options: LoopArguments) -> list[torch.nn.Parameter]:
    """The parameters to train: of a new LoRA, or all of the network, in float32.

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
