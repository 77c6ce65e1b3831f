"""OCR: does the picture say what the ORIGINAL prompt quotes?

    score = 1 - min(d, n) / n       n: characters that are quoted; d: how many edits of them make what is read

Source: Flow-GRPO's OCR reward (arXiv 2505.05470 and its released code): a text that stands somewhere in what is read
costs nothing; else d is the Levenshtein distance to all that is read. Blanks, case, widths and kinds of quotation
marks do not count; Chinese and Japanese are counted in characters as well. Ours: several texts may stand in any order;
each is looked for once, what is found is taken out, and d is that of the others in their best order.

The reader is RapidOCR (PP-OCR's models, which come with the package), on the CPU. A prompt that quotes nothing scores
`NOTHING_QUOTED`: the same for its whole group, hence without any advantage. Left out: an error of the reader as the
lowest score; here it stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from data.text import fold
from errors import UserError
from interfaces import Prompt, Reward, Sample
from models.frozen import check_pictures, distinct_pictures, mean

READER = {"Det.limit_type": "max", "Det.limit_side_len": 960, "Global.use_cls": False}  # PP-OCR's size; no turned text
NOTHING_QUOTED = 1.0
MOST_PERMUTED, LONGEST_PERMUTED = 4, 200  # texts and letters that are tried in every order; more keep the prompt's


class OCR(Reward):
    """How much of the quoted texts can be read in a sample's pictures; the mean over them.

    Raises:
        UserError: the extra `ocr` is not installed.
    """

    name = "ocr"
    range = (0.0, 1.0)

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(f"reward 'ocr' needs rapidocr ({error}): pip install -e '.[ocr]'") from error
        self.read = RapidOCR(params={"Global.log_level": "error", **READER})

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score in [0, 1] per sample; each distinct picture (the same PIL object) is read once."""
        check_pictures(samples, self.name)
        asked = [sample for sample in samples if sample.prompt.texts]
        read = {id(image): self._text_in(image) for image in distinct_pictures(asked)}
        return [
            mean([text_score(sample.prompt.texts, read[id(image)]) for image in sample.images])
            if sample.prompt.texts
            else NOTHING_QUOTED
            for sample in samples
        ]

    def limits(self, prompts: Sequence[Prompt]) -> list[str]:
        """How many prompts always score the same."""
        same = sum(not prompt.texts for prompt in prompts)
        return [f"always scores {same} of {len(prompts)} prompts the same, because they quote nothing"] * (same > 0)

    def _text_in(self, image) -> str:
        """All that is read, from top to bottom."""
        return " ".join(self.read(image.convert("RGB")).txts or ())


def text_score(texts: Sequence[str], read: str) -> float:
    """Score in [0, 1] of what is `read` where these texts are asked for, in any order.

    >>> text_score(["OPEN"], "we are open"), text_score(["open"], "opan"), text_score(["b", "a"], "a b")
    (1.0, 0.75, 1.0)
    """
    rest, missing = _letters(read), []
    wanted = [letters for letters in map(_letters, texts) if letters]
    for text in sorted(wanted, key=len, reverse=True):
        if text in rest:
            rest = rest.replace(text, "\n", 1)  # what stood on both sides of it is no text together
        else:
            missing.append(text)
    if not missing:
        return 1.0
    rest, left = rest.replace("\n", ""), sum(map(len, missing))
    in_order = sorted(missing, key=wanted.index)
    orders = permutations(in_order) if len(in_order) <= MOST_PERMUTED and left <= LONGEST_PERMUTED else [in_order]
    edits = min(distance("".join(order), rest) for order in orders)
    return 1 - min(edits, left) / sum(map(len, wanted))


def distance(one: str, other: str) -> int:
    """Levenshtein's: characters to insert, delete or replace."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _letters(text: str) -> str:
    return "".join(fold(text).split())
