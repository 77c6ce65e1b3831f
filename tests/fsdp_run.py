"""A trainer (the first word) under FSDP2 on CPUs, where accelerate offers it for GPUs alone: its state is told so."""

import importlib
import sys

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import group_training
from run.loop import make_accelerator

BLOCKS = {"pref_grpo": ["FluxTransformerBlock", "FluxSingleTransformerBlock"], "t2i_r1": ["LlamaDecoderLayer"]}


def with_fsdp(*numbers):
    accelerator = make_accelerator(*numbers)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=BLOCKS[sys.argv[1]], state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    assert accelerator.is_fsdp2
    return accelerator


if __name__ == "__main__":
    group_training.make_accelerator = with_fsdp
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
