"""BiCoT-GRPO's loss: tokens of a written plan and of the picture drawn after it share one advantage.

Pure functions on tensors, in float32. Shapes: (B,) one value a picture, (B, N) one a token of its plan or image.

    T2I-R1       arXiv 2505.00703: one group, one advantage, one token mean over both levels, k3 penalty
    EG-GRPO      2604.02355: tokens of low entropy learn nothing from the reward, those of high entropy get a bonus
    STAGE        2509.25027: equal codes at one place of a good and of a bad picture of a group cancel out

Left out: GCPO's choice of tokens, adaptive entropy losses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BONUS = 0.3  # EG-GRPO's bonus is at most this share of the entropy, and of the advantage
STABILITY = 0.4  # weight of STAGE's reward for keeping the reference's entropy


class Loss(NamedTuple):
    """Of each token (B, N): what is minimised, the ratio new to old, and whether it was clipped away."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Loss:
    """-min(ρ A, clip(ρ, 1 ± ε) A), ρ = exp(log p - log p_old); all (B, N)."""
    ratio = (log_prob - old).exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return Loss(-torch.minimum(free, bounded), ratio, bounded < free)


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """(B, N) exp(r - p) - (r - p) - 1, an estimate of the KL from the reference that is never negative."""
    change = reference - log_prob
    return change.exp() - change - 1


def by_entropy(
    advantage: Tensor, entropy: Tensor, mask: Tensor, vocabulary: int, lowest: float, highest: float
) -> Tensor:
    """(B, N) advantages of tokens: 0 for the share `lowest` of a row's tokens with the lowest entropy, and
    A + min(0.3 H, 0.3 |A|) for the share `highest` with the highest one (EG-GRPO).

    Args:
        advantage: (B,).
        entropy: (B, N) in nats; H is this over its largest value, log `vocabulary`.
        mask: (B, N) 1 where there is a token.
        lowest, highest: shares in [0, 1]; 0 and 0 leave A as it is.
    """
    spread = advantage[:, None].expand_as(entropy)
    count = mask.sum(1, keepdim=True)
    rank = entropy.masked_fill(mask == 0, math.inf).argsort(1).argsort(1)  # 0 is the lowest of a row
    bonus = torch.minimum(BONUS * entropy / math.log(vocabulary), BONUS * spread.abs())
    raised = torch.where(rank >= count - (highest * count).floor(), spread + bonus, spread)
    return raised.masked_fill(rank < (lowest * count).floor(), 0.0)


def likeness(codes: Tensor, advantage: Tensor, group: int) -> Tensor:
    """(B, N) mean cosine of each code with those at its place in the group's pictures of the other sign (STAGE).

    Args:
        codes: (B, N, D) of whole groups, adjacent.
        advantage: (B,); pictures of one sign are not compared.
    """
    unit = F.normalize(codes.float(), dim=-1).unflatten(0, (-1, group))  # (P, G, N, D)
    cosine = torch.einsum("pind,pjnd->pijn", unit, unit)
    sign = advantage.view(-1, group)
    other = (sign[:, :, None] * sign[:, None, :] <= 0) & ~torch.eye(group, dtype=torch.bool, device=codes.device)
    met = other.sum(2).clamp_min(1)
    return ((cosine * other[..., None]).sum(2) / met[..., None]).flatten(0, 1)


def learning_weight(cosine: Tensor) -> Tensor:
    """(B, N) (1 - cos) / 2 in [0, 1], over its mean: how much the reward's gradient counts at a place."""
    weight = ((1 - cosine) / 2).clamp(0, 1)
    return weight / weight.mean().clamp_min(1e-6)


def penalty_weight(cosine: Tensor) -> Tensor:
    """(B, N) in [0.5, 1]: how much the penalty counts there."""
    return 0.5 + 0.5 * (cosine + 1).clamp(0, 1)


def stability(entropy: Tensor, reference: Tensor) -> Tensor:
    """(B,) 1 / (1 + (H_ref - H)²) of rows' mean entropies (B, N): a reward for keeping them."""
    return 1 / (1 + (reference.mean(1) - entropy.mean(1)) ** 2)


class Level(NamedTuple):
    """The losses of one level's tokens (B, N), and its mask."""

    loss: Tensor
    mask: Tensor


def join(levels: list[Level], token_weight: float | None) -> Tensor:
    """The scalar loss of one or two levels, the plan's first.

    Args:
        token_weight: of the image's level against 1 - it of the plan's, each a mean over its tokens; None: the mean
            over all tokens alike, as published, in which 576 image tokens outweigh a plan.
    """
    sums = [(level.loss * level.mask).sum() for level in levels]
    counts = [level.mask.sum().clamp_min(1) for level in levels]
    if len(levels) == 1 or token_weight is None:
        return sum(sums) / sum(counts)
    plan, image = (total / count for total, count in zip(sums, counts, strict=True))
    return (1 - token_weight) * plan + token_weight * image
