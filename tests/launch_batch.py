"""One of two processes that choose a batch size: each finds another. Run by test_levers.py."""

import sys
from pathlib import Path

from accelerate import PartialState

from rendering import RenderOptions, load_renderer, local

state = PartialState(cpu=True)
rank = state.process_index
local.smallest_good_batch = lambda trial: (4, 2)[rank]
renderer = load_renderer(RenderOptions(sys.argv[1], render_batch_size="auto"), "cpu", measuring=True)
chosen = renderer.choose_batch_size()
Path(sys.argv[2], str(rank)).write_text(f"{chosen} {renderer.chunk_size}")
state.wait_for_everyone()
state.destroy_process_group()  # or its threads may outlive the interpreter, which aborts
