"""Claims that only a GPU can test: real memory, real kernels. Without one they are left out, and the suite says so."""

from __future__ import annotations

import pytest
import torch

from miniature import build as miniature
from rendering import RenderOptions, load_renderer
from rendering.levers import MAX_PIXEL_DIFFERENCE, smallest_good_batch, text_encoders
from scripts import bench_gpu
from tests.test_levers import SMALL, TEXTS, most

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def renderer(**changes):
    return miniature.renderer(**{**SMALL, "render_device": "cuda", **changes})


def drawn(**changes) -> list:
    return renderer(**changes)(TEXTS, range(len(TEXTS)))


def test_text_encoders_leave_the_device_and_draw_the_same():
    away = renderer(render_offload_text=True)
    assert most(away(TEXTS, range(9)), drawn()) == 0
    assert {parameter.device.type for part in text_encoders(away.pipe) for parameter in part.parameters()} == {"cpu"}
    assert most(away(TEXTS, range(9)), drawn()) == 0  # and come back


def test_a_row_draws_the_same_alone_and_in_a_batch():
    one = renderer()
    together = one(TEXTS, range(9))
    assert all(most(one([TEXTS[i]], [i]), [together[i]]) == 0 for i in range(9))


def test_compiled_blocks_stay_near_in_float32():
    assert (
        most(drawn(render_compile=True, render_dtype="float32"), drawn(render_dtype="float32"))
        <= 2 * MAX_PIXEL_DIFFERENCE
    )


@pytest.mark.parametrize("name", ["_native_cudnn", "_native_efficient", "_native_flash"])
def test_attention_kernels_draw_and_a_row_stays_itself(name):
    one = renderer(render_attention=name)
    together = one(TEXTS, range(9))
    assert None not in together and most(one([TEXTS[3]], [3]), [together[3]]) == 0


def test_a_batch_that_takes_more_than_half_of_what_is_free_is_not_tried_further():
    options = RenderOptions(resolution=48, render_steps=1, max_sequence_length=32, render_batch_size=1)
    one = load_renderer(options, "cuda", pipe=bench_gpu.TINY.pipe(GPU))
    assert one.trial(2, share=1e-9) is None
    assert smallest_good_batch(one.trial) >= 1


def test_the_bench_measures_memory():
    found = bench_gpu.bench_gpu(bench_gpu.TINY, 2, GPU)
    assert all("skipped" in row or row["peak_gb"] > 0 for row in found["rows"])
