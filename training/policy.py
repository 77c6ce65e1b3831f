"""Load the policy (the language model that rewrites) and its tokenizer, or say in one line what is missing.

`path` is a folder in Hugging Face format, a PEFT adapter folder (adapter_config.json), or a hub name. What is on this
disk is never looked up on the network.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

SIZE_AND_LICENCE = {
    "Qwen/Qwen2.5-3B-Instruct": "6.2 GB, Qwen Research License",
    "Qwen/Qwen2.5-7B-Instruct": "15 GB, Apache-2.0",
}
DTYPES = ("auto", "bfloat16", "float32")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class PolicyError(RuntimeError):
    """The policy cannot be loaded; the message is one line and says what to do."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path` (of its base model for an adapter saved without one), left-padding, with a pad token.

    Raises:
        PolicyError: nothing at `path`, unreadable files, or no chat template.
    """
    source = path
    if _is_adapter(path) and not Path(path, "tokenizer_config.json").is_file():
        source = _base_of(path)
    on_disk = _check(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=on_disk, padding_side="left")
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", source, error) from error
    if tokenizer.chat_template is None:
        raise PolicyError(f"the tokenizer of {source!r} has no chat template; name an instruct model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(path: str, dtype: str = "auto", device: str | None = "auto") -> PreTrainedModel:
    """The policy at `path`, in eval mode; an adapter comes as a PeftModel around its base model.

    Args:
        dtype: one of DTYPES; "auto" is bfloat16 on a GPU that has it, else float32.
        device: "auto" is the GPU if there is one; None leaves the weights where loading put them (a trainer's choice).

    Raises:
        PolicyError: nothing at `path`, unreadable weights, an unknown dtype, or a GPU named where there is none.
    """
    device = pick_device(device) if device else None
    adapter = _is_adapter(path)
    source = _base_of(path) if adapter else path
    on_disk = _check(source)
    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    try:
        policy = loader.from_pretrained(path, dtype=pick_dtype(dtype, device), local_files_only=on_disk)
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_load("policy", source, error) from error
    return (policy if device is None else policy.to(device)).eval()


def trainee(path: str, training: TrainingArguments, use_peft: bool) -> str | PreTrainedModel:
    """What a TRL trainer is to train: `path` itself, which TRL loads, or the adapter at `path`, ready to go on.

    Raises:
        PolicyError: the adapter cannot be loaded, or a second one was asked for.
    """
    if not _is_adapter(path):
        return path
    if use_peft:
        raise PolicyError(f"{path!r} is an adapter, which is trained on as it is: leave --use_peft out")
    options, training.model_init_kwargs = training.model_init_kwargs, None  # TRL's are for a path
    try:
        return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_load("policy", path, error) from error


def pick_device(device: str) -> str:
    """`device`, or for "auto" the GPU if there is one, else "cpu". PolicyError if one is named that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PolicyError(f"device {device!r} is asked for and no GPU is to be seen; use cpu")
    return device


def pick_dtype(dtype: str, device: str | None) -> str:
    """`dtype`, or for "auto" "bfloat16" on a GPU that has it, else "float32". PolicyError if it is not in DTYPES."""
    if dtype not in DTYPES:
        raise PolicyError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"


def _is_adapter(path: str) -> bool:
    return Path(path, "adapter_config.json").is_file()


def _base_of(path: str) -> str:
    try:
        return PeftConfig.from_pretrained(path).base_model_name_or_path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"bad adapter_config.json in {path!r}: {_one_line(error)}; save it again") from error


def _check(path: str) -> bool:
    """True if the model at `path` is on this disk, False if the hub has it; PolicyError if neither."""
    if Path(path).is_dir():
        if not Path(path, "config.json").is_file() and not _is_adapter(path):
            raise PolicyError(f"no model in folder {path!r}: config.json is missing; name the folder that holds it")
        return True
    if not _HUB_NAME.fullmatch(path):
        raise PolicyError(f"no model at {path!r}: no such folder, and not a hub name (owner/name)")
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return True
    try:
        HfApi().model_info(path, timeout=10)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise PolicyError(
            f"no model {_named(path)}: no such folder, not in the Hugging Face cache, and the hub does not give it "
            f"({_one_line(error)}); where there is a network: {_download(path)}"
        ) from error
    return False


def _cannot_load(what: str, path: str, error: Exception) -> PolicyError:
    hint = "name another folder" if Path(path).is_dir() else _download(path)
    return PolicyError(f"cannot load the {what} of {_named(path)}: {_one_line(error)}; {hint}")


def _named(path: str) -> str:
    return f"{path!r} ({SIZE_AND_LICENCE[path]})" if path in SIZE_AND_LICENCE else repr(path)


def _download(path: str) -> str:
    return f"hf download {path}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
