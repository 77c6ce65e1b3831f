"""Claims about the second miniature renderer: another architecture, which draws what is written, not what is wished.

pytest tests/test_second_renderer.py    # 11 s on one core, and the imports
"""

from __future__ import annotations

import random
import shutil

import pytest
from PIL import Image

from miniature import build, fit, second, world

pytestmark = pytest.mark.slow

SD3 = build.WEIGHTS / "sd3"


@pytest.fixture(scope="module")
def flux():
    return build.renderer()


@pytest.fixture(scope="module")
def sd3():
    return build.renderer(sdmodel_name=SD3, guidance=second.GUIDANCE)


@pytest.fixture(scope="module")
def some():
    """Eight held-out prompts of each task."""
    return world.splits()[1][::5]


def test_it_draws_written_layouts_right_and_raw_prompts_seldom(sd3, some):
    accuracy = build.drawing(sd3, some)
    assert accuracy["written"] >= 0.95
    assert accuracy["raw"] < 0.35


def test_with_equal_noise_both_draw_a_layout_as_written_and_a_wish_each_in_its_own_way(flux, sd3, some):
    rng = random.Random(0)
    written = [world.describe(world.layout(prompt, rng)) for prompt in some]
    assert same_scene(flux, sd3, written) >= 0.9
    assert same_scene(flux, sd3, [prompt.text for prompt in some]) <= 0.4


def same_scene(one, other, texts: list[str]) -> float:
    """Share of texts of which the oracle reads the same things in both renderers' pictures; no picture is the same."""
    pairs = list(zip(one(texts, range(len(texts))), other(texts, range(len(texts))), strict=True))
    assert not any(a.tobytes() == b.tobytes() for a, b in pairs)
    return sum(looks(a) == looks(b) for a, b in pairs) / len(pairs)


def looks(picture: Image.Image) -> list[tuple[str, str, int]]:
    return sorted((thing.color, thing.shape, thing.place) for thing in world.see(picture))


def test_a_build_writes_a_folder_that_the_trainers_renderer_loads(tmp_path, monkeypatch):
    shutil.copytree(build.WEIGHTS / "flux" / "vae", tmp_path / "flux" / "vae")
    monkeypatch.setattr(second, "WEIGHTS", tmp_path)
    monkeypatch.setattr(fit, "CACHE", tmp_path / "cache")
    second.build_sd3(text_steps=1, steps=1, batch=2, pool=100)
    (picture,) = build.renderer(sdmodel_name=tmp_path / "sd3", guidance=second.GUIDANCE)(
        ["a red circle at the center"], [0]
    )
    assert picture.size == (world.SIZE, world.SIZE)
