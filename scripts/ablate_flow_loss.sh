#!/usr/bin/env bash
# The loss of the image model: two over finished pictures, three over denoising steps. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$flow"
ablate flow_loss \
  --variant "nft:" \
  --variant "awm: --loss awm --advantage_clip 1" \
  --variant "grpo: $path" \
  --variant "guard: $path --loss guard" \
  --variant "dppo: $path --loss dppo" \
  -- "${short_flow[@]}" "$@"
