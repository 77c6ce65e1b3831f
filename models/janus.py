"""Janus-Pro as a policy: it writes a plan for a prompt, then draws from prompt and plan, token by token.

Both levels are answers to a text prefix; they differ in embedding and head. Prefixes are padded on the left and
positions follow the mask, so a row alone and in a batch gives the same tokens. Every row has noise of its own, from
its seed: token i is where the i-th uniform number falls in the cumulated distribution.

transformers' own drawing takes no seeds, starts anew for each picture of a prompt, needs guidance above 1, and returns
no scores. Guidance: logits u + w (c - u) of the conditional and the unconditional row (Janus, arXiv 2410.13848).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DynamicCache,
    GenerationConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    StaticCache,
)

from errors import UserError
from models.devices import pick_device, pick_dtype
from models.hub import OLD_JANUS, READ, contents_of, model_type, read, resolve
from models.weights import locked
from run.files import Contents

SYSTEM = "You plan pictures: you are given a request and say what its picture shows.\n\n"
INSTRUCTION = (
    "\nName every object of the picture with its number, its attributes and its place or relation to the others, "
    "briefly and precisely, in at most 50 words. Add nothing that the request does not imply, and explain nothing."
)
MARKUP = 16  # tokens of a chat template's marks, at most
PLAN_SETTINGS = ("temperature", "top_p", "max_plan_tokens")


class Part(NamedTuple):
    """One level of a batch: prefixes (B, L), padded on the left, and answers (B, N), padded on the right.

    `prefix_mask` and `mask` are 1 where there is a token.
    """

    prefix: Tensor
    prefix_mask: Tensor
    answer: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Part:
        return Part(*[tensor.to(device) for tensor in self])


class Scored(NamedTuple):
    """Of each token of answers (B, N): its log-probability, and the entropy of its distribution in nats.

    `norm` is the root mean square of all logits.
    """

    log_prob: Tensor
    entropy: Tensor
    norm: Tensor


class Sampled(NamedTuple):
    """Answers (B, N), and the log-probability of each token at the temperature it was sampled with."""

    tokens: Tensor
    log_prob: Tensor


class Settings(NamedTuple):
    """How a Janus samples.

    `guidance` is 1 for none, a temperature 0 for the likeliest token, `top_p` of plans alone.
    """

    guidance: float = 5.0
    image_temperature: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    max_plan_tokens: int = 512


class Janus(nn.Module):
    """A model with its processor. Its `forward` is the only way to a gradient, so that wrappers see every pass."""

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        ids = self.tokenizer
        self.pad, self.bos, self.eos = ids.pad_token_id, ids.bos_token_id, ids.eos_token_id
        self.boi = ids.convert_tokens_to_ids(ids.boi_token)
        self.length = model.config.vision_config.num_image_tokens  # tokens of a picture

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def settings(self) -> Settings:
        """What `generation_config.json` says of images, and of plans if `keep_settings` wrote it; else published."""
        config, own = self.model.generation_config, Settings()
        plan = (config.generation_kwargs or {}).get("plan", {}) if "generation_kwargs" in vars(config) else {}
        return own._replace(
            guidance=config.guidance_scale or own.guidance, image_temperature=config.temperature or 1.0, **plan
        )

    def keep_settings(self, settings: Settings) -> None:
        """Let `save` write them."""
        plan = {name: value for name, value in settings._asdict().items() if name in PLAN_SETTINGS}
        self.model.generation_config = GenerationConfig(
            do_sample=True, guidance_scale=settings.guidance, temperature=settings.image_temperature, top_k=0,
            pad_token_id=self.pad, bos_token_id=self.bos, eos_token_id=self.eos,
            generation_kwargs={"boi_token_id": self.boi, "plan": plan},
        )  # fmt: skip

    # Prefixes

    def plan_prefix(self, prompt: str) -> list[int]:
        """Token ids after which a plan is written."""
        return self._ids(SYSTEM + self._turn(self._plain(prompt) + INSTRUCTION))

    def image_prefix(self, prompt: str, plan: str | None = None) -> list[int]:
        """Token ids after which a picture is drawn, of the prompt alone or with its plan; the last starts an image."""
        text = self._plain(prompt if plan is None else f"{prompt}. {plan}")
        return self._ids(self._turn(text) + self.tokenizer.boi_token)

    def without_text(self, prefix: Sequence[int]) -> list[int]:
        """The unconditional prefix of the same length: all but the first token and the last become padding, seen."""
        return [token if token in (self.bos, self.boi) else self.pad for token in prefix]

    def text_of(self, plan: Sequence[int]) -> str:
        """The text of a plan's tokens."""
        return self.tokenizer.decode(plan, skip_special_tokens=True).strip()

    def _turn(self, text: str) -> str:
        content = [{"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _plain(self, text: str) -> str:
        """No token of the model's own can be smuggled in."""
        for mark in self.tokenizer.all_special_tokens:
            text = text.replace(mark, " ")
        return text

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[0] == self.bos else [self.bos, *ids]

    # Training: log-probabilities of answers that are there

    def forward(
        self,
        plan: Part | None,
        image: Part | None,
        *,
        guidance: float = 1.0,
        temperatures: tuple[float, float] = (1.0, 1.0),
    ) -> tuple[Scored | None, Scored | None]:
        """Both levels, of the distributions at these temperatures (of plan and image); see `Scored`.

        Args:
            guidance: above 1: of the guided distribution of images, which takes twice the rows.
        """
        written = drawn = None
        if plan is not None:
            hidden = self._answer_states(plan, self.model.get_input_embeddings()(plan.answer[:, :-1]))
            written = _scored(self.model.lm_head(hidden), plan.answer, temperatures[0])
        if image is not None:
            both, count = self._both(image) if guidance > 1 else image, len(image.answer)
            tokens = self.model.prepare_embeddings_for_image_generation(both.answer[:, :-1])
            logits = self.model.model.generation_head(self._answer_states(both, tokens))
            if guidance > 1:
                logits = _guided(logits[:count], logits[count:], guidance)
            drawn = _scored(logits, image.answer, temperatures[1])
        return written, drawn

    def _both(self, image: Part) -> Part:
        """The conditional rows, then the unconditional ones."""
        keeps = (image.prefix == self.bos) | (image.prefix == self.boi)
        blank = image.prefix.where(keeps, torch.full_like(image.prefix, self.pad))
        return Part(torch.cat([image.prefix, blank]), *[torch.cat([part] * 2) for part in image[1:]])

    def _answer_states(self, part: Part, answer: Tensor) -> Tensor:
        """(B, N, D) the states from which each token of the answers was predicted."""
        return self.states(part, answer)[:, part.prefix.shape[1] - 1 :]

    def states(self, part: Part, answer: Tensor) -> Tensor:
        """(B, L + N - 1, D) last states of prefixes and of all but the last of the answers, which are embedded."""
        embedded = torch.cat([self.model.get_input_embeddings()(part.prefix), answer], 1)
        mask = torch.cat([part.prefix_mask, part.mask[:, :-1]], 1)
        return self.model.model.language_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state

    # Sampling

    @torch.no_grad()
    def write(
        self, prefixes: Sequence[Sequence[int]], seeds: Sequence[int], most: int, temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
        """Answers of at most `most` tokens, the end token included where it was written, and their log-probabilities.

        Args:
            temperature: 0 for the likeliest token; the log-probabilities are then those at temperature 1.
            top_p: sample from the likeliest tokens that together have this probability; log-probabilities are those
                of the whole distribution.
        """
        state, dice = _Decoding(self, prefixes, most), uniform(seeds, most, "plan").to(self.device)
        tokens, log_probs = [], []
        ended = torch.zeros(len(prefixes), dtype=torch.bool, device=self.device)
        for place in range(most):
            token, log_prob = _pick(self.model.lm_head(state.last), dice[:, place], temperature, top_p)
            tokens.append(token)
            log_probs.append(log_prob)
            ended |= token == self.eos
            if ended.all():
                break
            if place + 1 < most:
                state.go_on(self.model.get_input_embeddings()(token[:, None]))
        rows, values = torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist()
        lengths = [row.index(self.eos) + 1 if self.eos in row else len(row) for row in rows]
        return (
            [row[:n] for row, n in zip(rows, lengths, strict=True)],
            [row[:n] for row, n in zip(values, lengths, strict=True)],
        )

    @torch.no_grad()
    def draw(
        self, prefixes: Sequence[Sequence[int]], seeds: Sequence[int], guidance: float = 1.0, temperature: float = 1.0
    ) -> Sampled:
        """The tokens of one picture for each prefix; above guidance 1 in two rows, else in one.

        Its log-probabilities are those of the distribution that was sampled, guidance included.
        """
        count, rows = len(prefixes), list(prefixes)
        if guidance > 1:
            rows += [self.without_text(prefix) for prefix in prefixes]
        state, dice = _Decoding(self, rows, self.length), uniform(seeds, self.length, "image").to(self.device)
        tokens, log_probs = [], []
        for place in range(self.length):
            logits = self.model.model.generation_head(state.last)
            if guidance > 1:
                logits = _guided(logits[:count], logits[count:], guidance)
            token, log_prob = _pick(logits, dice[:, place], temperature)
            tokens.append(token)
            log_probs.append(log_prob)
            if place + 1 < self.length:
                again = token.repeat(len(rows) // count)[:, None]
                state.go_on(self.model.prepare_embeddings_for_image_generation(again))
        return Sampled(torch.stack(tokens, 1), torch.stack(log_probs, 1))

    @torch.no_grad()
    def pictures(self, tokens: Tensor, batch: int = 8) -> list[Image.Image]:
        """(B, N) image tokens -> pictures; always `batch` at once, because another number rounds otherwise."""
        found = []
        for part in tokens.split(batch):
            filled = torch.cat([part, part[-1:].expand(batch - len(part), -1)])
            pixels = (self.model.model.vqmodel.decode(filled).float().clamp(-1, 1) + 1) * 127.5
            found += [
                Image.fromarray(one) for one in pixels.permute(0, 2, 3, 1).round().byte().cpu().numpy()[: len(part)]
            ]
        return found

    def codes(self, tokens: Tensor) -> Tensor:
        """(B, N, D) what the VQ knows of image tokens."""
        return self.model.model.vqmodel.quantize.embedding(tokens)

    # Seeing

    def answer_logits(self, questions: Sequence[str], pixels: Tensor) -> Tensor:
        """(B, V) logits of the first token of the answer to a question about each picture, (B, 3, H, W) in [-1, 1]."""
        placeholder = self.tokenizer.image_token * self.length
        image = f"{self.tokenizer.boi_token}{placeholder}{self.tokenizer.eoi_token}\n"
        prefixes = [self._ids(self._turn(image + self._plain(question))) for question in questions]
        ids, mask = left_padded(prefixes, self.pad)
        mask = mask.to(self.device)
        seen = self.model.model(
            input_ids=ids.to(self.device), pixel_values=pixels.to(self.device, self.model.dtype), attention_mask=mask,
            position_ids=positions(mask), use_cache=False,
        )  # fmt: skip
        return self.model.lm_head(seen.last_hidden_state[:, -1])

    @torch.no_grad()
    def says_yes(self, questions: Sequence[str], pictures: Sequence[Image.Image]) -> list[bool]:
        """Whether "yes" is likelier than "no"."""
        looks = self.processor.image_processor(list(pictures), return_tensors="pt").pixel_values
        yes, no = (self.tokenizer(word, add_special_tokens=False).input_ids[-1] for word in ("yes", "no"))
        logits = self.answer_logits(questions, looks)
        return (logits[:, yes] > logits[:, no]).tolist()

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """A folder that `load_janus` and transformers load; `state` in place of the model's own weights."""
        self.model.save_pretrained(folder, state_dict=None if state is None else dict(state))
        self.processor.save_pretrained(folder)


class _Decoding:
    """Rows that grow by a token at a time. Equal prefixes are read once, and keys and values lie where they will stay.

    Args:
        most: tokens that will be read beyond the prefixes, at most.

    Attributes:
        last: (B, D) states after the newest token.
    """

    def __init__(self, janus: Janus, prefixes: Sequence[Sequence[int]], most: int):
        self.language_model, self.cache = janus.model.model.language_model, DynamicCache()
        places = {tuple(prefix): None for prefix in prefixes}
        places = {prefix: number for number, prefix in enumerate(places)}
        ids, mask = (part.to(janus.device) for part in left_padded(list(places), janus.pad))
        last = self._read(janus.model.get_input_embeddings()(ids), mask, positions(mask))
        chosen = torch.tensor([places[tuple(prefix)] for prefix in prefixes], device=janus.device)
        room = StaticCache(self.language_model.config, max_cache_len=ids.shape[1] + most)
        for layer, prefix in zip(room.layers, self.cache.layers, strict=True):
            layer.update(prefix.keys[chosen], prefix.values[chosen])
        self.cache, self.mask, self.last = room, mask[chosen], last[chosen]

    def go_on(self, embedded: Tensor) -> None:
        """Read one more token of each row, (B, 1, D)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.last = self._read(embedded, self.mask, self.mask.sum(1, keepdim=True) - 1)

    def _read(self, embedded: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        read = self.language_model(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
        )
        return read.last_hidden_state[:, -1]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def part_of(prefixes: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int) -> Part:
    """A batch's rows as tensors."""
    width = max(map(len, answers))
    filled = torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in answers])
    mask = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for answer in answers])
    return Part(*left_padded(prefixes, pad), filled, mask)


def positions(mask: Tensor) -> Tensor:
    """(B, L) places in the text, from 0 at the first token of each row."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def uniform(seeds: Sequence[int], count: int, purpose: str) -> Tensor:
    """(B, count) numbers in [0, 1): a row is a function of its seed and of what it is for."""
    shift = {"plan": 0, "image": 1 << 40}[purpose]
    return torch.stack([
        torch.rand(count, generator=torch.Generator().manual_seed(seed + shift), dtype=torch.float64) for seed in seeds
    ])  # fmt: skip


def _pick(logits: Tensor, dice: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B,) tokens of (B, V) logits, and their log-probabilities at that temperature."""
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        probs, order = log_probs.double().exp(), None
        if top_p < 1:
            probs, order = probs.sort(descending=True)
            probs = probs * (probs.cumsum(-1) - probs < top_p)
        sums = probs.cumsum(-1)
        chosen = torch.searchsorted(sums, dice[:, None] * sums[:, -1:], right=True).clamp_max(sums.shape[1] - 1)[:, 0]
        chosen = chosen if order is None else order.gather(1, chosen[:, None])[:, 0]
    return chosen, log_probs.gather(1, chosen[:, None])[:, 0]


def _guided(conditional: Tensor, other: Tensor, guidance: float) -> Tensor:
    return other.float() + guidance * (conditional.float() - other.float())


def _scored(logits: Tensor, answer: Tensor, temperature: float) -> Scored:
    log_probs = torch.log_softmax(logits.float() / temperature, -1)
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    norm = logits.detach().float().pow(2).mean().sqrt()
    return Scored(log_probs.gather(2, answer[..., None])[..., 0], entropy, norm)


# Loading -------------------------------------------------------------------------------------------------------------


def load_janus(path: str, dtype: str = "auto", device: str = "auto") -> Janus:
    """The model at `path`, a folder or a hub name in transformers' layout, in eval mode.

    Raises:
        UserError: see `find_janus`; unreadable weights, an unknown dtype, or a GPU named where there is none.
    """
    folder, device = find_janus(path), pick_device(device)
    options = {"dtype": pick_dtype(dtype, device), "use_safetensors": True}
    model, processor = read(JanusForConditionalGeneration, folder, **options), read(JanusProcessor, folder)
    if model.lm_head.weight is model.get_input_embeddings().weight:
        raise UserError(f"{path}: config.json ties lm_head to the embeddings, but Janus has two: tie_word_embeddings "
                        "must be false there and in text_config")  # fmt: skip
    return Janus(model.to(device).eval(), processor)


def find_janus(path: str) -> Path:
    """The folder of the model at `path`, downloaded if it must be.

    Raises:
        UserError: no such model, incomplete weights, another kind of model, or its authors' own layout.
    """
    folder = resolve(path, ("config.json",), download=_download)
    kind = model_type(folder)
    if kind == OLD_JANUS:
        convert = f"python scripts/convert_janus.py --source {path} --out OUT"
        raise UserError(f"{path} has its authors' layout: convert it with `{convert}`")
    if kind != "janus":
        raise UserError(f"{path} holds a {kind!r} model: give a Janus, as deepseek-community/Janus-Pro-1B")
    return folder


def longest_prefix(path: str, prompts: Sequence[str], max_plan_tokens: int) -> int:
    """Tokens before an image, at most, when these prompts are planned for.

    Raises:
        UserError: the model has no room for so many, and an image.
    """
    folder = find_janus(path)
    config, processor = read(AutoConfig, folder), read(JanusProcessor, folder)
    lengths = {prompt: len(processor.tokenizer(SYSTEM + prompt + INSTRUCTION).input_ids) for prompt in prompts}
    longest = max(lengths, key=lengths.get)
    most = lengths[longest] + MARKUP + max_plan_tokens
    room = config.text_config.max_position_embeddings - config.vision_config.num_image_tokens
    if most > room:
        raise UserError(
            f"--max_plan_tokens {max_plan_tokens}: with the longest prompt ({longest[:60]!r}...) that is {most} "
            f"tokens, but {path} has room for {room} before an image: give fewer"
        )
    return most


def janus_contents(path: str) -> Contents:
    """What the model holds."""
    return contents_of({"model_path": find_janus(path)})


def _download(repo: str, revision: str | None) -> str:
    return snapshot_download(repo, revision=revision, allow_patterns=locked(repo).include or READ)
