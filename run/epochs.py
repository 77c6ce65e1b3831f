"""The order of the prompts as a pure function of seed and epoch.

TRL's `RepeatSampler` draws each epoch's order from one generator that starts anew with the process, so a run continued
in its second epoch would meet the first epoch's order again.
"""

from __future__ import annotations

import math

from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler


class EpochOrder(TrainerCallback):
    """Seeds a shuffling `sampler` with its seed + the epoch whenever one begins; epoch 0 is TRL's own order."""

    def __init__(self, sampler: RepeatSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler.shuffle:
            epoch = math.floor(state.epoch + 1e-6)
            self.sampler.generator.manual_seed(self.sampler.seed + epoch)
