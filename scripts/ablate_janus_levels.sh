#!/usr/bin/env bash
# The Janus: what learns: written plans, image tokens, or both. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$janus"
ablate janus_levels \
  --variant "both:" \
  --variant "plan: --levels plan" \
  --variant "tokens: --levels tokens" \
  -- "${short_janus[@]}" "$@"
