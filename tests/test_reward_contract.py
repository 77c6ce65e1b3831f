"""The claims that every reward with weights must keep, on the miniature's real models; formulas are elsewhere."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from interfaces import Prompt, Reward, Sample
from miniature import world
from miniature.fit import WEIGHTS
from models.weights import locked
from rewards import CHECKPOINTS, REWARDS, RewardContext, RewardOptions, build

# reward -> the module that looks at pictures, a weight without which it cannot score
MODELS: dict[str, tuple[Callable[[torch.nn.Module], torch.nn.Module], str]] = {
    "hps": (lambda model: model.visual, "ln_final.weight"),
    "git": (lambda model: model.git.image_encoder, "git.visual_projection.visual_projection.0.weight"),
    "gdino": (lambda model: model.model.backbone, "model.text_projection.weight"),
    "orm": (lambda model: model.model.vision_tower, "image_newline"),
    "imagereward": (lambda model: model.vision, "mlp.layers.7.weight"),
    "pickscore": (lambda model: model.vision_model, "visual_projection.weight"),
}


def make(name: str, path: str | Path | None = None, **options: object) -> Reward:
    """A reward as a run builds it; `path` None is the miniature's."""
    computing = {"reward_batch_size": 3, "orm_dtype": "float32", **options}
    where = {f"{name}_path": str(WEIGHTS / name if path is None else path)}
    return build([name], RewardOptions(**where, **computing), RewardContext())[0]


BUILT: dict[str, Reward] = {}


@pytest.fixture(params=MODELS)
def reward(request) -> Reward:
    if request.param not in BUILT:
        BUILT[request.param] = make(request.param)
    return BUILT[request.param]


def samples() -> list[Sample]:
    """Three groups of three pictures in two sizes, and a sample of two pictures that others have too."""
    rng, made = random.Random(0), []
    for task in ("two_object", "counting", "position"):
        prompt = world.request(task, rng)
        for size in (64, 64, 48):
            picture = world.draw(world.layout(prompt, rng), rng).resize((size, size))
            made.append(Sample(prompt, "reasoning", "a rewrite", (picture,)))
    return [*made, replace(made[0], images=made[0].images + made[1].images)]


def looks(monkeypatch, reward: Reward, spoil: bool = False) -> list[int]:
    """Pictures in each forward pass from now on; with `spoil` what is seen of the first of a batch is not finite."""
    rows, module = [], MODELS[reward.name][0](reward.model)
    forward = module.forward

    def counted(*args, **kwargs):
        rows.append(len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))))
        seen = forward(*args, **kwargs)
        if spoil:
            _spoil(seen)
        return seen

    monkeypatch.setattr(module, "forward", counted)
    return rows


def _spoil(seen: object) -> None:
    if isinstance(seen, torch.Tensor) and seen.is_floating_point():
        seen[0] = torch.nan
    elif isinstance(seen, dict | list | tuple):
        for part in seen.values() if isinstance(seen, dict) else seen:
            _spoil(part)


def test_every_reward_with_weights_is_checked_here():
    assert set(MODELS) == set(CHECKPOINTS) <= set(REWARDS)


def test_a_batch_scores_like_one_by_one_and_within_the_range(reward):
    scores = reward(samples())
    np.testing.assert_allclose(scores, [reward([one])[0] for one in samples()], atol=2e-4)
    assert len(set(scores)) >= 3
    assert all(reward.range[0] <= score <= reward.range[1] for score in scores)
    assert reward([]) == []


def test_a_sample_scores_the_mean_of_its_pictures(reward):
    scores = reward(samples())
    assert scores[-1] == pytest.approx((scores[0] + scores[1]) / 2, abs=1e-5)


def test_each_distinct_picture_is_looked_at_once_in_batches(reward, monkeypatch):
    rows, once = looks(monkeypatch, reward), samples()
    reward(once + [replace(one, completion="another") for one in once])
    assert sum(rows) == 9 and max(rows) <= 3


def test_only_picture_and_original_prompt_are_read(reward):
    changed = [replace(one, rewrite="a blue square", completion="<answer>yes</answer>") for one in samples()]
    assert reward(changed) == reward(samples())


def test_a_grey_picture_is_read_as_rgb(reward):
    one = samples()[0]
    grey = one.images[0].convert("L")
    assert reward([replace(one, images=(grey,))]) == reward([replace(one, images=(grey.convert("RGB"),))])


@pytest.mark.parametrize("noun", ["🦓" * 9, "x" * 5000, "circle " * 2000, "[SEP] <|im_end|> </s>", "\ud83e", "\x00"])
def test_odd_texts_are_scored(reward, noun):
    prompt = Prompt(f"a photo of {noun}", "single_object", (noun, "circle"))
    (score,) = reward([replace(samples()[0], prompt=prompt)])
    assert reward.range[0] <= score <= reward.range[1]


@pytest.mark.parametrize("reward", ["hps", "imagereward", "pickscore"], indirect=True)
def test_a_prompt_is_said_to_be_cut_from_the_first_word_on_that_is_not_read(reward):
    def asked(words: int, tail: str = "") -> Prompt:
        return Prompt("a photo of a" + " circle" * words + tail)

    def score(prompt: Prompt) -> float | None:
        return reward([replace(samples()[0], prompt=prompt)])[0]

    first = next(words for words in range(100) if "cuts 1 of 2 " in reward.limits([asked(1), asked(words)])[-1])
    assert score(asked(first - 1)) == score(asked(first - 1, " red")) != score(asked(first - 2, " red"))
    assert f"reads {reward.max_tokens} tokens" in reward.limits([asked(1)])[-1] and reward.limits([]) == []


# not gdino, whose backbone mixes what is spoilt into all rows; test_gdino.py has it
@pytest.mark.parametrize("reward", [name for name in MODELS if name != "gdino"], indirect=True)
def test_a_score_that_is_not_finite_is_absent_and_the_others_stay(reward, monkeypatch):
    three = samples()[:2] + samples()[4:5]
    expected = reward(three)
    looks(monkeypatch, reward, spoil=True)
    scores = reward(three)
    assert scores[0] is None
    assert scores[1:] == pytest.approx(expected[1:], abs=1e-4)


def test_a_sample_without_all_its_pictures_is_refused_not_scored(reward):
    one = samples()[0]
    for images in ((), (None,), (*one.images, None)):
        with pytest.raises(ValueError, match=one.prompt.id):
            reward([replace(one, images=images)])


def test_the_model_is_frozen_and_the_reward_is_no_module(reward):
    assert not reward.model.training and not any(weight.requires_grad for weight in reward.model.parameters())
    assert {weight.dtype for weight in reward.model.parameters()} == {torch.float32}
    assert not isinstance(reward, torch.nn.Module)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gdino"}))  # whose scores jump where a box is found or not
def test_half_precision_agrees_with_full(name):
    half, full = make(name, reward_dtype="bfloat16", orm_dtype="bfloat16"), make(name)
    kept = torch.bfloat16 if name == "orm" else torch.float32  # autocast over float32 weights, but for 8 billion
    assert {weight.dtype for weight in half.model.parameters()} == {kept}
    assert half(samples()) != full(samples())
    spread = np.ptp(full(samples()))
    np.testing.assert_allclose(half(samples()), full(samples()), atol=max(0.02, 0.2 * spread))


@pytest.mark.parametrize("name", MODELS)
def test_bad_constructor_values_are_named(name):
    with pytest.raises(UserError, match="fp16"):
        make(name, **{"orm_dtype" if name == "orm" else "reward_dtype": "fp16"})


# Checkpoints that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_checkpoint_is_not_downloaded_but_named_with_size_licence_and_command(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("httpx.Client.send", lambda *_, **__: pytest.fail("a request"))
    known = locked(CHECKPOINTS[name][0])
    with pytest.raises(UserError) as caught:
        build([name], RewardOptions(), RewardContext())
    assert all(part in str(caught.value) for part in (known.repo, known.size, known.licence, known.command))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="/nowhere"):
        make(name, "/nowhere/at/all")


def lose(path: Path, weight: str) -> str:
    save_file({k: v for k, v in load_file(path).items() if k != weight}, path, {"format": "pt"})
    return weight.split(".")[-1]


def resize(path: Path, weight: str) -> str:
    weights = load_file(path)
    save_file({**weights, weight: torch.zeros(3, *weights[weight].shape)}, path, {"format": "pt"})
    return str(path.parent)


def tear(path: Path, weight: str) -> str:
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def replace_by_text(path: Path, weight: str) -> str:
    path.write_bytes(b"not weights")
    return path.name


def remove(path: Path, weight: str) -> str:
    path.unlink()
    return str(path.parent)


def break_config(path: Path, weight: str) -> str:
    names = ("config.json", "open_clip_config.json", "med_config.json")
    next(path.parent / name for name in names if (path.parent / name).is_file()).write_text("{")
    return str(path.parent)


@pytest.mark.parametrize("damage", [lose, resize, tear, replace_by_text, remove, break_config])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(name, damage, tmp_path):
    folder = Path(shutil.copytree(WEIGHTS / name, tmp_path / name))
    (weights,) = folder.glob("*.safetensors")
    named = damage(weights, MODELS[name][1])
    with pytest.raises(UserError) as caught:
        make(name, folder)
    assert named in str(caught.value) and "\n" not in str(caught.value)
