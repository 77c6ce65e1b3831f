#!/usr/bin/env bash
# How pictures are spent: one (base), two or four of each rewrite at equal rendering cost, so of half and a quarter of
# the prompts; and each member of a group drawn from noise of its own. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
ablate pictures \
  --variant "base:" \
  --variant "images_2: --images_per_rewrite 2 --per_device_train_batch_size 32" \
  --variant "images_4: --images_per_rewrite 4 --per_device_train_batch_size 16" \
  --variant "own_noise: --common_seeds false" \
  -- "${short[@]}" "$@"
