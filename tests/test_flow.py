"""Claims about flow matching as a policy: transitions, log-probabilities, losses, advantages, and what is recorded."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

from errors import UserError
from models import flow
from models.flow import Gaussian, Noised, Taken, log_prob, policy_loss, transition
from rendering import RenderOptions
from rendering.trajectory import FlowRenderer, Recorder, Sampling, check_method
from scoring.advantages import mix, spread_by_chance

TEXTS = ["a photo of a red circle", "two blue squares", "a green star left of a red circle", "a cross"]


def schedule(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps)] + [0.0]


def velocity(x: torch.Tensor, sigma: float, spread: float) -> torch.Tensor:
    """The exact one of data N(0, spread²): E[ε - x0 | x_σ]."""
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    return x * (sigma - (1 - sigma) * spread**2) / variance


@pytest.mark.parametrize(("kind", "eta"), [("flow", 0.7), ("flow", 0.2), ("dance", 0.3)])
def test_a_path_with_noise_ends_where_the_ode_ends(kind, eta):
    """In distribution, on a Gaussian: spread 0.5 comes out whatever the noise."""
    generator, sigmas, spread = torch.Generator().manual_seed(0), schedule(400), 0.5
    x = torch.randn(40_000, generator=generator)
    y = x.clone()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        step = transition(kind, x, velocity(x, sigma, spread), sigma, following, eta, sigmas[1])
        x = step.mean + step.std * torch.randn(x.shape, generator=generator)
        y = transition("ode", y, velocity(y, sigma, spread), sigma, following, eta, sigmas[1]).mean
    assert float(y.std()) == pytest.approx(spread, abs=0.01)
    assert float(x.std()) == pytest.approx(spread, abs=0.02) and abs(float(x.mean())) < 0.02


@pytest.mark.parametrize("kind", flow.SDES)
def test_without_noise_every_kind_takes_the_odes_step_and_both_ends_are_finite(kind):
    x, v, sigmas = torch.randn(4, 3, 2), torch.randn(4, 3, 2), schedule(8)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        ode = transition("ode", x, v, sigma, following, 0.7, sigmas[1])
        quiet, loud = (transition(kind, x, v, sigma, following, eta, sigmas[1]) for eta in (1e-9, 0.9))
        torch.testing.assert_close(quiet.mean, ode.mean)
        assert quiet.std < 1e-8 and math.isfinite(loud.std) and loud.mean.isfinite().all()


def test_a_transition_is_the_published_formula():
    x, v, s, t, eta = torch.randn(2, 5), torch.randn(2, 5), 0.75, 0.5, 0.7
    std = eta * math.sqrt(s / (1 - s))
    mean = x * (1 + std**2 / (2 * s) * (t - s)) + v * (1 + std**2 * (1 - s) / (2 * s)) * (t - s)
    flow_step = transition("flow", x, v, s, t, eta, 0.9)
    torch.testing.assert_close(flow_step.mean, mean)
    assert flow_step.std == pytest.approx(std * math.sqrt(s - t))
    x0 = x - s * v
    score = -(x - (1 - s) * x0) / s**2
    torch.testing.assert_close(
        transition("dance", x, v, s, t, 0.3, 0.9).mean, x + v * (t - s) - 0.5 * 0.3**2 * score * (t - s)
    )
    cps = t * math.sin(eta * math.pi / 2)
    closed = (1 - t) * x0 + math.sqrt(t**2 - cps**2) * (x + (1 - s) * v)
    torch.testing.assert_close(transition("cps", x, v, s, t, eta, 0.9).mean, closed)


def test_a_log_probability_is_the_mean_over_dimensions_of_a_gaussians():
    mean, x = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), 0.3).mean(axis=(1, 2))
    np.testing.assert_allclose(log_prob("flow", x, Gaussian(mean, 0.3)).numpy(), expected, rtol=1e-5)


def taken(mean: torch.Tensor, x: torch.Tensor, std: float = 0.5) -> Taken:
    return Taken(log_prob("flow", x, Gaussian(mean, std)), Gaussian(mean, std), -0.125)


@pytest.mark.parametrize("kind", flow.ON_PATH)
def test_before_the_first_update_the_ratio_is_one_and_the_gradient_is_the_advantages(kind):
    x, mean, advantage = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([1.0, -2.0, 0.0, 0.5])
    shift = torch.zeros(4, 6, requires_grad=True)
    found = policy_loss(kind, taken(mean + shift, x), taken(mean, x), advantage, flow.CLIP[kind])
    assert (found.ratio == 1).all() and not found.clipped.any()
    found.loss.sum().backward()
    towards = (x - mean) / 0.5**2 / 6 * (0.5 / 0.125 if kind == "guard" else 1)  # of the log-probability
    if kind == "guard":  # its correction is flat at zero
        assert shift.grad.isfinite().all()
    torch.testing.assert_close(shift.grad, -advantage[:, None] * towards)


def test_clips_and_masks_stop_what_leads_away_and_nothing_that_leads_back():
    x, old = torch.zeros(4, 6), torch.zeros(4, 6) + 0.1
    new = torch.tensor([[0.0], [0.0], [0.3], [0.3]]).expand(4, 6)  # nearer, nearer, further, further
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for kind, clip in (("grpo", 0.001), ("dppo", 1e-5)):
        found = policy_loss(kind, taken(new, x), taken(old, x), advantage, clip)
        assert found.clipped.tolist() == [True, False, False, True], kind
    far = policy_loss("dppo", taken(new, x), taken(old, x), advantage, 10.0)
    assert not far.clipped.any() and torch.equal(far.loss, -far.ratio * advantage)


def test_guard_puts_the_mean_ratio_right():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(20_000, 8, generator=generator)
    x = mean + 0.5 * torch.randn(mean.shape, generator=generator)
    new, advantage = mean + 0.2, torch.ones(len(mean))
    ratios = {k: policy_loss(k, taken(new, x), taken(mean, x), advantage, 9.0).ratio for k in ("grpo", "guard")}
    assert float(ratios["grpo"].log().mean()) == pytest.approx(-(0.2**2) / (2 * 0.5**2), abs=0.003)
    assert abs(float(ratios["guard"].log().mean())) < 0.002


def noised(rows: int = 3) -> Noised:
    return Noised(torch.randn(rows, 4, 2), torch.rand(rows) * 0.8 + 0.1, torch.randn(rows, 4, 2))


@pytest.mark.parametrize("kind", flow.FORWARD)
def test_a_forward_loss_pulls_towards_good_pictures_and_away_from_bad_ones(kind):
    at = noised()
    truth, advantage = at.noise - at.x0, torch.tensor([1.0, -1.0, 0.0])
    old = truth + 0.3
    v = old.clone().requires_grad_()
    found = flow.forward_loss(kind, at, v, old, advantage, clip=1.0, strength=1.0)
    assert (found.ratio == 1).all()
    found.loss.sum().backward()
    along = -(v.grad * (truth - old)).sum(dim=(1, 2))  # descent, seen along the way to the picture's own velocity
    assert along[0] > 0 > along[1] and along[2].abs() < 1e-6


def test_nft_is_the_published_sum_of_two_errors():
    at, v, old, advantage = noised(), torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.tensor([0.4, -1.0, 3.0])
    expected = []
    for i, a in enumerate(advantage.clamp(-1, 1).tolist()):
        sigma, x0 = float(at.sigma[i]), at.x0[i]
        x = (1 - sigma) * x0 + sigma * at.noise[i]
        errors = []
        for one in (0.5 * v[i] + 0.5 * old[i], 1.5 * old[i] - 0.5 * v[i]):
            error = x - sigma * one - x0
            errors.append(float((error**2).mean() / error.abs().mean()))
        expected.append(((a + 1) / 2 * errors[0] + (1 - a) / 2 * errors[1]) / 0.5)
    found = flow.forward_loss("nft", at, v, old, advantage, clip=0, strength=0.5).loss
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_noise_levels_cover_their_range_in_falling_parts():
    levels = flow.noise_levels(500, 4, 0.8, torch.Generator().manual_seed(0))
    parts = [(0.6, 0.8), (0.4, 0.6), (0.2, 0.4), (0.0, 0.2)]
    assert all(
        low <= float(row.min()) and float(row.max()) <= high for row, (low, high) in zip(levels, parts, strict=True)
    )


def test_a_window_is_the_same_for_all_groups_and_never_holds_the_last_step():
    assert flow.window("all", 5, 9, 1, 0) == (0, 1, 2, 3) and flow.window("first_half", 8, 9, 1, 0) == (0, 1, 2, 3)
    slid = [flow.window("sliding", 6, 2, rollout, 0) for rollout in range(1, 150, 25)]
    assert slid == [(0, 1), (1, 2), (2, 3), (3, 4), (0, 1), (1, 2)]
    drawn = {flow.window("random", 6, 2, rollout, 0) for rollout in range(1, 99)}
    assert len(drawn) == 10 and all(5 not in window for window in drawn)
    assert flow.window("random", 6, 2, 7, 3) == flow.window("random", 6, 2, 7, 3)


# Advantages ---------------------------------------------------------------------------------------------------------


def test_rewards_are_normalised_in_their_groups_before_they_are_mixed():
    columns = {"fine": [0.1, 0.2, 0.3, 0.3, 0.2, 0.1], "coarse": [5.0, 1.0, 3.0, None, 2.0, 4.0]}
    fine = np.array([-1, 0, 1, 1, 0, -1])
    coarse = np.array([2, -2, 0, 0, -1, 1]) / np.array([2, 2, 2, math.sqrt(2), math.sqrt(2), math.sqrt(2)])
    total = 2 * fine + coarse
    found = mix(columns, [2.0, 1.0], 3).advantages
    np.testing.assert_allclose(found, total / total.std(), atol=5e-3)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_absent_members_change_no_other_advantage(floor):
    scores = [0.0, 1.0, 2.0, 0.1, 0.2, 0.6]
    alone = mix({"r": scores}, [1.0], 3, floor=floor).advantages
    assert mix({"r": [*scores, None, None, None]}, [1.0], 3, floor=floor).advantages == pytest.approx(
        [*alone, 0, 0, 0]
    )


def test_a_tiny_spread_is_not_blown_up_beyond_its_floor():
    scores = [0.0, 1.0, 0.500, 0.501]
    loud, quiet = (mix({"r": scores}, [1.0], 2, floor=floor).advantages for floor in (0.0, 0.5))
    assert abs(loud[3] / loud[1]) == pytest.approx(1, abs=0.2) and abs(quiet[3] / quiet[1]) < 0.02


def test_a_group_whose_win_rates_a_coin_explains_teaches_nothing_and_is_counted():
    group, rng = 8, np.random.default_rng(0)
    spreads = []
    for _ in range(2_000):
        wins = np.triu(rng.integers(0, 2, (group, group)), 1)
        spreads.append(((wins.sum(1) + np.triu(1 - wins, 1).sum(0)) / (group - 1)).var(ddof=1))
    chance = spread_by_chance(group, group - 1)
    assert math.sqrt(np.mean(spreads)) == pytest.approx(chance, rel=0.03)
    strict, coin = [i / 7 for i in range(8)], [3 / 7, 4 / 7] * 4
    mixed = mix({"preference": [*strict, *coin]}, [1.0], 8, chance={"preference": chance})
    assert mixed.by_chance == {"preference": 0.5}
    assert max(map(abs, mixed.advantages[8:])) == 0 < min(map(abs, mixed.advantages[:8]))


# What is recorded ---------------------------------------------------------------------------------------------------


def options(path: object, **more: object) -> RenderOptions:
    small = {"render_steps": 4, "resolution": 16, "max_sequence_length": 64, "render_dtype": "float32"}
    return RenderOptions(str(path), **{**small, "render_batch_size": 4, **more})


@pytest.fixture(scope="module")
def renderer(toy, tmp_path_factory) -> FlowRenderer:
    return FlowRenderer(options(toy.flux), "cpu", tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("kind", flow.SDES)
def test_a_path_taken_again_has_the_log_probabilities_that_were_sampled(renderer, kind):
    path = renderer.sample(TEXTS, [1] * 4, [1, 2, 3, 4], Sampling(kind, 0.7, (0, 2), False))
    assert [step.index for step in path.steps] == [0, 2] and path.latents.dtype == torch.float32
    for step in path.steps:
        again = path.retake(step, path.velocity(renderer.denoiser.requires_grad_(), step.x, step.timestep))
        assert torch.equal(again.log_prob, step.taken.log_prob) and again.log_prob.requires_grad
    renderer.denoiser.requires_grad_(False)


def test_a_row_has_the_same_path_whatever_else_is_drawn_with_it(renderer):
    sampling = Sampling("flow", 0.7, (0, 1), False)
    path = renderer.sample(TEXTS, [1, 1, 2, 3], [1, 2, 3, 4], sampling)
    turned = renderer.sample(TEXTS[::-1], [3, 2, 1, 1], [4, 3, 2, 1], sampling)
    assert torch.equal(path.latents, turned.latents.flip(0)) and len({i.tobytes() for i in path.images}) == 4
    same = renderer.sample(TEXTS[:1] * 4, [1] * 4, [7, 7, 8, 9], sampling)
    assert torch.equal(same.latents[0], same.latents[1]) and not torch.equal(same.latents[1], same.latents[2])


def test_a_path_without_noise_is_the_pipelines_picture(renderer):
    path = renderer.sample(TEXTS, [1, 2, 3, 4], [0] * 4, Sampling("flow", 0.7, (), True))
    drawn = renderer.draw(TEXTS, [1, 2, 3, 4])
    assert [one.tobytes() for one in path.images] == [one.tobytes() for one in drawn]


@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift": 1.0}, {"shift_terminal": 0.02}],
    ids=["SD3", "FLUX", "plain", "Qwen-Image"],
)
def test_noise_levels_are_the_pipelines_own(settings):
    theirs = FlowMatchEulerDiscreteScheduler(**settings)
    ours, more = Recorder.from_config(theirs.config), {"mu": 0.9} if "use_dynamic_shifting" in settings else {}
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), **more)
    assert torch.equal(theirs.sigmas, ours.sigmas) and ours.sigmas[-1] == 0


def test_texts_are_encoded_once_and_then_read_from_disk(toy, tmp_path):
    first = FlowRenderer(options(toy.flux), "cpu", tmp_path)
    first.encode(TEXTS, guided=False)
    second = FlowRenderer(options(toy.flux), "cpu", tmp_path)
    second._encode_rows = None  # to ask a text encoder would fail
    sampling = Sampling("flow", 0.7, (0,), False)
    paths = [one.sample(TEXTS, [1] * 4, [1] * 4, sampling) for one in (first, second)]
    assert torch.equal(paths[0].latents, paths[1].latents)


def test_guidance_in_two_passes_is_taken_again_as_the_pipeline_took_it(tmp_path):
    sd3 = "miniature/weights/sd3"
    renderer = FlowRenderer(options(sd3, max_sequence_length=32, resolution=48, guidance=3.0), "cpu", tmp_path)
    for guided, calls in ((True, 8), (False, 4)):
        path = renderer.sample(TEXTS, [1] * 4, [1, 2, 3, 4], Sampling("flow", 0.7, (0, 2), guided))
        assert len(path.calls[0][0]["encoder_hidden_states"]) == calls
        for step in path.steps:
            again = path.retake(step, path.velocity(renderer.denoiser, step.x, step.timestep))
            assert torch.equal(again.log_prob, step.taken.log_prob)


@pytest.mark.parametrize(
    ("change", "loss", "guidance"),
    [("flux", "nft", "cfg"), ("schnell", "nft", "none"), ("schnell", "awm", "none"), ("dpm", "grpo", "none")],
)
def test_a_pipeline_that_cannot_be_trained_so_is_refused_before_it_is_loaded(toy, tmp_path, change, loss, guidance):
    path = shutil.copytree(toy.flux, tmp_path / f"tiny-{change}")
    if change == "dpm":
        index = json.loads((path / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
        (path / "model_index.json").write_text(json.dumps(index))
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError):
        check_method(str(path), loss, guidance)
    if change == "schnell":
        check_method(str(path), "grpo", "none")
