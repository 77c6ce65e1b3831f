#!/usr/bin/env bash
# The Janus: log-probabilities of image tokens with guidance 2: of the conditional rows, as published, or of what was sampled. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$janus"
ablate janus_logprob \
  --variant "conditional: --guidance 2" \
  --variant "guided: --guidance 2 --logprob guided" \
  -- "${short_janus[@]}" "$@"
