#!/usr/bin/env bash
# The Janus: EG-GRPO's mask and bonus by entropy. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$janus"
ablate janus_entropy \
  --variant "none:" \
  --variant "mask: --entropy_mask 0.2" \
  --variant "mask+bonus: --entropy_mask 0.2 --entropy_bonus 0.5" \
  -- "${short_janus[@]}" "$@"
