"""Where the weights of a reward are: how much memory they take, and keeping them off the device between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from interfaces import Prompt, Reward, Sample


@runtime_checkable
class ModelReward(Protocol):
    """A reward with weights: `model` is the frozen network, `device` where it computes."""

    name: str
    model: torch.nn.Module
    device: torch.device


class _Offloaded(Reward):
    """A model reward whose weights are on its device only while it scores."""

    def __init__(self, inner: Reward):
        self.inner, self.model, self.device = inner, inner.model, inner.device
        self.name, self.range = inner.name, inner.range
        self.needs_images, self.needs_baseline_images = inner.needs_images, inner.needs_baseline_images
        self.model.to("cpu")

    def limits(self, prompts: Sequence[Prompt]) -> list[str]:
        return self.inner.limits(prompts)

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        self.model.to(self.device)
        try:
            return self.inner(samples)
        finally:
            self.model.to("cpu")
            self.metrics = self.inner.metrics
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def offloaded(reward: Reward) -> Reward:
    """`reward` with its weights in main memory between calls; a reward without weights as it is."""
    return _Offloaded(reward) if isinstance(reward, ModelReward) else reward


def describe(reward: Reward, prompts: Sequence[Prompt]) -> str:
    """One line: parameters and memory of the reward's model, if it has one, and what it does not see of `prompts`."""
    if not isinstance(reward, ModelReward):
        return "; ".join([f"{reward.name}: no weights on this device", *reward.limits(prompts)])
    tensors = [*reward.model.parameters(), *reward.model.buffers()]
    mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
    dtype = str(next(reward.model.parameters()).dtype).removeprefix("torch.")
    millions = sum(parameter.numel() for parameter in reward.model.parameters()) / 1e6
    weights = f"{millions:,.1f} M parameters, {mib:,.0f} MiB in {dtype} on {reward.device}"
    return "; ".join([f"{reward.name}: {weights}", *reward.limits(prompts)])
