#!/usr/bin/env bash
# Whether the pictures of a group start from common noise, with a path and without. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$flow"
ablate flow_noise \
  --variant "own:" \
  --variant "common: --init_noise common" \
  --variant "grpo_own: $path" \
  --variant "grpo_common: $path --init_noise common" \
  -- "${short_flow[@]}" "$@"
