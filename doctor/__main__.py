"""Will this run work? The trainer's own options are checked before the queue, and nothing is written.

    python -m doctor --data data/generation_prompts_1k_filterd.txt --outdir r1_prompter_with_flux \\
        --gpus 8 --gpu_memory 80 [any other flag of the trainer] [--json]
    accelerate launch --config_file=deepspeed_2.yaml -m doctor --data ... --outdir ...

Checks versions, devices, data, batch numbers, checkpoints, disk and judges, estimates the memory, and, where the
weights are on this disk, loads each model and uses it once. Exit code 0: nothing is a problem; 1: something is; 2: the
options cannot be parsed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import r1_prompter
from data.text import read_yaml
from doctor.checks import examine, this_machine
from doctor.report import GB
from errors import UserError
from run.options import option, parse_known, run_main

DEEPSPEED = Path(__file__).resolve().parent.parent / "deepspeed_2.yaml"
OTHERS = "All other options are the trainer's: python r1_prompter.py --help"


@dataclass
class DoctorOptions:
    """The doctor's own options; all others are the trainer's."""

    gpus: int | None = option(
        None, "Plan for this many GPUs; unset: those of this machine.", changes="nothing", least=0
    )
    gpu_memory: float | None = option(None, "GB of each of them (10^9 bytes).", changes="nothing", above=0)
    processes: int | None = option(
        None, "Of a launch that is planned; unset: one a GPU, or --config_file's.", changes="nothing", least=1
    )
    config_file: str | None = option(
        None, "accelerate's; unset: deepspeed_2.yaml for several processes.", changes="nothing"
    )
    probe: bool | None = option(None, "Load each model; unset: where weights are here.", changes="nothing")
    json: bool = option(False, "One JSON object instead of lines.", changes="nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("doctor", lambda: _examine(sys.argv[1:] if argv is None else argv))


def _examine(argv: Sequence[str]) -> int:
    own, flags = parse_known((DoctorOptions,), argv, prog="python -m doctor", epilog=OTHERS)
    trainer, plan = r1_prompter, this_machine()
    if (own.gpus is None) != (own.gpu_memory is None):
        raise UserError("--gpus and --gpu_memory describe a machine together: give both, or neither for this one")
    if own.gpus is not None:
        plan = replace(plan, gpus=own.gpus, memory=int(own.gpu_memory * GB), here=False)
    if "RANK" in os.environ:  # a launch: its processes and its DeepSpeed plugin are those that the trainer would see
        options = trainer.parse_options(flags)
        plugin = options.training.deepspeed_plugin
        plan = replace(plan, processes=options.training.world_size, zero=plugin.zero_stage if plugin else 0)
    else:
        said = read_yaml(own.config_file, "--config_file") if own.config_file else {}
        processes = own.processes or plan.gpus or said.get("num_processes", 1)
        if processes > 1 and not said:
            said = read_yaml(DEEPSPEED)
        plan = replace(plan, processes=processes, zero=said.get("deepspeed_config", {}).get("zero_stage", 0))
        # TRL derives its batch numbers from the number of processes, which is only planned here
        config = type("GRPOConfig", (r1_prompter.GRPOConfig,), {"world_size": property(lambda self: processes)})
        options = trainer.parse_options(flags, config)
    device = "cuda" if plan.gpus and not plan.here else str(options.training.device)
    options.render.settle(device)
    options.reward.settle(options.render.render_device or device)
    if options.training.process_index:
        return 0  # the main process looks and prints
    found = examine(trainer, options, plan, own.probe)
    data = {"exit_code": found.exit_code, **asdict(found)}
    print(json.dumps(data, indent=2) if own.json else found.as_text(), flush=True)
    return found.exit_code


if __name__ == "__main__":
    sys.exit(main())
