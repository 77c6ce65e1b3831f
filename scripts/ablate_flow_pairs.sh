#!/usr/bin/env bash
# The same judge, asked in pairs or for grades: the image model learns from win rates or from pointwise scores. On the
# miniature; start its judge first: python -m miniature.judge_server --port 8080
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$flow"
ablate flow_pairs \
  --variant "pairwise: --rewards preference --reward_weights 1" \
  --variant "pointwise: --rewards judge --reward_weights 1" \
  -- "${short_flow[@]}" "$@"
