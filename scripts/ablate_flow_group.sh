#!/usr/bin/env bash
# The size of a group, at the same number of pictures. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$flow"
ablate flow_group \
  --variant "16:" \
  --variant "8: --num_generations 8 --prompts_per_step 16" \
  --variant "24: --num_generations 24 --prompts_per_step 4" \
  -- "${short_flow[@]}" "$@"
