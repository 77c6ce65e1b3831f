#!/usr/bin/env bash
# The Janus: rewards H, D, V, O and what T2I-R1 combines of them. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$janus"
ablate janus_rewards \
  --variant "h: --rewards hps --reward_weights 1" \
  --variant "d: --rewards gdino --reward_weights 1" \
  --variant "v: --rewards git --reward_weights 1" \
  --variant "o: --rewards orm --reward_weights 1" \
  --variant "hd: --rewards hps gdino --reward_weights 1 1" \
  --variant "hdv: --rewards hps gdino git --reward_weights 1 1 1" \
  --variant "hdvo: --reward_weights 1 1 1 1" \
  -- "${short_janus[@]}" "$@"
