"""Options of one run: the recipe's YAML < `--config` YAML < flags, for every trainer of the house.

An unknown key or flag is an error that names the nearest valid one. Our own names stand where TRL's would be set twice
(`--outdir` for `output_dir`, `--gpt_path` for `model_name_or_path`, `--resume` for `resume_from_checkpoint`).
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import diffusers
import torch
from transformers import TrainingArguments
from transformers.utils.logging import set_tqdm_hook
from trl import ModelConfig, TrlParser

from data.text import read_yaml
from errors import Stopped, UserError
from report.terminal import print_anywhere

CHANGES = ("nothing", "pictures", "run")
WHERE = ("client", "drawer")

# TRL's and transformers' options that change nothing of what is learnt: where a run writes, how often, and how fast.
# All others of theirs change the run.
CHANGES_NOTHING = {
    "output_dir", "resume_from_checkpoint", "logging_dir", "report_to", "disable_tqdm", "save_total_limit",
    "log_level", "ddp_timeout", "dataloader_num_workers", "vllm_server_base_url", "vllm_server_timeout",
}  # fmt: skip


def option(
    default: Any = MISSING, help: str = "", *, changes: str, where: str = "client", **argparse_options: Any
) -> Any:
    """A dataclass field that is a flag of a program and a key of its YAML files.

    Args:
        default: none makes it required; a list is copied for each instance.
        help: what `--help` shows.
        changes: what another value changes when something is continued. "nothing": how fast, where, or how much is
            written; such options may differ. "pictures": what is drawn from a text; rewrites stay valid, pictures do
            not. "run": everything else.
        where: "drawer": an option of the machine that draws, not asked of a render server. "client": all others.
        argparse_options: `choices`, `nargs`, `const`.
    """
    if changes not in CHANGES or where not in WHERE:
        raise ValueError(f"changes {changes!r}, where {where!r}: give one of {CHANGES} and of {WHERE}")
    metadata = {"help": help, "changes": changes, "where": where, **argparse_options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def changed_by(one: Field) -> str:
    """What another value of an option changes, one of CHANGES; CHANGES_NOTHING says it for TRL's own options."""
    return one.metadata.get("changes") or ("nothing" if one.name in CHANGES_NOTHING else "run")


def may_differ(*options: Any, changes: Sequence[str] = ("nothing",)) -> set[str]:
    """Names of the options, in dataclasses or instances of them, that may differ when something is continued.

    Args:
        changes: which kinds may; ("nothing", "pictures") for what holds rewrites alone.
    """
    return {one.name for kind in options for one in fields(kind) if changed_by(one) in changes}


def resume_option() -> Any:
    """The field of --resume."""
    return option(
        None,
        "Continue this run: auto (or nothing) from its newest good checkpoint, from the beginning if it has none; "
        "checkpoint-N from that one.",
        changes="nothing",
        nargs="?",
        const="auto",
    )


def template_option() -> Any:
    """The field of --chat_template_kwargs; GRPO's is TRL's own."""
    return option(
        None,
        "Variables of the policy's chat template, as JSON; a trained policy's template has them set already.",
        changes="run",
    )


OURS = {"output_dir": "outdir", "model_name_or_path": "gpt_path", "resume_from_checkpoint": "resume"}


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of options; it states only what differs from the defaults.")
    return parser


class _Parser(TrlParser):
    """TRL's parser, with every complaint as a `UserError`."""

    def add_argument(self, *names: str, changes: str = "", where: str = "", **kwargs: Any) -> argparse.Action:
        return super().add_argument(*names, **kwargs)  # an option's own metadata is not argparse's

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(kinds: Sequence[type], recipe: Path | None, argv: Sequence[str]) -> tuple[Any, ...]:
    """One filled dataclass per kind, in their order.

    Args:
        kinds: dataclasses; ours have other field names than TRL's.
        recipe: a YAML that is always read first, None for none.
        argv: the command line without the program's name.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a missing or ill-typed value.
    """
    parser = _Parser(tuple(kinds), parents=[_config_parser()], allow_abbrev=False)
    if "use_cpu" in {action.dest for action in parser._actions}:
        parser.set_defaults(use_cpu=not torch.cuda.is_available())
    for path in (recipe, config_path(argv)):
        if path is not None:
            parser.set_defaults_with_config(**_defaults(Path(path), parser))
    try:
        *filled, _, unknown = parser.parse_args_into_dataclasses(
            args=list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # TRL and transformers check values against each other while they build their config
        raise UserError(str(error)) from error
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]!r}, did you mean {_nearest(unknown[0], flags)!r}?")
    return tuple(filled)


def config_path(argv: Sequence[str]) -> str | None:
    """What `--config` names."""
    return _config_parser().parse_known_args(argv)[0].config


def parse_known(kinds: Sequence[type], argv: Sequence[str], **about: str) -> tuple[Any, ...]:
    """One filled dataclass per kind, and then the list of the words that are flags of another program.

    Args:
        about: argparse's `prog`, `epilog`.

    Raises:
        UserError: an ill-typed value.
    """
    parser = _Parser(tuple(kinds), allow_abbrev=False, **about)
    return parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True, look_for_args_file=False)


def run_main(program: str, work: Callable[[], int | None]) -> int:
    """Run a program's work; returns its exit code: 0 (or what `work` returns), 2 for a UserError, 1 for a Stopped.

    The first process of a launch prints an error, in one line on stderr. Bars of loading are for slow loading only,
    because a dozen of them hides what a log says.
    """
    print_anywhere()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "delay": 10}))  # seconds until one is shown
    diffusers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds out the same, and warns
    try:
        return work() or 0
    except (UserError, Stopped) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1


def set_renamed(outdir: str, gpt_path: str, training: TrainingArguments, model: ModelConfig) -> None:
    """Give TRL what our own flags say in its place, and the policy's loading options.

    Raises:
        UserError: one of TRL's own names was given, or foreign code is to be trusted at no particular commit.
    """
    unused = {"output_dir": training.output_dir, "resume_from_checkpoint": training.resume_from_checkpoint}
    for name, value in {**unused, "model_name_or_path": model.model_name_or_path}.items():
        if value not in (None, "trainer_output"):  # transformers' own default for output_dir
            raise UserError(f"--{name} {value} is set with --{OURS[name]} here")
    if training.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.model_revision):
        raise UserError(
            f"--trust_remote_code runs whatever Python code {gpt_path} has at --model_revision "
            f"{model.model_revision}: read that code, and give the full commit (40 hex digits) that you have read"
        )
    training.output_dir, model.model_name_or_path = outdir, gpt_path
    training.model_init_kwargs = {
        **(training.model_init_kwargs or {}),
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
    }


def _defaults(path: Path, parser: TrlParser) -> dict[str, Any]:
    options = read_yaml(path)
    actions = {action.dest: action for action in parser._actions}
    for key, value in options.items():
        if key not in actions:
            raise UserError(f"unknown key {key!r} in {path}, did you mean {_nearest(str(key), list(actions))!r}?")
        if actions[key].nargs == "+" and not isinstance(value, list):
            options[key] = [value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            options[key] = str(value)  # argparse checks the type of a default only if it is text
    return options


def _nearest(word: str, known: list[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
