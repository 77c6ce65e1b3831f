"""GIT visual question answering: is each thing that the ORIGINAL prompt names, with its attribute, in the picture?

Every item of `prompt.attr_nouns` (of `prompt.nouns` where there are none) is asked as the literal question
"red dog?", and answered by one next-token distribution after `[CLS] red dog ?`:

    p(yes) = P(yes) / (P(yes) + P(no)) = sigmoid(z_yes - z_no),    score = mean over items, then over pictures

Source: T2I-R1, arXiv 2505.00703, and its released code; model microsoft/git-large-vqav2 (GIT, arXiv 2205.14100).

The objects of every prompt are asked about, whatever its task. With `released`, prompts about places and numbers score
a constant 0, as in the released code. A prompt that names no object scores `UNJUDGED` in both: the same for its whole
group, hence without any advantage.

Left out of the released code: encoding the picture anew for each question, and loading weights with names unchecked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoTokenizer, DynamicCache, GitForCausalLM

from interfaces import Prompt, Reward, Sample
from models.frozen import arithmetic, autocast, batches, check_pictures, distinct_pictures, known_token, load, mean
from models.hub import read, resolve
from models.weights import locked
from prompting import well_formed

PUBLISHED = locked("microsoft/git-large-vqav2")
NEEDS = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
ZERO_TASKS = ("position", "counting")  # of the released code
UNJUDGED = 1.0  # of a prompt without objects


class GIT(Reward):
    """Probability of "yes" to each object of the original prompt; the mean over objects and a sample's pictures.

    Args:
        path: a folder with a `GitForCausalLM`, its tokenizer and its image processor (safetensors, or else
            `pytorch_model.bin`, of which only tensors are unpickled), or `PUBLISHED.repo`, from the hub's local cache.
        dtype: "float32", as in the released code, or "float16"/"bfloat16": autocast over float32 weights.
        batch_size: pictures, or questions, per forward pass.
        released: score as the released code does, see the module.

    Raises:
        UserError: no checkpoint at `path`, or one that cannot be used.
    """

    name = "git"
    range = (0.0, 1.0)

    def __init__(
        self,
        path: str | Path = PUBLISHED.repo,
        *,
        device: str | torch.device,
        dtype: str = "float32",
        batch_size: int = 32,
        released: bool = False,
    ):
        self.device, self.dtype, self.batch_size = torch.device(device), arithmetic(dtype), batch_size
        self.released = released
        folder = resolve(path, NEEDS, pickles=True)
        self.model = load(GitForCausalLM, folder, self.device)
        self.tokenizer, self.processor = read(AutoTokenizer, folder), read(AutoImageProcessor, folder, backend="pil")
        self.yes, self.no = (known_token(self.tokenizer, word, folder, "GIT") for word in ("yes", "no"))
        self.max_tokens = self.model.config.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score in [0, 1] per sample, None where it is not finite.

        Each distinct picture (the same PIL object) is encoded once, and asked each distinct question once.
        """
        check_pictures(samples, self.name)
        asked = {}  # id of a picture -> its questions, each once
        for sample in samples:
            for image in sample.images:
                asked.setdefault(id(image), {}).update(dict.fromkeys(self._questions(sample.prompt)))
        pictures = [image for image in distinct_pictures(samples) if asked[id(image)]]
        answers = {}
        for some in batches(pictures, self.batch_size):
            answers |= self._answers(some, [(row, q) for row, image in enumerate(some) for q in asked[id(image)]])
        return [self._score(sample, answers) for sample in samples]

    def question_ids(self, question: str) -> list[int]:
        """`[CLS]` and the question's tokens, without `[SEP]`; what is beyond the model's positions is cut."""
        return self._ids(question)[: self.max_tokens]

    def count_tokens(self, prompt: Prompt) -> int:
        """Of its longest question."""
        return max((len(self._ids(question)) for question in self._questions(prompt)), default=0)

    def limits(self, prompts: Sequence[Prompt]) -> list[str]:
        """How many prompts always score the same, and how many are cut."""
        same = sum(self._constant(prompt) is not None for prompt in prompts)
        why = f" or are about {' or '.join(ZERO_TASKS)}" if self.released else ""
        said = f"always scores {same} of {len(prompts)} prompts the same, because they name no object{why}"
        return [*[said] * (same > 0), *super().limits(prompts)]

    def _ids(self, question: str) -> list[int]:
        text = well_formed(question)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [self.tokenizer.cls_token_id, *ids]

    def _constant(self, prompt: Prompt) -> float | None:
        """The score that every picture of this prompt gets, or None if the model is asked."""
        if self.released and prompt.task in ZERO_TASKS:
            return 0.0
        return None if prompt.nouns or prompt.attr_nouns else UNJUDGED

    def _questions(self, prompt: Prompt) -> list[str]:
        if self._constant(prompt) is not None:
            return []
        return [f"{item}?" for item in prompt.attr_nouns or prompt.nouns]

    def _score(self, sample: Sample, answers: dict[tuple[int, str], float]) -> float | None:
        """The mean over items, then over pictures: one mean over both, for each picture is asked the same items."""
        constant = self._constant(sample.prompt)
        if constant is not None:
            return constant
        return mean([answers[id(image), q] for image in sample.images for q in self._questions(sample.prompt)])

    def _answers(
        self, pictures: Sequence[Image.Image], asked: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], float]:
        """(id of the picture, question) -> p(yes), for `asked` pairs of (row in `pictures`, question)."""
        seen = self._look(pictures)
        answers = {}
        for some in batches(asked, self.batch_size):
            rows = torch.tensor([row for row, _ in some], device=self.device)
            yes = self._ask([(keys[rows], values[rows]) for keys, values in seen], [q for _, q in some])
            answers |= {(id(pictures[row]), q): p for (row, q), p in zip(some, yes, strict=True)}
        return answers

    def _look(self, pictures: Sequence[Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (P, heads, visual tokens, width) of each decoder layer: all a question sees of a picture.

        Visual tokens come first and attend to each other only, so they do not depend on the question. The forward
        pass insists on text: `[CLS]` stands in and is cut off again, being the first token of each question.
        """
        pixels = self.processor([image.convert("RGB") for image in pictures], return_tensors="pt")["pixel_values"]
        start = torch.full((len(pictures), 1), self.tokenizer.cls_token_id, device=self.device)
        with autocast(self.device, self.dtype):
            out = self.model(start, pixel_values=pixels.to(self.device), use_cache=True, logits_to_keep=1)
        return [(layer.keys[:, :, :-1], layer.values[:, :, :-1]) for layer in out.past_key_values.layers]

    def _ask(self, seen: Sequence[tuple[torch.Tensor, torch.Tensor]], questions: Sequence[str]) -> list[float]:
        """p(yes) of each question about the picture in its row of `seen`.

        Text is causal, so padding on the right changes nothing before it: each row is read at its own last token.
        """
        ids = [torch.tensor(self.question_ids(question), device=self.device) for question in questions]
        ids_QT = pad_sequence(ids, batch_first=True)
        places = torch.arange(ids_QT.shape[1], device=self.device).expand_as(ids_QT)  # of the text alone, as trained
        with autocast(self.device, self.dtype):
            logits_QTV = self.model(ids_QT, position_ids=places, past_key_values=DynamicCache(seen)).logits
        last = torch.tensor([len(row) - 1 for row in ids], device=self.device)
        logits_QV = logits_QTV[torch.arange(len(ids), device=self.device), last].float()
        return torch.sigmoid(logits_QV[:, self.yes] - logits_QV[:, self.no]).tolist()
