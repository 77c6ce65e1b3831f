"""Options of one run: the recipe's YAML < `--config` YAML < flags, for every trainer of the house.

An unknown key or flag is an error that names the nearest valid one. Our own names stand where TRL's would be set twice
(`--outdir` for `output_dir`, `--gpt_path` for `model_name_or_path`, `--resume` for `resume_from_checkpoint`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import logging
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import datasets
import diffusers
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
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

COMPARED = {
    "least": (operator.ge, "{} or more"), "above": (operator.gt, "above {}"),
    "most": (operator.le, "at most {}"), "below": (operator.lt, "below {}"),
}  # fmt: skip
UNIONS = (Union, UnionType)
NUMBERS = {"int": "a whole number", "float": "a finite number"}
SHARE = {"least": 0, "most": 1}
SEED = {"least": 0, "most": 2**32 - 1}  # NumPy's range
EXTRAS = {"vllm": "vllm", "torchao": "quantize", "bitsandbytes": "quantize", "ray": "serve"}  # of pyproject.toml
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
LOGGERS = {name: name for name in INTEGRATION_TO_CALLBACK if name not in ("azure_ml", "flyte", "kubeflow")}
# TRL's and transformers' options whose bad values they would find late, in a traceback or not at all.
THEIRS: dict[str, dict[str, Any]] = {
    name: allowed
    for names, allowed in [
        ("seed data_seed", SEED),
        ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps generation_batch_size "
         "steps_per_generation num_iterations max_completion_length max_length save_total_limit ddp_timeout lora_r "
         "lora_alpha num_generations_eval vllm_tensor_parallel_size vllm_max_model_length", {"least": 1}),
        ("num_generations", {"least": 2}),  # a completion is compared with others of its group
        ("max_steps", {"least": -1}),
        ("num_train_epochs temperature repetition_penalty logging_steps save_steps eval_steps vllm_server_timeout",
         {"above": 0}),
        ("learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps beta epsilon epsilon_high top_k "
         "dataloader_num_workers", {"least": 0}),
        ("adam_beta1 adam_beta2 lora_dropout label_smoothing_factor", {"least": 0, "below": 1}),
        ("top_p vllm_gpu_memory_utilization top_entropy_quantile", {"above": 0, "most": 1}),
        ("min_p", SHARE),
        ("vllm_server_port vllm_group_port", {"least": 1, "most": 65535}),
        ("loss_type", {"choices": "grpo bnpo dr_grpo dapo luspo cispo sapo vespo nll dft".split()}),
        ("importance_sampling_level", {"choices": ["token", "sequence"]}),
        ("multi_objective_aggregation", {"choices": ["sum_then_normalize", "normalize_then_sum"]}),
        ("vllm_mode", {"choices": ["colocate", "server"]}),
        ("use_vllm", {"needs": {True: "vllm"}}), ("use_liger_kernel", {"needs": {True: "liger_kernel"}}),
        ("load_in_4bit load_in_8bit", {"needs": {True: "bitsandbytes"}}),
        ("optim", {"needs": {o: "bitsandbytes" for o in OptimizerNames if re.search("bnb|_8bit|paged|lion", o)}}),
        ("attn_implementation", {"needs": FLASH}),
        ("report_to", {"nargs": "+", "choices": [*INTEGRATION_TO_CALLBACK, "all", "none"], "needs": LOGGERS}),
    ]
    for name in names.split()
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
        argparse_options: `choices`, `nargs`, `const`; or `words`, `reads`, `needs` and limits as `_reader` has them.
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
    """TRL's parser, with every complaint as a `UserError`, and with a range for every number."""

    def add_argument(self, *names: str, changes: str = "", where: str = "", **kwargs: Any) -> argparse.Action:
        kwargs |= THEIRS.get(names[0].removeprefix("--"), {}) if not changes else {}
        own = {name: kwargs.pop(name) for name in ("words", "reads", "needs", *COMPARED) if name in kwargs}
        if "type" in kwargs:
            kwargs["type"] = _reader(names[0], kwargs["type"], blank=kwargs.get("default") == "", **own)
        if kwargs.get("const") is True:
            kwargs["const"] = "true"  # argparse reads a text as if it had been given
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _reader(
    flag: str,
    kind: Callable[[str], Any],
    *,
    blank: bool,
    words: Sequence[str] = (),
    reads: Callable[[str], Any] | None = None,
    needs: Mapping[Any, str] = MappingProxyType({}),
    **limits: float,
) -> Callable[[str], Any]:
    """What reads a value of `flag`, text -> value; UserError for a bad one.

    `kind` is the field's own type, and `reads` goes before it; a float must be finite, and within `limits` (COMPARED).
    `words` stand for themselves beside whole numbers, blanks alone where `blank`. `needs` maps a value to the import
    name of the package without which it cannot be had.
    """
    kind = reads or (int if words else kind)
    wanted = [NUMBERS.get(kind.__name__, "another"), *(COMPARED[name][1].format(n) for name, n in limits.items())]

    def read(text: str) -> Any:
        if text in words:
            return text
        try:
            value = kind(text)
            fits = (blank or text.strip()) and not (isinstance(value, float) and not math.isfinite(value))
            fits = fits and (value is None or all(COMPARED[name][0](value, n) for name, n in limits.items()))
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            raise UserError(f"{flag} {text!r}: give {', '.join(wanted)}{''.join(f', or {word}' for word in words)}")
        if value in needs:
            need(needs[value], f"{flag} {text}")
        return value

    return read


def need(package: str, asker: str) -> None:
    """Raise UserError unless the package of that import name is installed; `asker` needs it."""
    if importlib.util.find_spec(package) is None:
        wanted = f"-r pyproject.toml --extra {EXTRAS[package]}" if package in EXTRAS else package
        raise UserError(f"{asker} needs {package}, which is not installed: uv pip install {wanted}")


def device(text: str) -> str:
    """The name of a device of torch's; ValueError if it is none. Whether there is one is asked when it is used."""
    try:
        return text if text == "auto" else str(torch.device(text))
    except RuntimeError as error:
        raise ValueError(text) from error


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
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    given: dict[str, list[str]] = {}
    for path in (recipe, config_path(argv)):
        if path is not None:
            _read_yaml(Path(path), parser, hints, given)
    words = [word for option in given.values() for word in option]
    try:
        *filled, _, unknown = parser.parse_args_into_dataclasses(
            args=[*words, *argv], return_remaining_strings=True, look_for_args_file=False
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
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:  # a path of the user's
        print(f"{program}: error: {error}: name another path", file=sys.stderr, flush=True)
        return 2


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


def _read_yaml(path: Path, parser: _Parser, hints: Mapping[str, Any], given: dict[str, list[str]]) -> None:
    """Add the options of a YAML to `given`, key -> words of a command line, so that flags and YAML are read alike.

    Values that no word can say (null, an empty list, a mapping) become the parser's defaults.
    """
    options = read_yaml(path)
    actions = {action.dest: action for action in parser._actions if not action.option_strings[0].startswith("--no_")}
    for key, value in options.items():
        if key not in actions:
            raise UserError(f"unknown key {key!r} in {path}, did you mean {_nearest(str(key), list(actions))!r}?")
        hint = hints.get(key, str)
        kinds = {get_origin(one) or one for one in (get_args(hint) if get_origin(hint) in UNIONS else (hint,))}
        several, is_list = actions[key].nargs == "+", isinstance(value, list) and list in kinds
        values, allowed = (value, set()) if is_list else ([value], kinds)
        if odd := [one for one in values if isinstance(one, list | dict | bool | None) and type(one) not in allowed]:
            raise UserError(f"{key} in {path} cannot be {odd[0]!r}: see --help, and put words such as no in quotes")
        texts = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
        given.pop(key, None)
        if value is None or value == [] or isinstance(value, dict) or (is_list and not several):
            parser.set_defaults(**{key: value})
        else:
            given[key] = [f"--{key}", *texts] if several else [f"--{key}={texts[0]}"]


def _nearest(word: str, known: list[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
