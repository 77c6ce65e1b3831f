"""Will this run work? The trainer's own options are checked before the queue, and nothing is written.

    python -m doctor --data data/generation_prompts_1k_filterd.txt --outdir r1_prompter_with_flux \\
        --gpus 8 --gpu_memory 80 [any other flag of the trainer] [--json]
    accelerate launch --config_file=deepspeed_2.yaml -m doctor --data ... --outdir ...

Checks versions, devices, data, batch numbers, checkpoints, disk and judges, estimates the memory, and, where the
weights are on this disk, loads each model and uses it once. Exit code 0: nothing is a problem; 1: something is; 2: the
options cannot be parsed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import transformers
import yaml

import r1_prompter
from doctor.checks import examine, this_machine
from doctor.report import GB
from errors import UserError
from run.options import run_main

DEEPSPEED = Path(__file__).resolve().parent.parent / "deepspeed_2.yaml"
TRAINERS = {"r1_prompter": r1_prompter}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("doctor", lambda: _examine(sys.argv[1:] if argv is None else argv))


def _examine(argv: Sequence[str]) -> int:
    own, flags = _own_options(argv)
    trainer, plan = TRAINERS[own.trainer], this_machine()
    if (own.gpus is None) != (own.gpu_memory is None):
        raise UserError("--gpus and --gpu_memory describe a machine together: give both, or neither for this one")
    if own.gpus is not None:
        plan = replace(plan, gpus=own.gpus, memory=int(own.gpu_memory * GB), here=False)
    if "RANK" in os.environ:  # a launch: its processes and its DeepSpeed plugin are those that the trainer would see
        options = trainer.parse_options(flags)
        plugin = options.training.deepspeed_plugin
        plan = replace(plan, processes=options.training.world_size, zero=plugin.zero_stage if plugin else 0)
    else:
        said = yaml.safe_load(own.config_file) if own.config_file else {}
        processes = own.processes or plan.gpus or said.get("num_processes", 1)
        if processes > 1 and not said:
            said = yaml.safe_load(DEEPSPEED.read_text(encoding="utf-8"))
        plan = replace(plan, processes=processes, zero=said.get("deepspeed_config", {}).get("zero_stage", 0))
        # TRL derives its batch numbers from the number of processes, which is only planned here
        config = type("GRPOConfig", (r1_prompter.GRPOConfig,), {"world_size": property(lambda self: processes)})
        options = trainer.parse_options(flags, config)
    if options.training.process_index:
        return 0  # the main process looks and prints
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    found = examine(trainer, options, plan, own.probe and own.probe == "true")
    data = {"exit_code": found.exit_code, **asdict(found)}
    print(json.dumps(data, indent=2) if own.json else found.as_text(), flush=True)
    return found.exit_code


def _own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The doctor's options, and the flags that are left for the trainer."""
    about = "Will this run work? Takes every flag of the trainer, and these:"
    parser = argparse.ArgumentParser("doctor", description=about, allow_abbrev=False, exit_on_error=False)
    option, open_file = parser.add_argument, argparse.FileType()
    option("--trainer", choices=TRAINERS, default="r1_prompter")
    option("--gpus", type=int, help="plan for this many GPUs; unset: those of this machine")
    option("--gpu_memory", type=float, help="GB of each of them (10^9 bytes)")
    option("--processes", type=int, help="of a launch that is planned; unset: one a GPU, or --config_file's")
    option("--config_file", type=open_file, help="accelerate's; unset: deepspeed_2.yaml for several processes")
    option("--probe", choices=["true", "false"], help="load each model; unset: where weights are here")
    option("--json", action="store_true", help="one JSON object instead of lines")
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
