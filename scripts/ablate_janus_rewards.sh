#!/usr/bin/env bash
# The Janus: rewards H, D, V, O and what T2I-R1 combines of them. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$janus"
ablate janus_rewards \
  --variant "h: --rewards hps" \
  --variant "d: --rewards gdino" \
  --variant "v: --rewards git" \
  --variant "o: --rewards orm" \
  --variant "hd: --rewards hps gdino" \
  --variant "hdv: --rewards hps gdino git" \
  --variant "hdvo: --rewards hps gdino git orm" \
  -- "${short_janus[@]}" "$@"
