"""Load frozen models whole although a trainer is configured already (contract 6: the frozen stay frozen)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def without_zero3_init() -> Iterator[None]:
    """Load whole weights although a trainer is configured already.

    While ZeRO-3 is registered transformers builds text encoders as empty shards; with FSDP's RAM-efficient loading
    every rank but the first gets placeholders. Both switches are process-global, so both are put back afterwards.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref  # there is no public getter of the object, only of its dict
    zero = reference() if reference is not None else None
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if zero is not None:
            deepspeed.set_hf_deepspeed_config(zero)
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp
