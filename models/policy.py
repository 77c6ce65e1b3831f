"""Load the policy (the language model that rewrites) and its tokenizer.

`path` is a folder of a model in Hugging Face format, the folder of a PEFT adapter, or a hub name (see `models.hub`). A
model that is on this disk is never looked up on the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import GRPOConfig

from errors import UserError, one_line
from models.devices import pick_device, pick_dtype
from models.hub import READ, base_of, contents_of, is_adapter, read, resolve
from models.weights import locked
from prompting import completion, messages, opening, parse
from run.files import Contents

Conversation = list[dict[str, str]]


def load_tokenizer(
    path: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template_kwargs: Mapping[str, Any] | str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path` (of its base model for an adapter saved without one), left-padding, with a pad token.

    Args:
        revision: of a hub name, None or "main" for the locked one.
        trust_remote_code: run Python code that comes with it; `run.options` allows it at a full commit only.
        template_kwargs: variables, an object or its JSON; written into the chat template, they are saved with it.

    Raises:
        UserError: nothing at `path`, unreadable files, no chat template, or variables that are no JSON object.
    """
    source = path
    if is_adapter(path) and not Path(path, "tokenizer_config.json").is_file():
        source, revision = base_of(path, revision)
    folder = _folder(source, revision)
    tokenizer = read(AutoTokenizer, folder, padding_side="left", trust_remote_code=trust_remote_code)
    try:
        tokenizer.chat_template = _set_variables(template_kwargs) + tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(f"the tokenizer of {source!r} has no chat template; name an instruct model") from error
    # TRL would let one of these take the think block out of an answer.
    tokenizer.response_template = tokenizer.response_schema = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_variables(template_kwargs: Mapping[str, Any] | str | None) -> str:
    """The Jinja statements that set the variables."""
    try:
        given = json.loads(template_kwargs) if isinstance(template_kwargs, str) else template_kwargs or {}
    except ValueError:
        given = None
    if not isinstance(given, Mapping) or not all(name.isidentifier() for name in given):
        raise UserError(f"--chat_template_kwargs {template_kwargs!r}: give a JSON object, name -> value")
    return "".join(f"{{% set {name} = {value!r} %}}" for name, value in given.items())


class ChatTemplate:
    """How a tokenizer shows a conversation to its policy, found out once, when it is loaded.

    Args:
        reasoning: whether the policy is asked to think first.

    Attributes:
        opening: what the template writes at the head of each answer ("<think>\\n"); it belongs to the answer.

    Raises:
        UserError: the template cannot show a request, opens a think block that is not asked for, or the tokenizer
            loses the tags of an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: bool = True) -> None:
        self.tokenizer, self.reasoning, self.has_system_turn = tokenizer, reasoning, True
        asked = messages("a photo of a red circle", reasoning)
        system, user = (turn["content"] for turn in asked)
        shown = self._show(asked)
        if system not in shown:  # Gemma's refuses a system turn, others pass over it
            self.has_system_turn = False
            shown = self._show(self.fit(asked))
        if lost := [part for part, text in (("instructions", system), ("request", user)) if text not in shown]:
            raise UserError(f"the chat template leaves out {' and '.join(lost)}: {shown[-200:]!r}; mend it")
        self.opening = opening(shown.rpartition(user)[2])
        answer = completion("x" if reasoning else None, "y")
        if parse(self.opening + self._rest(answer), reasoning) is None:
            raise UserError(
                f"the chat template begins each answer with {self.opening!r}, which no answer with --reasoning "
                f"{str(reasoning).lower()} does: change that option, or the template with --chat_template_kwargs"
            )
        ids = tokenizer.encode(answer, add_special_tokens=False)
        if parse(tokenizer.decode(ids, skip_special_tokens=True), reasoning) is None:
            raise UserError("the tokenizer drops <think> or <answer>: they must not be its special tokens")

    def fit(self, conversation: Conversation) -> Conversation:
        """The conversation with its instructions before the first request, if the template has no system turn."""
        if self.has_system_turn:
            return conversation
        system, user, *later = conversation
        return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *later]

    def encode(self, conversation: Conversation) -> list[int]:
        """The tokens that the policy reads before it answers."""
        asked = self.fit(conversation)
        return self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)

    def encode_answer(self, text: str) -> list[int]:
        """The tokens that the policy is to write for this whole answer, end token included."""
        return [*self.tokenizer.encode(self._rest(text), add_special_tokens=False), self.tokenizer.eos_token_id]

    def whole(self, written: str) -> str:
        """The answer of which the policy has `written` all, or what follows the opening; it may open once more."""
        return written if written.lstrip().startswith(self.opening.strip()) else self.opening + written

    def _rest(self, text: str) -> str:
        """What the policy writes of an answer: all, or what follows its first tag where the template writes that."""
        return text.partition(">")[2] if self.opening else text

    def _show(self, conversation: Conversation) -> str:
        """What the policy is shown, or why the template cannot show it."""
        try:
            return self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError) as error:
            return one_line(error)


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


def sample_as_asked(model: PreTrainedModel, training: GRPOConfig) -> None:
    """Give `model` the sampling of a run in place of what its checkpoint came with, from which TRL fills the gaps.

    Fields like `min_new_tokens` or `no_repeat_ngram_size` are then only those of --generation_kwargs.
    """
    own, asked = vars(model.generation_config), vars(training)
    kept = {name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sampling = {name: asked[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    model.generation_config = GenerationConfig(do_sample=True, **sampling, **kept)


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


def merged_policy(path: str) -> PreTrainedModel:
    """The adapter at `path` merged into its base model, in the precision of the base's weights."""
    return _adapted(path, None, {"dtype": "auto", "use_safetensors": True}).merge_and_unload()


def policy_contents(path: str, revision: str | None = None) -> Contents:
    """What the policy at `path` holds, and the base model of an adapter; both are downloaded if they must be."""
    base = {"base of gpt_path": _folder(*base_of(path, revision))} if is_adapter(path) else {}
    return contents_of({"gpt_path": _folder(path, revision), **base})


def _folder(path: str, revision: str | None = None) -> Path:
    """The folder of the model or adapter at `path`, downloaded if it must be; see `hub.resolve`."""
    needs = ("adapter_config.json",) if is_adapter(path) else ("config.json",)
    return resolve(path, needs, revision=revision, download=_download)


def _download(repo: str, revision: str | None) -> str:
    return snapshot_download(repo, revision=revision, allow_patterns=locked(repo).include or READ)
