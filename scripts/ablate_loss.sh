#!/usr/bin/env bash
# The loss: DAPO (base), Dr. GRPO, and GSPO's sequence-level ratio with the loss that goes with it. With one optimiser
# step a generation all ratios are 1, and what differs is how tokens and sequences are weighed.
# On GPUs with a LAUNCH as in scripts/ablate_rewards.sh, steps and batch of your own given.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
ablate loss \
  --variant "base:" \
  --variant "dr_grpo: --loss_type dr_grpo" \
  --variant "sequence: --loss_type grpo --importance_sampling_level sequence" \
  -- "${short[@]}" "$@"
