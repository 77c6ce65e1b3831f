"""Claims about quantised renderers, which need the packages of the extra `quantize` (`make test-all` brings them);
those of fp8 also need a GPU. pytest tests/test_quantization.py
"""

from __future__ import annotations

import pytest
import torch

from miniature import build as miniature
from rendering.levers import denoiser_of
from rendering.options import QUANTIZATIONS
from tests.test_levers import SMALL, TEXTS, most

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantised_transformer_keeps_weights_otherwise_draws_nearly_the_same_and_a_row_stays_itself(name):
    if name == "fp8" and DEVICE == "cpu":
        pytest.skip("needs a GPU, for products in fp8")
    plain = miniature.renderer(**SMALL, render_device=DEVICE)
    small = miniature.renderer(**SMALL, render_device=DEVICE, render_quantization=name)
    expected, drawn = plain(TEXTS, range(9)), small(TEXTS, range(9))
    assert None not in drawn and 0 < most(drawn, expected) < 128
    assert most(small([TEXTS[3]], [3]), [drawn[3]]) == 0
    assert _kinds(small) - _kinds(plain)


def _kinds(renderer) -> set[tuple[str, torch.dtype]]:
    """Class and element type of the tensors that the transformer's weights are kept in."""
    weights = [part for name, part in denoiser_of(renderer.pipe).named_parameters() if name.endswith("weight")]
    return {(type(part).__name__, part.dtype) for part in weights}
