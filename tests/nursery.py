"""Run programs without their start, which takes longer than most of them: a fork of this process has all imports done.

Each line of stdin is a run, [words, folder, environment, files for stdout and stderr] in JSON; its exit code is a line
of stdout. Each is a process of its own, of the real program, with real signals; runs share modules and the seed of
hashes, so what must not depend on that seed is shown by programs that start by themselves too.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import sys

codes = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what modules say while they are imported
for name in ("r1_prompter", "rendering.local", "rewards.hps", "sft", "torch.utils.tensorboard", "deepspeed"):
    importlib.import_module(name)
gc.freeze()
for line in iter(sys.stdin.readline, ""):
    words, folder, environment, *written = json.loads(line)
    if not (pid := os.fork()):
        signal.alarm(600)
        for number, path in enumerate([os.devnull, *written]):
            os.dup2(os.open(path, os.O_RDWR), number)
        codes.close()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.reconfigure(encoding=environment.get("PYTHONIOENCODING"))
        is_module = words[0] == "-m"
        sys.argv[:] = words[is_module:]
        start = functools.partial(runpy.run_module, alter_sys=True) if is_module else runpy.run_path
        start(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=codes, flush=True)
