"""Will this run work? Find out before the queue: the trainer's own options are checked, and nothing is written.

    python -m doctor --data data/generation_prompts_1k_filterd.txt --outdir r1_prompter_with_flux \\
        --gpus 8 --gpu_memory 80 [any other flag of r1_prompter.py] [--json]
    python -m doctor --config configs/miniature.yaml --outdir runs/mine

Looks at versions, devices, data, batch numbers, checkpoints, disk and judge; estimates the memory of each phase, and
says which flags make it fit; where the weights are on this disk, loads each model and uses it once. Exit code 0:
nothing is a problem; 1: something is; 2: the options cannot be parsed. `r1_prompter.py --dry_run true` does the same
from inside a launch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

import r1_prompter
from doctor import checks
from doctor.memory import GB
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Will this run work? Takes every flag of r1_prompter.py, and these:", allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, help="plan for this many GPUs; unset: those of this machine")
    parser.add_argument("--gpu_memory", type=float, help="GB of each of them (10^9 bytes)")
    parser.add_argument("--processes", type=int, help="of the launch; unset: one a GPU, else what --config_file says")
    parser.add_argument(
        "--config_file", type=Path, help="accelerate's; unset: deepspeed_2.yaml for several processes, none for one"
    )
    parser.add_argument("--probe", type=_flag, help="load each model and use it once; unset: where weights are here")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args, trainer = parser.parse_known_args(argv)
    try:
        machine = _machine(args.gpus, args.gpu_memory)
        launch = _launch(args.processes, args.config_file, machine)
        found = checks.examine(
            trainer,
            lambda flags: r1_prompter.parse_options(flags, planned(launch.processes)),
            r1_prompter.plan,
            r1_prompter.all_options,
            machine,
            launch,
            args.probe,
        )
    except UserError as error:
        print(f"doctor: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(checks.as_json(found), indent=2) if args.json else checks.report(found))
    return found.exit_code


def planned(processes: int) -> type[r1_prompter.GRPOConfig]:
    """TRL's options as a launch of so many processes would have them: they count in its batches."""
    return type("GRPOConfig", (r1_prompter.GRPOConfig,), {"world_size": property(lambda self: processes)})


def _flag(word: str) -> bool:
    if word.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() in TRUE


def _machine(gpus: int | None, memory: float | None) -> checks.Machine:
    here = checks.this_machine()
    if gpus is None and memory is None:
        return here
    if gpus is not None and gpus < 0 or memory is not None and memory <= 0:
        raise UserError(f"--gpus {gpus} --gpu_memory {memory}: give a number of GPUs and the GB of each")
    if gpus == 0:
        return replace(here, gpus=0, memory=None)
    room = int(memory * GB) if memory is not None else here.memory
    if room is None:
        raise UserError(f"--gpus {gpus} and no GPU here to look at: give --gpu_memory too, the GB of each")
    return replace(here, gpus=gpus or max(here.gpus, 1), memory=room, here=False)


def _launch(processes: int | None, config: Path | None, machine: checks.Machine) -> checks.Launch:
    if config is None and (processes or machine.gpus) > 1:
        config = ROOT / "deepspeed_2.yaml"
    said = {}
    if config is not None:
        try:
            said = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--config_file {config} cannot be read ({error})") from error
    count = processes or machine.gpus or said.get("num_processes", 1)
    if count < 1:
        raise UserError(f"--processes {count}: give at least 1")
    zero = said.get("deepspeed_config", {}).get("zero_stage", 0)
    return checks.Launch(count, zero, machine.gpus > 0)


if __name__ == "__main__":
    sys.exit(main())
