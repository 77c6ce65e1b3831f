"""What tests do with real processes: run one, kill one when it has come so far, launch two under DeepSpeed."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # DeepSpeed compiles a helper once per environment; a build that another one's left locked would be waited for
    "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",
}
ZERO_2 = ROOT / "configs" / "deepspeed_2_cpu.yaml"


def closed_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@functools.cache
def _nursery() -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests" / "nursery.py")]
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_forked(
    *words: object, cwd: Path = ROOT, environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess:
    """A program and its options in a process of their own, whose imports are done (tests/nursery.py)."""
    command = list(map(str, words))
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        asked = json.dumps([command, str(cwd), dict(environment), out.name, err.name])
        print(asked, file=_nursery().stdin, flush=True)
        code = int(_nursery().stdout.readline())
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def kill_when(ready: Callable[[], bool], command: Sequence[str]) -> None:
    """Start `command` and send it SIGKILL as soon as `ready()`; it must not have ended before."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < until and not ready():
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def launcher(program: Path | str, *options: object, config: Path = ZERO_2, module: bool = False) -> list[str]:
    """The command line of `accelerate launch` for `program`, a file or a module, as `config` says, on a free port."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(closed_port())]
    kind = ["-m"] if module else []
    return [*command, "--config_file", str(config), *kind, str(program), *map(str, options)]


def launch(program: Path, *options: object, config: Path = ZERO_2) -> subprocess.CompletedProcess:
    """Run it; fails with what it said if it fails."""
    command = launcher(program, *options, config=config)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(path: Path) -> list[dict]:
    """Of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(outdir: Path) -> tuple:
    """All that a run of a trainer without TRL was, but the times."""
    weights = {str(p.relative_to(outdir)): load_file(p) for p in outdir.glob("[!c]*/**/*.safetensors")}
    weights |= {path.name: load_file(path) for path in outdir.glob("*.safetensors")}
    logged = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows(outdir / "metrics.jsonl")]
    files = sorted((outdir / "rollouts").iterdir()) + sorted((outdir / "evaluations").iterdir())
    return (
        {name: {key: value.tolist() for key, value in part.items()} for name, part in weights.items()},
        logged,
        [path.read_text() for path in files],
    )
