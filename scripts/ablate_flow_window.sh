#!/usr/bin/env bash
# Which denoising steps are random and trained. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$flow"
ablate flow_window \
  --variant "all: $path" \
  --variant "first_half: $path --sde_window first_half" \
  --variant "sliding: $path --sde_window sliding" \
  -- "${short_flow[@]}" "$@"
