"""Load the policy (the language model that rewrites) and its tokenizer.

`path` is a folder of a model in Hugging Face format, the folder of a PEFT adapter, or a hub name (see `models.hub`). A
model that is on this disk is never looked up on the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from errors import UserError, one_line
from models.hub import READ, base_of, is_adapter, read, resolve
from models.weights import locked

DTYPES = ("auto", "bfloat16", "float32")


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
    tokenizer = read(AutoTokenizer, folder, padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {source!r} has no chat template; name an instruct model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(path: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """The policy at `path`, in eval mode; an adapter comes as a PeftModel around its base model.

    Args:
        dtype: one of DTYPES; "auto" is bfloat16 on a GPU that has it, else float32.
        device: "auto" is the GPU if there is one.

    Raises:
        UserError: nothing at `path`, unreadable weights, an unknown dtype, or a GPU named where there is none.
    """
    device = pick_device(device)
    options = {"dtype": pick_dtype(dtype, device), "use_safetensors": True}
    if is_adapter(path):
        policy = _adapted(path, None, options)
    else:
        policy = read(AutoModelForCausalLM, _folder(path), **options)
    return policy.to(device).eval()


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
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has no weights in safetensors: name the folder of a whole model")
        return str(folder)
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
    base = read(AutoModelForCausalLM, _folder(*base_of(path, revision)), **options)
    try:
        return PeftModel.from_pretrained(base, str(_folder(path)), **more)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot read {path} as an adapter ({one_line(error)}): name another folder") from error


def pick_device(device: str) -> str:
    """`device`, or for "auto" the GPU if there is one, else "cpu". UserError if one is named that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is asked for and no GPU is to be seen; use cpu")
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """`dtype`, or for "auto" "bfloat16" on a GPU that has it, else "float32". UserError if it is not in DTYPES."""
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def _folder(path: str, revision: str | None = None) -> Path:
    """The folder of the model or adapter at `path`, downloaded if it must be; see `hub.resolve`."""
    needs = ("adapter_config.json",) if is_adapter(path) else ("config.json",)
    return resolve(path, needs, revision=revision, download=_download)


def _download(repo: str, revision: str | None) -> str:
    return snapshot_download(repo, revision=revision, allow_patterns=locked(repo).include or READ)
