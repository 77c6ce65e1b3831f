"""BLIP-VQA as T2I-CompBench asks it: p(yes) of "a red car?" about a picture, from the decoder's first step.

    p = P(yes) / (P(yes) + P(no))

The picture is squashed to 480x480 (bicubic); the question is lower-cased, loses `. ! " ( ) * # : ; ~`, is cut to 50
words and 35 tokens, and its first token becomes [ENC]; the decoder is given [DEC] alone. Source: BLIPvqa_eval of
github.com/Karine-Huang/T2I-CompBench, weights model_base_vqa_capfilt_large.pth; here transformers'
`BlipForQuestionAnswering`, with the original's eps of 1e-6 in the layer norms of the vision tower. The text model has
12 heads, as the locked revision's config.json says; the first published conversions said 8 (transformers #22625).

Not exact: transformers' conversion stored the 30x30 position embedding as 24x24 (its script builds the model for 384
pixels), and here it is interpolated to 30x30 again. How far that moves scores was not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import AutoTokenizer, BlipConfig, BlipForQuestionAnswering

from models.frozen import batches, known_token, load
from models.hub import read, resolve
from models.weights import locked
from prompting import well_formed

PUBLISHED = locked("Salesforce/blip-vqa-capfilt-large")
NEEDS = ("config.json", "tokenizer_config.json")
SIDE = 480  # pixels
MOST_WORDS, MOST_TOKENS = 50, 35
_DROPPED = re.compile(r"[.!\"()*#:;~]")
_READ = Compose(
    [
        Resize((SIDE, SIDE), interpolation=InterpolationMode.BICUBIC),
        ToTensor(),
        Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
)


def cleaned(question: str) -> str:
    """The question as BLIP's own dataset class prepares it; the "?" stays."""
    return " ".join(_DROPPED.sub("", question.lower()).rstrip(" ").split(" ")[:MOST_WORDS])


class BlipVQA:
    """p(yes) of questions about pictures, in float32; a batch is of pictures, or of (picture, question) pairs.

    `path` is a folder with a `BlipForQuestionAnswering` and its BERT tokenizer, or `PUBLISHED.repo`.
    """

    def __init__(self, path: str | Path = PUBLISHED.repo, *, device: str | torch.device, batch_size: int = 32):
        self.device, self.batch_size = torch.device(device), batch_size
        self.folder = resolve(path, NEEDS, pickles=True)
        config = read(BlipConfig, self.folder)
        config.vision_config.layer_norm_eps = 1e-6
        self.model = load(BlipForQuestionAnswering, self.folder, self.device, config=config)
        self.tokenizer = read(AutoTokenizer, self.folder)
        self.dec = self.model.config.text_config.bos_token_id
        self.enc = self.dec + 1
        self.yes, self.no = (known_token(self.tokenizer, word, self.folder, "BLIP") for word in ("yes", "no"))

    @torch.inference_mode()
    def ask(self, rows: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[float]]:
        """For each (picture, questions) p(yes) of each question; NaN where the model's output is not finite.

        Each picture is encoded once. Questions are asked in batches of one length, because transformers' BLIP does not
        hide padding from its decoder (5.17 passes the mask of cross attention under the name of the other one).
        """
        read = [[self.question_ids(question) for question in questions] for _, questions in rows]
        answers = [[math.nan] * len(questions) for questions in read]
        asked = [row for row in range(len(rows)) if read[row]]
        for some in batches(asked, self.batch_size):
            seen_PND = self._look([rows[row][0] for row in some])
            by_length: dict[int, list[tuple[int, int, int]]] = {}
            for place, row in enumerate(some):
                for number, ids in enumerate(read[row]):
                    by_length.setdefault(len(ids), []).append((place, row, number))
            for few in [few for same in by_length.values() for few in batches(same, self.batch_size)]:
                places = torch.tensor([place for place, _, _ in few], device=self.device)
                yes = self._answer(seen_PND[places], [read[row][number] for _, row, number in few])
                for (_, row, number), p in zip(few, yes, strict=True):
                    answers[row][number] = p
        return answers

    def question_ids(self, question: str) -> list[int]:
        """The tokens of a question as the text encoder reads them."""
        read = self.tokenizer(
            cleaned(well_formed(question)), truncation=True, max_length=MOST_TOKENS, split_special_tokens=True
        )
        return [self.enc, *read.input_ids[1:]]

    def _look(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(P, N, D) visual tokens."""
        pixels = torch.stack([_READ(picture.convert("RGB")) for picture in pictures]).to(self.device)
        return self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state

    def _answer(self, seen_QND: torch.Tensor, ids: Sequence[list[int]]) -> list[float]:
        """p(yes) of each question, all of one length, about the picture in its row."""
        states = self.model.text_encoder(
            input_ids=torch.tensor(ids, device=self.device), encoder_hidden_states=seen_QND
        ).last_hidden_state
        start = torch.full((len(ids), 1), self.dec, device=self.device)
        out = self.model.text_decoder(input_ids=start, encoder_hidden_states=states, use_cache=False)
        logits_QV = out.logits[:, 0]
        return torch.sigmoid(logits_QV[:, self.yes] - logits_QV[:, self.no]).tolist()
