#!/usr/bin/env bash
# How rewards become advantages: their weighted sum, in units of the batch's spread (base), or each reward normalised in
# its group before they are summed.
# On GPUs with a LAUNCH as in scripts/ablate_rewards.sh, steps and batch of your own given.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
ablate advantage \
  --variant "base:" \
  --variant "normalize_then_sum: --multi_objective_aggregation normalize_then_sum" \
  -- "${short[@]}" "$@"
