#!/usr/bin/env bash
# The Janus: the penalty for leaving the untrained weights. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$janus"
ablate janus_kl \
  --variant "none:" \
  --variant "0.01: --beta 0.01" \
  -- "${short_janus[@]}" "$@"
