#!/usr/bin/env bash
# Think before rewriting (base), or write the rewrite at once: cold start and RL both with it or both without.
# On the miniature: the cold start here is scripts/cold_start.sh.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
scripts/cold_start.sh "$out/cold_start_direct" 0 --reasoning false
ablate reasoning \
  --variant "base:" \
  --variant "direct: --reasoning false --gpt_path $out/cold_start_direct" \
  -- "${short[@]}" "$@"
