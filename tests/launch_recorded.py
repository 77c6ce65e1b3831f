"""A launched program that notes its options in a file and leaves an empty run: `launch_recorded.py FILE ...`."""

import json
import sys
from pathlib import Path

with open(sys.argv[1], "a", encoding="utf-8") as file:
    file.write(json.dumps(sys.argv[2:]) + "\n")
run = Path(sys.argv[sys.argv.index("--outdir") + 1])
run.mkdir()
(run / "metrics.jsonl").touch()
