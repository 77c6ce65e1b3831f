"""Which noise a picture starts from: a pure function of run, prompt, step and image index (contract 3).

Not of rank, batch position or any global generator, so the members of a group share their noise, a resumed run draws
what the uninterrupted one would have drawn, and two machines agree.
"""

from __future__ import annotations

import hashlib

SEED_BITS = 63  # torch.Generator.manual_seed takes a signed 64-bit number


def render_seed(run_seed: int, prompt_id: str, step: int, image_index: int) -> int:
    """Seed of picture `image_index` of every rewrite of one prompt at one step, in [0, 2**63).

    Args:
        run_seed: the run's `--seed`.
        prompt_id: `Prompt.id`.
        step: number of the optimiser step that the rollouts feed, from 1, as in `metrics.jsonl`.
        image_index: 0 .. images_per_rewrite - 1.
    """
    key = f"{run_seed}/{prompt_id}/{step}/{image_index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> (64 - SEED_BITS)
