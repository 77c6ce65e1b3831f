"""One of two processes that settle a batch size: each finds another. Run by test_levers.py."""

import sys
from pathlib import Path

from accelerate import PartialState

from rendering import RenderOptions, levers

state = PartialState(cpu=True)
rank = state.process_index
levers.smallest_good_batch = lambda trial: (4, 2)[rank]
renderer = RenderOptions(sys.argv[1], render_batch_size="auto").load("cpu", measuring=True)
settled = levers.choose_batch_size(renderer, "auto")
Path(sys.argv[2], str(rank)).write_text(f"{settled} {renderer.chunk_size}")
state.wait_for_everyone()
state.destroy_process_group()  # or its threads may outlive the interpreter, which aborts
