"""GenEval 2 by Soft-TIFA: how probable a VLM finds the right answer to each question about a picture.

    score of a question    p(first token is the answer, in one of its spellings)
    AM, GM of a picture    arithmetic and geometric mean over its questions
    overall                the mean AM; the mean GM stands beside it

The rows of the table: AM; GM; the questions by skill; GM by `atom_count`. Each question is asked as "... Answer in one
word." of a VLM that is loaded here (`LocalVLM`) or served (`ServedVLM`). Source: GenEval 2, repository revision
a6e82d2; its data is CC BY-NC 4.0, fetched by the user. One picture a prompt; published judge: Qwen3-VL-8B-Instruct.

Different from the released code:

- Only spellings that are one token count, not the first token of longer ones: in Qwen's vocabulary, where digits stand
  alone, " 2" begins with a mere space.
- A served VLM gives 20 probabilities; an answer that is not among them has 0, and then the picture's GM is 0. If the
  server gives none, its word counts, 1 or 0; the settings say which.
- A question without an answer, or with one that is neither yes nor no nor a number, is left out of all means.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from clients.chat import TOP_TOKENS, UNREADABLE, Question, Template, VLMClient
from clients.verdict import YES_NO, choice
from data.text import json_rows
from errors import UserError
from evaluation.benchmark import Benchmark, Item, Verdict
from evaluation.judged import ask, items_of, required_texts, settings_of
from interfaces import Prompt
from models import frozen
from models.frozen import arithmetic, batches
from models.hub import contents_of, read, resolve
from models.weights import locked

log = logging.getLogger(__name__)

PUBLISHED = locked("Qwen/Qwen3-VL-8B-Instruct")
NEEDS = ("config.json", "tokenizer_config.json")

SKILLS = ("object", "count", "attribute", "position", "verb")
ATOM_COUNTS = range(3, 11)
CATEGORIES = ("AM", "GM", *SKILLS, *(f"GM, {count} atoms" for count in ATOM_COUNTS))
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
ANSWERS = ("yes", "no", *NUMBERS)

WORDS = "{question} Answer in one word."
SOFT = Template(WORDS, lambda answer: answer or None, first_token=True)
COUNTED = {rf"(?:there (?:is|are) )?(?:{word}|{digits})": word for word, digits in NUMBERS.items()}
HARD = Template(WORDS, functools.partial(choice, verdicts=YES_NO | COUNTED | {"none": "zero", "[0-9]+": r"\g<0>"}))
PROBE = "Is this picture completely black?"  # it is
CONFIDENT = 0.5  # a judge whose first token says yes or no with less probability does not answer at once


@dataclass(frozen=True)
class Asked:
    """A question about a picture, and its right answer, one of ANSWERS."""

    image: Image.Image
    question: str
    answer: str


Score = tuple[float | None, str]  # in [0, 1], or None and the reason why there is none


class ServedVLM:
    """A VLM behind an OpenAI-compatible API.

    Args:
        client: of the server.
        template: SOFT (probabilities) or HARD (1 for the right word, else 0); None: two questions, asked here and now,
            find out whether the server gives probabilities and the model answers with its first token.

    Raises:
        UserError: those questions were not answered.
    """

    def __init__(self, client: VLMClient, template: Template | None = None):
        self.client, self.model = client, client.model
        self.template = template or _probe(client)
        soft = f"soft: probability, among those of the {TOP_TOKENS} likeliest first tokens"
        how = soft if self.template is SOFT else "hard: 1 for the right word, else 0"
        self.settings = {**settings_of(client, self.template), "scores": how}

    def __call__(self, asked: Sequence[Asked]) -> list[Score]:
        read = _probability if self.template is SOFT else _match
        answers = ask(self.client, [_question(self.template, one.image, one.question) for one in asked])
        return [
            (None, reason) if verdict is None else (read(verdict, one.answer), f"{UNREADABLE} {verdict[:200]!r}")
            for (verdict, reason), one in zip(answers, asked, strict=True)
        ]


class LocalVLM:
    """A VLM of transformers (Qwen3-VL, Qwen2.5-VL and others with a chat template for pictures), loaded here.

    `path` is a folder with model and processor, or `PUBLISHED.repo`; a batch is of questions.
    """

    def __init__(
        self,
        path: str | Path = PUBLISHED.repo,
        *,
        device: str | torch.device,
        dtype: str = "bfloat16",
        batch_size: int = 16,
    ):
        folder = resolve(path, NEEDS)
        self.device, self.batch_size = torch.device(device), batch_size
        weights_in = arithmetic(dtype)
        self.network = frozen.load(AutoModelForImageTextToText, folder, self.device, weights_in)
        self.processor = read(AutoProcessor, folder)
        self.tokens = {answer: self._tokens(answer, folder) for answer in ANSWERS}
        self.model = Path(path).name
        self.settings = {
            "contents": contents_of({"vlm_path": str(folder)}),
            "dtype": dtype,
            "template_version": SOFT.version,
            "scores": "soft: probability of the first token",
        }

    @torch.inference_mode()
    def __call__(self, asked: Sequence[Asked]) -> list[Score]:
        chances = [chance for some in batches(asked, self.batch_size) for chance in self._ask(some)]
        return [(chance, "") if math.isfinite(chance) else (None, "not finite") for chance in chances]

    def _ask(self, asked: Sequence[Asked]) -> list[float]:
        """p(answer) of each question. Padding is on the left, so that the answer follows the last column."""
        texts = [_question(SOFT, one.image, one.question).text for one in asked]
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
        chats = [
            self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns
        ]
        images = [[one.image.convert("RGB")] for one in asked]
        inputs = self.processor(text=chats, images=images, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.device, self.network.dtype)
        logits_QV = self.network(**inputs, logits_to_keep=1).logits[:, -1].float()
        chances_QV = logits_QV.softmax(dim=-1)
        return [row[self.tokens[one.answer]].sum().item() for row, one in zip(chances_QV, asked, strict=True)]

    def _tokens(self, answer: str, folder: Path) -> list[int]:
        """The ids of those spellings of an answer that are one token; at least one must be."""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings(answer)]
        known = {id for (id, *rest) in ids if not rest and id != tokenizer.unk_token_id}
        if not known:
            raise UserError(f"the tokenizer in {folder} has no token for the answer {answer!r}: give another VLM")
        return sorted(known)


class GenEval2(Benchmark):
    """GenEval 2 with Soft-TIFA by the VLM that is asked."""

    name = "geneval2"
    categories = CATEGORIES
    images_per_prompt = 1

    def __init__(self, vlm: ServedVLM | LocalVLM):
        self.vlm, self.settings = vlm, vlm.settings
        self.title = f"GenEval 2, Soft-TIFA (judge={vlm.model})"

    def load(self, path: Path) -> list[Item]:
        """The rows of `geneval2_data.jsonl`."""
        return items_of(json_rows(path), _item)

    def judge(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[Verdict]:
        """All questions of all pictures in one call of the VLM."""
        asked = [
            Asked(image, question, answer)
            for item, image in zip(items, images, strict=True)
            for question, answer in item.meta["questions"]
        ]
        scores = iter(self.vlm(asked))
        return [verdict(item, [next(scores) for _ in item.meta["questions"]]) for item in items]

    def overall(self, means: Mapping[str, float]) -> float:
        """The mean AM."""
        return means["AM"]


def spellings(answer: str) -> tuple[str, ...]:
    """How a judge may write an answer: yes, Yes; two, Two, 2; each of them after a space too."""
    words = (answer, answer.capitalize(), *([NUMBERS[answer]] if answer in NUMBERS else []))
    return tuple(f"{blank}{word}" for blank in ("", " ") for word in words)


def am_gm(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Arithmetic and geometric mean of the scores that are there; None if none is."""
    known = [score for score in scores if score is not None]
    if not known:
        return None, None
    gm = 0.0 if 0 in known else math.exp(sum(map(math.log, known)) / len(known))
    return sum(known) / len(known), gm


def verdict(item: Item, answers: Sequence[Score]) -> Verdict:
    """The verdict on a picture from the score of each question."""
    scores = [score for score, _ in answers]
    am, gm = am_gm(scores)
    parts: dict[str, list[float | None]] = {"AM": [am], "GM": [gm], f"GM, {item.meta['atom_count']} atoms": [gm]}
    for skill, score in zip(item.meta["skills"], scores, strict=True):
        parts.setdefault(skill, []).append(score)
    detail = {"scores": scores, "questions": [question for question, _ in item.meta["questions"]]}
    return Verdict(parts, detail, [reason for score, reason in answers if score is None])


def _item(row: Mapping[str, Any], number: int) -> Item:
    """The item of a row; raises ValueError for a malformed one."""
    (text,) = required_texts(row, "prompt")
    count, skills = row["atom_count"], row["skills"]
    if count not in ATOM_COUNTS:
        raise ValueError(f"atom_count is {count!r}, not a whole number from 3 to 10")
    questions = [[question.strip(), answer.strip().lower()] for question, answer in row["vqa_list"]]
    wrong = [answer for _, answer in questions if answer not in ANSWERS]
    if wrong:
        raise ValueError(f"answer {wrong[0]!r} is none of {', '.join(ANSWERS)}")
    if not questions or len(skills) != len(questions) or not set(skills) <= set(SKILLS):
        raise ValueError(f"skills of {len(questions)} questions are {skills!r}, known are {', '.join(SKILLS)}")
    meta = {"atom_count": count, "questions": questions, "skills": skills}
    return Item(f"{number:05d}", Prompt(text), f"{count} atoms", meta)


def _question(template: Template, image: Image.Image, question: str) -> Question:
    return Question(template, "", (image,), {"question": question})


def _probability(chances: str, answer: str) -> float | None:
    """p(answer) from JSON of token -> probability; None if no token is the answer to any question."""
    known = json.loads(chances)
    if not any(spelling in known for other in ANSWERS for spelling in spellings(other)):
        return None
    return min(1.0, sum(known.get(spelling, 0.0) for spelling in spellings(answer)))


def _match(word: str, answer: str) -> float:
    """1 if the judge's word is the answer."""
    return float(word in map(str.lower, spellings(answer)))


def _probe(client: VLMClient) -> Template:
    """SOFT for a server whose first token says yes or no with probabilities, else HARD."""
    black = Image.new("RGB", (64, 64))
    (chances,) = client.ask([_question(SOFT, black, PROBE)])
    if chances is not None and sum(_probability(chances, answer) or 0.0 for answer in ("yes", "no")) >= CONFIDENT:
        return SOFT
    why = client.reasons[0] or f"the likeliest first tokens are {chances}"
    if client.ask([_question(HARD, black, PROBE)]) == [None]:
        raise UserError(
            f"{client.model!r} at {client.url} answers no probe ({client.reasons[0]}): is it a VLM, and is it served?"
        )
    log.warning("%r gives no probabilities of its answer (%s): hard scores, 1 for the right word", client.model, why)
    return HARD
