"""Flow matching as a policy: transitions from noise to picture, their log-probabilities, and losses over them.

Noise level σ falls from 1 to 0; x_σ = (1 - σ) x0 + σ ε; the network's velocity v estimates ε - x0. Turned into an SDE,
each transition from σ to σ' is a Gaussian, so a denoising path is a sequence of actions. All in float32, because
log-probabilities in bfloat16 are noise. Shapes: latents (B, ...), one row a picture; what is per picture is (B,).

    transition     mean and spread of x_σ'            Flow-GRPO 2505.05470, DanceGRPO 2505.07818, CPS 2509.05952
    policy_loss    grpo | guard | dppo                Flow-GRPO, GRPO-Guard 2510.22319, Flow-DPPO 2606.11025
    forward_loss   nft | awm: no path, any solver     DiffusionNFT 2509.16117, AWM 2509.25050

Left out: AWM's weights over timesteps (its ghuber), TempFlow's per-step credit, Flow-GRPO's sum over dimensions.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SDES = ("flow", "dance", "cps")
ON_PATH, FORWARD = ("grpo", "guard", "dppo"), ("nft", "awm")
CLIP = {"grpo": 1e-4, "guard": 2e-6, "dppo": 1e-5, "awm": 1.0, "nft": 0.0}  # published; dppo's is the largest KL
WINDOWS = ("first_half", "sliding", "random", "all")
SLIDE_EVERY = 25  # rollouts after which a sliding window moves on by one step; MixGRPO 2507.21802


# Paths ---------------------------------------------------------------------------------------------------------------


def window(kind: str, steps: int, size: int, rollout: int, seed: int) -> tuple[int, ...]:
    """The denoising steps, of 0 .. `steps` - 1, that are stochastic and trained in this rollout, for all its groups.

    The last step is never one of them: its spread is tiny and its log-probability overflows.

    Args:
        kind: "all"; the "first_half"; "sliding": `size` neighbours, which move on during training; "random": `size`.
        rollout: number of the rollout, from 1.
    """
    last = steps - 1
    if kind == "all":
        return tuple(range(last))
    if kind == "first_half":
        return tuple(range(max(1, steps // 2)))
    if kind == "sliding":
        first = (rollout - 1) // SLIDE_EVERY % (last - size + 1)
        return tuple(range(first, first + size))
    return tuple(sorted(random.Random(f"{seed}/{rollout}").sample(range(last), size)))


class Gaussian(NamedTuple):
    """x_σ' as it is sampled: mean (B, ...) and standard deviation, 0 for an ODE's step."""

    mean: Tensor
    std: float


def transition(kind: str, x: Tensor, v: Tensor, sigma: float, sigma_next: float, eta: float, top: float) -> Gaussian:
    """One step from `sigma` to `sigma_next`.

    Flow and Dance are one SDE, x' = x + (v - s²/2 · score) dt + s sqrt(|dt|) ε with score = -(x + (1 - σ) v) / σ:
    Flow-GRPO's s = η sqrt(σ / (1 - σ)), DanceGRPO's s = η. CPS keeps the schedule's noise level exactly:
    x' = (1 - σ') x0 + sqrt(σ'² - std²) x1 + std ε with std = σ' sin(η π / 2).

    Args:
        kind: one of SDES, or "ode".
        x: x_σ.
        v: velocity at x and σ.
        eta: strength of the noise.
        top: the schedule's second σ, the largest for which 1 - σ is divided by: at σ = 1 that is infinite.
    """
    x, v, dt = x.float(), v.float(), sigma_next - sigma
    if kind == "ode":
        return Gaussian(x + v * dt, 0.0)
    if kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
        return Gaussian((1 - sigma_next) * (x - sigma * v) + kept * (x + (1 - sigma) * v), std)
    spread = eta * math.sqrt(sigma / (1 - min(sigma, top))) if kind == "flow" else eta
    score = -(x + (1 - sigma) * v) / sigma
    return Gaussian(x + (v - spread**2 / 2 * score) * dt, spread * math.sqrt(-dt))


def log_prob(kind: str, x_next: Tensor, step: Gaussian) -> Tensor:
    """(B,) log-probability of `x_next`, the mean over its dimensions, so that ratios stay near 1.

    CPS leaves out the constants and 1 / (2 std²), as published.
    """
    squared = _mean((x_next.float() - step.mean) ** 2)
    if kind == "cps":
        return -squared
    return -squared / (2 * step.std**2) - math.log(step.std) - math.log(2 * math.pi) / 2


# Losses over a path --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """A step that was sampled, or the same under newer weights: (B,) log-probability of x_σ', and its Gaussian."""

    log_prob: Tensor
    step: Gaussian
    dt: float


class Loss(NamedTuple):
    """Of each picture (B,): what is minimised, the ratio new to old, and whether it was clipped (or masked) away."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(kind: str, new: Taken, old: Taken, advantage: Tensor, clip: float) -> Loss:
    """The loss of one step.

    grpo    -min(ρ A, clip(ρ, 1 ± ε) A)
    guard   the same with ρ = exp((Δ log p + ‖Δμ‖² / (2 std²)) std) and divided by |dt|: the mean ratio, which sits
            below 1, is put right, and steps weigh the same
    dppo    -ρ A, left out where the exact KL exceeds ε and the step would lead further away
    """
    change, kl = new.log_prob - old.log_prob, divergence(new.step, old.step)
    if kind == "dppo":
        ratio = change.exp()
        away = (ratio > 1) & (advantage > 0) | (ratio < 1) & (advantage < 0)
        masked = away & (kl >= clip)
        return Loss(torch.where(masked, 0.0, -ratio * advantage), ratio, masked)
    ratio = change.exp() if kind == "grpo" else ((change + kl) * new.step.std).exp()
    loss = _clipped(ratio, advantage, clip)
    return loss if kind == "grpo" else loss._replace(loss=loss.loss / abs(new.dt))


def divergence(new: Gaussian, old: Gaussian) -> Tensor:
    """(B,) exact KL of two transitions of equal spread, mean over dimensions: ‖Δμ‖² / (2 std²)."""
    return _mean((new.mean - old.mean) ** 2) / (2 * new.std**2)


# Losses without a path -----------------------------------------------------------------------------------------------


class Noised(NamedTuple):
    """A finished picture's latents, noised again: x0 (B, ...), σ (B,), ε, and x_σ."""

    x0: Tensor
    sigma: Tensor
    noise: Tensor

    @property
    def x(self) -> Tensor:
        sigma = _like(self.sigma, self.x0)
        return (1 - sigma) * self.x0 + sigma * self.noise


def forward_loss(
    kind: str, at: Noised, v: Tensor, v_old: Tensor, advantage: Tensor, *, clip: float, strength: float
) -> Loss:
    """The loss of one noising.

    nft   r L(v⁺) + (1 - r) L(v⁻), v± = v_old ± β (v - v_old), r = (1 + A) / 2 with A in [-1, 1]; L is the squared
          error of x0, over the mean absolute one; divided by β = `strength`
    awm   GRPO's loss with log p = -`strength` · ‖v - (ε - x0)‖², at the same σ and ε for the old weights

    Args:
        advantage: clamped to [-1, 1].
    """
    if kind == "awm":
        errors = [_mean((one.float() - (at.noise - at.x0)) ** 2) for one in (v, v_old)]
        return _clipped((strength * (errors[1] - errors[0])).exp(), advantage, clip)
    better = (1 + advantage.clamp(-1, 1)) / 2
    step = strength * (v.float() - v_old.float())
    towards, away = (_x0_error(at, v_old.float() + sign * step) for sign in (1, -1))
    loss = (better * towards + (1 - better) * away) / strength
    return Loss(loss, torch.ones_like(loss), torch.zeros_like(loss, dtype=torch.bool))


def _x0_error(at: Noised, v: Tensor) -> Tensor:
    error = at.x - _like(at.sigma, v) * v - at.x0
    scale = error.detach().abs().flatten(1).mean(1).clamp_min(1e-5)
    return _mean(error**2) / scale


def noise_levels(rows: int, passes: int, highest: float, generator: torch.Generator) -> Tensor:
    """(passes, rows) σ in (0, `highest`), one of each of `passes` equal parts for each row, in falling order."""
    place = torch.rand((passes, rows), generator=generator) + torch.arange(passes - 1, -1, -1)[:, None]
    return (place / passes * highest).clamp(1e-3, 1 - 1e-3)


# Common --------------------------------------------------------------------------------------------------------------


def velocity_error(v: Tensor, reference: Tensor) -> Tensor:
    """(B,) mean squared difference of velocities: the penalty for leaving the reference (UniGRPO 2603.23500)."""
    return _mean((v.float() - reference.float()) ** 2)


def _clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Loss:
    free, bounded = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return Loss(-torch.minimum(free, bounded), ratio, bounded < free)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _like(value: Tensor, latents: Tensor) -> Tensor:
    return value.view(-1, *[1] * (latents.dim() - 1))
