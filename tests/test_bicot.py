"""Claims about models/bicot.py: the loss of both levels, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import bicot

RNG = np.random.default_rng(0)


def test_ratio_and_clip_are_those_of_the_formula():
    new, old, advantage = (RNG.normal(size=(4, 6)) for _ in range(3))
    found = bicot.policy_loss(*map(torch.tensor, (new, old, advantage)), 0.2)
    ratio = np.exp(new - old)
    wanted = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    assert np.allclose(found.loss, wanted) and np.allclose(found.ratio, ratio)
    assert np.array_equal(found.clipped, np.clip(ratio, 0.8, 1.2) * advantage < ratio * advantage)


def test_the_penalty_is_zero_at_the_reference_and_positive_elsewhere():
    new, reference = (torch.tensor(RNG.normal(size=(3, 5))) for _ in range(2))
    assert (bicot.k3(new, new) == 0).all() and (bicot.k3(new, reference) > 0).all()
    change = (reference - new).numpy()
    assert np.allclose(bicot.k3(new, reference), np.exp(change) - change - 1)


def test_equal_rewards_give_a_zero_gradient():
    log_prob = torch.randn(4, 6, requires_grad=True)
    found = bicot.policy_loss(log_prob, log_prob.detach(), torch.zeros(4, 6), 0.2)
    bicot.join([bicot.Level(found.loss, torch.ones(4, 6))], None).backward()
    assert (log_prob.grad == 0).all()


def test_published_is_one_mean_over_all_tokens_and_a_weight_one_over_each_level():
    plan, image = RNG.normal(size=(2, 3)), RNG.normal(size=(2, 10))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    levels = [bicot.Level(torch.tensor(plan), torch.tensor(mask)), bicot.Level(torch.tensor(image), torch.ones(2, 10))]
    assert np.isclose(bicot.join(levels, None), ((plan * mask).sum() + image.sum()) / 23)
    assert np.isclose(bicot.join(levels, 0.25), 0.75 * (plan * mask).sum() / 3 + 0.25 * image.mean())
    assert np.isclose(bicot.join(levels[1:], 0.25), image.mean())


def by_entropy(advantage, entropy, mask, vocabulary, lowest, highest) -> np.ndarray:
    found = np.repeat(advantage[:, None], entropy.shape[1], 1)
    for row in range(len(found)):
        places = np.flatnonzero(mask[row])
        order = places[np.argsort(entropy[row, places])]
        for place in order[len(order) - int(highest * len(order)) :]:
            found[row, place] += min(0.3 * entropy[row, place] / np.log(vocabulary), 0.3 * abs(advantage[row]))
        found[row, order[: int(lowest * len(order))]] = 0
    return found


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 0.0), (0.2, 0.5), (0.5, 0.0)])
def test_certain_tokens_learn_nothing_and_uncertain_ones_get_a_bonus(lowest, highest):
    advantage, entropy = RNG.normal(size=5), RNG.uniform(0, 4, (5, 20))
    mask = np.arange(20) < np.array([20, 15, 10, 5, 1])[:, None]
    given = (torch.tensor(advantage), torch.tensor(entropy), torch.tensor(mask).long(), 100, lowest, highest)
    found = bicot.by_entropy(*given).numpy()
    assert np.allclose(found[mask], by_entropy(advantage, entropy, mask, 100, lowest, highest)[mask])
    if highest:
        assert (np.abs(found - advantage[:, None])[mask & (found != 0)] <= 0.3 * np.abs(advantage).max() + 1e-9).all()


def test_likeness_is_the_cosine_with_pictures_of_the_other_sign():
    codes, advantage = RNG.normal(size=(6, 4, 8)), np.array([1.0, -1, 0.5, 2, -1, -3])
    unit = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    wanted = np.zeros((6, 4))
    for i in range(6):
        others = [j for j in range(3 * (i // 3), 3 * (i // 3) + 3) if j != i and advantage[i] * advantage[j] <= 0]
        wanted[i] = np.mean([(unit[i] * unit[j]).sum(-1) for j in others], axis=0)
    assert np.allclose(bicot.likeness(torch.tensor(codes), torch.tensor(advantage), 3), wanted, atol=1e-6)


def test_equal_codes_learn_nothing_from_the_reward_and_keep_the_penalty():
    cosine = torch.tensor([[1.0, 0.0, -1.0]])
    assert torch.allclose(bicot.learning_weight(cosine), torch.tensor([[0.0, 1.0, 2.0]]))
    assert torch.allclose(bicot.penalty_weight(cosine), torch.tensor([[1.0, 1.0, 0.5]]))
    entropy = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.allclose(bicot.stability(entropy, entropy + 2), torch.tensor([0.2, 0.2]))
