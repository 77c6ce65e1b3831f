"""Load the policy (the language model that rewrites) and its tokenizer, or say in one line what is missing.

`path` is a folder in Hugging Face format, a PEFT adapter folder (adapter_config.json), or a hub name, which stands for
its folder in the hub's cache at the locked commit (`checkpoints.lock`) or at the user's `revision`. What is on this
disk is never looked up on the network, and nothing is loaded that `models.weights` has not checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from errors import UserError
from models.weights import absent_shards, check_folder, locked

READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.py")  # of a model that is not locked
DTYPES = ("auto", "bfloat16", "float32")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `path` (of its base model for an adapter saved without one), left-padding, with a pad token.

    Args:
        revision: of a hub name, None or "main" for the locked one.
        trust_remote_code: run Python code that comes with it; `run.options` allows it at a full commit only.

    Raises:
        UserError: nothing at `path`, unreadable files, or no chat template.
    """
    source = path
    if is_adapter(path) and not Path(path, "tokenizer_config.json").is_file():
        source, revision = base_of(path, revision)
    folder = _folder(source, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, padding_side="left", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", source, error) from error
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {source!r} has no chat template; name an instruct model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(path: str, dtype: str = "auto", device: str | None = "auto") -> PreTrainedModel:
    """The policy at `path`, in eval mode; an adapter comes as a PeftModel around its base model.

    Args:
        dtype: one of DTYPES; "auto" is bfloat16 on a GPU that has it, else float32.
        device: "auto" is the GPU if there is one; None leaves the weights where loading put them (a trainer's choice).

    Raises:
        UserError: nothing at `path`, unreadable weights, an unknown dtype, or a GPU named where there is none.
    """
    device = pick_device(device) if device else None
    options = {"dtype": pick_dtype(dtype, device), "use_safetensors": True, "local_files_only": True}
    if is_adapter(path):
        policy = _adapted(path, None, options)
    else:
        folder = _folder(path)
        try:
            policy = AutoModelForCausalLM.from_pretrained(folder, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise _cannot_load("policy", path, error) from error
    return (policy if device is None else policy.to(device)).eval()


def prepare_policy(path: str, training: TrainingArguments, use_peft: bool) -> str | PreTrainedModel:
    """What a TRL trainer is to train: the model's folder, which TRL loads, or the adapter at `path`, ready to go on.

    Raises:
        UserError: nothing at `path`, the adapter cannot be loaded, or a second one was asked for.
    """
    safely = {"use_safetensors": True, "trust_remote_code": training.trust_remote_code}
    training.model_init_kwargs = {**training.model_init_kwargs, **safely}
    revision = training.model_init_kwargs["revision"]
    if not is_adapter(path):
        folder = _folder(path, revision)
        if not any(Path(folder).glob("*.safetensors")):
            raise UserError(f"{folder} has no weights in safetensors: name the folder of a whole model")
        return folder
    if use_peft:
        raise UserError(f"{path!r} is an adapter, which is trained on as it is: leave --use_peft out")
    options, training.model_init_kwargs = training.model_init_kwargs, None  # TRL's are for a path
    return _adapted(path, revision, options, is_trainable=True)


def record_base_model(model: PreTrainedModel, path: str, revision: str) -> None:
    """Let an adapter that is trained on a hub model name the hub's model, not its folder in this machine's cache."""
    if isinstance(model, PeftModel) and not is_adapter(path):
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = path, None if revision == "main" else revision


def _adapted(path: str, revision: str | None, options: dict[str, Any], **more: bool) -> PeftModel:
    """The adapter at `path` around its base model."""
    base, adapter = _folder(*base_of(path, revision)), _folder(path)
    try:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), adapter, **more)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("policy", path, error) from error


def pick_device(device: str) -> str:
    """`device`, or for "auto" the GPU if there is one, else "cpu". UserError if one is named that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is asked for and no GPU is to be seen; use cpu")
    return device


def pick_dtype(dtype: str, device: str | None) -> str:
    """`dtype`, or for "auto" "bfloat16" on a GPU that has it, else "float32". UserError if it is not in DTYPES."""
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"


def is_adapter(path: str) -> bool:
    """Whether `path` is the folder of a PEFT adapter."""
    return Path(path, "adapter_config.json").is_file()


def base_of(path: str, revision: str | None) -> tuple[str, str | None]:
    """The base model of the adapter at `path`, and its revision: the user's, else the adapter's."""
    try:
        config = PeftConfig.from_pretrained(path)
        return config.base_model_name_or_path, config.revision if revision in (None, "main") else revision
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"bad adapter_config.json in {path!r}: {_one_line(error)}; save it again") from error


def _folder(path: str, revision: str | None = None) -> str:
    """The folder of the model at `path`, checked: `path` itself, or that of a hub name, downloaded if it must be.

    Raises:
        UserError: there is none, or its weights are damaged, unsafe or not those that are locked.
    """
    if Path(path).is_dir():
        if not Path(path, "config.json").is_file() and not is_adapter(path):
            raise UserError(f"no model in folder {path!r}: config.json is missing; name the folder that holds it")
        folder = path
    elif not _HUB_NAME.fullmatch(path):
        raise UserError(f"no model at {path!r}: no such folder, and not a hub name (owner/name)")
    else:
        folder = _from_hub(path, locked(path).revision if revision in (None, "main") else revision)
    check_folder(Path(folder))
    return folder


def _from_hub(repo: str, revision: str | None) -> str:
    """The folder of `repo` in the hub's cache; what is missing there is downloaded."""
    known = locked(repo)
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str):
        folder = Path(cached).parent
        if any(folder.glob("*.safetensors")) and not absent_shards(folder):
            return str(folder)
    try:
        HfApi().model_info(repo, revision=revision, timeout=10)  # at once, instead of five attempts for each file
        return snapshot_download(repo, revision=revision, allow_patterns=known.include or READ)
    except (OSError, httpx.HTTPError) as error:
        raise UserError(
            f"no model {_named(repo)}: no such folder, not in the Hugging Face cache, and the hub does not give it "
            f"({_one_line(error)}); where there is a network: {known.command}"
        ) from error


def _cannot_load(what: str, path: str, error: Exception) -> UserError:
    hint = "name another folder" if Path(path).is_dir() else locked(path).command
    return UserError(f"cannot load the {what} of {_named(path)}: {_one_line(error)}; {hint}")


def _named(path: str) -> str:
    known = locked(path)
    return f"{path!r} ({known.size}, {known.licence})" if known.size else repr(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
