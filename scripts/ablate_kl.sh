#!/usr/bin/env bash
# KL from the cold start: none (base), 0.01, 0.04 (TRL's former default).
# On GPUs with a LAUNCH as in scripts/ablate_rewards.sh, steps and batch of your own given.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
ablate kl \
  --variant "base:" \
  --variant "kl_0.01: --beta 0.01" \
  --variant "kl_0.04: --beta 0.04" \
  -- "${short[@]}" "$@"
