"""One grammar of GenEval-style prompts, used in both directions: `read` (text -> fields) and `write` (fields -> text).

    text   := [("a" | "an" | "the") medium "of"] phrase [("and" | relation) phrase] ["."]
    phrase := ("a" | "an" | "the" | number) [colour] noun             (noun: one to three words)

The nouns are open: the miniature world's circles and a user's ukuleles read alike. What is left out on purpose: three
and more phrases, bare plurals, verbs; such texts have no fields. Only colours are attributes: "a wooden table" has the
noun "wooden table". Task names are GenEval's tags (github.com/djghosh13/geneval) and "spatial_3d", for relations in
depth, which no box can check; localities are those of T2I-R1's metadata and of T2I-CompBench's 3d_spatial prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from data.text import normalize
from interfaces import Prompt

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SAID_BY_FIELDS = ("spatial_3d", "texture", "shape")  # other tasks whose fields say all that the text asks for
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
LEAD = "a photo of"
MEDIA = (  # "a <medium> of" may open a prompt and says nothing of what is asked for
    "photo", "photograph", "picture", "image", "drawing", "painting", "sketch", "illustration", "print", "poster",
    "snapshot", "view", "rendering", "shot", "scan", "still", "mural", "logo", "icon", "sticker",
)  # fmt: skip
MAX_COUNT = 12  # largest number that is written as a word

# What may stand between two phrases -> the locality that rewards know it by.
RELATIONS = {
    "left of": "left of", "to the left of": "left of", "on the left of": "on the left of",
    "on the left side of": "on the left of", "right of": "right of", "to the right of": "right of",
    "on the right of": "on the right of", "on the right side of": "on the right of", "above": "above",
    "on top of": "on top of", "on the top of": "on the top of", "below": "below", "under": "below",
    "underneath": "below", "beneath": "below", "on the bottom of": "on the bottom of", "next to": "next to",
    "beside": "next to", "near": "near", "on side of": "on side of", "on the side of": "on side of",
}  # fmt: skip
DEPTH_RELATIONS = ("in front of", "behind", "hidden by")
# locality -> (what it asks of the picture, are the two objects swapped), so that both ways to say it are equal.
_DIRECTIONS = {
    **dict.fromkeys(("left of", "on the left of"), ("left", False)),
    **dict.fromkeys(("right of", "on the right of"), ("left", True)),
    **dict.fromkeys(("above", "on top of", "on the top of"), ("above", False)),
    **dict.fromkeys(("below", "on the bottom of"), ("above", True)),
    **dict.fromkeys(("next to", "near", "on side of"), ("near", False)),
    "in front of": ("front", False),
    **dict.fromkeys(("behind", "hidden by"), ("front", True)),
}
_RELATION_WORDS = sorted((tuple(words.split()) for words in (*RELATIONS, *DEPTH_RELATIONS)), key=len, reverse=True)
_LEADS = [tuple(f"{article}{noun} of".split()) for article in ("a ", "an ", "the ", "") for noun in MEDIA]
_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {word: n for n, word in enumerate(_NUMBER_WORDS, 1)} | {str(n): n for n in range(1, MAX_COUNT + 1)}
_WORD = re.compile(r"[^\W\d_]+(?:[-'][^\W\d_]+)*")
_MAX_CHARACTERS = 300  # a longer text is no such prompt
_MAX_NOUN_WORDS = 3  # "ice cream cone"

# Words that a noun never holds; one of them means that the text says more than this grammar can.
_CLOSED = (
    frozenset(
        "a an the this that these those some any no every each all both his her its their my your our of in on at by "
        "to from into onto with without over under near behind between among through across around along against "
        "inside outside and or but as if than while when where who which is are was were be being been has have had "
        "do does not very it he she they i we you".split()
    )
    | frozenset(_NUMBERS)
    | frozenset(COLORS)
    | {"grey", "front", "left", "right", "above", "below", "beside"}
)
_NOUNS_IN_ING = frozenset(
    "building ring earring painting string wing king ceiling swing spring sibling clothing drawing sling paving "
    "pudding dumpling wedding duckling railing awning icing".split()
)

_INVARIANT = frozenset(
    "sheep fish goldfish jellyfish starfish deer moose shrimp salmon squid bison aircraft spacecraft hovercraft "
    "scissors pliers tongs tweezers binoculars sunglasses headphones pants jeans shorts trousers pajamas dice series "
    "species crutches".split()
)
_IRREGULAR = dict(  # singular -> plural
    pair.split()
    for pair in (
        "person people, man men, woman women, snowman snowmen, fireman firemen, policeman policemen, fisherman "
        "fishermen, child children, mouse mice, goose geese, tooth teeth, foot feet, ox oxen, cactus cacti, knife "
        "knives, wife wives, life lives, leaf leaves, loaf loaves, shelf shelves, bookshelf bookshelves, wolf wolves, "
        "calf calves, half halves, elf elves, scarf scarves, hoof hooves, thief thieves, tomato tomatoes, potato "
        "potatoes, mango mangoes, hero heroes, volcano volcanoes, torpedo torpedoes, domino dominoes, mosquito "
        "mosquitoes, quiz quizzes"
    ).split(", ")
)
# Regular plurals that `_singular_word` would take for another word's.
_IRREGULAR |= {
    word: f"{word}s"
    for word in (
        "shoe horseshoe snowshoe toe hoe canoe oboe doe axe pickaxe tie bowtie pie cookie movie zombie "
        "brownie hoodie smoothie selfie genie walkie-talkie fuse emu menu tutu mustache quiche avalanche "
        "headache"
    ).split()
}
_IRREGULAR |= {word: f"{word}es" for word in "thermos rhinoceros lens iris canvas atlas gas trellis".split()}
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
# Plurals of words in "-se". Any other in "-ses" is "es" after a word in "-s": "buses", and "boxerses" as published.
_OF_SE = re.compile(
    r"(horse|hearse|nurse|purse|curse|course|verse|corpse|lapse|eclipse|ellipse|pulse|license|response|sense|expense|"
    r"expanse|fense|crevasse|mousse|aise|vase|case|chase|phase|phrase|ease|eese|oise|uise|rise|cise|chise|mise|dise|"
    r"vise|tise|primrose|tuberose|overdose|purpose|prose|close|oose|ouse|\b(rose|nose|hose|dose|pose)|base)s$"
)


class _Phrase(NamedTuple):
    noun: str
    color: str  # "" if none was said
    number: int | None  # None if the phrase has an article

    @property
    def attr_noun(self) -> str:
        return f"{self.color} {self.noun}".lstrip()


# ----- words


def article(phrase: str) -> str:
    """ "a" or "an", by the first sound of `phrase` ("an hourglass", "a unicorn"). A rule with known exceptions."""
    if phrase.startswith(("hour", "heir", "honest", "honor")):
        return "an"
    if phrase.startswith(("uni", "use", "euro", "ukulele", "one", "ewe")):
        return "a"
    return "an" if phrase[:1] in tuple("aeiou") else "a"


def plural(noun: str) -> str:
    """Plural of a lower-case noun; of "teddy bear" only the last word changes, and "boxers" is one already."""
    head, _, last = noun.rpartition(" ")
    return f"{head} {_plural_word(last)}".lstrip()


def singular(noun: str) -> str:
    """Singular of a lower-case plural noun. Also knows published plurals ("benchs", "knifes", "boxerses")."""
    head, _, last = noun.rpartition(" ")
    return f"{head} {_singular_word(last)}".lstrip()


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _INVARIANT or word in _SINGULAR or re.search(r"[^su]s$", word):  # the last is "boxers", "bras", "skis"
        return word
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _singular_word(word: str) -> str:
    if word in _INVARIANT:
        return word
    if word in _SINGULAR:
        return _SINGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(s|x|zz|tz|ch|sh)es$", word) and not _OF_SE.search(word):
        return word[:-2]
    return word[:-1] if re.search(r"[^su]s$", word) else word


# ----- text -> fields


def read(text: str) -> Prompt:
    """Recognise a GenEval-style prompt. Never raises: a text outside the grammar is `Prompt(text)` without fields.

    Nouns are lower-case singulars without article, in the order of the text. `attr_nouns` is filled as soon as one
    colour is named and stays in step with `nouns`: "a red apple and a vase" gives ("red apple", "vase").
    """
    if len(text) > _MAX_CHARACTERS:
        return Prompt(text)
    words = normalize(text).split()
    words = words[_lead_length(words) :]
    for start in range(1, len(words)):
        length = _relation_length(words, start)
        if length or words[start] == "and":
            between = " ".join(words[start : start + length])
            return _two(text, _phrase(words[:start]), between, _phrase(words[start + (length or 1) :]))
    return _one(text, _phrase(words))


def _lead_length(words: list[str]) -> int:
    return next((len(lead) for lead in _LEADS if tuple(words[: len(lead)]) == lead), 0)


def _relation_length(words: list[str], start: int) -> int:
    return next((len(r) for r in _RELATION_WORDS if tuple(words[start : start + len(r)]) == r), 0)


def _phrase(words: list[str]) -> _Phrase | None:
    if len(words) < 2 or words[0] not in ("a", "an", "the", *_NUMBERS):
        return None
    number, words = _NUMBERS.get(words[0]), words[1:]
    color = words[0].replace("grey", "gray") if len(words) > 1 else ""  # a lone "orange" is the fruit
    if color in COLORS:
        words = words[1:]
    else:
        color = ""
    noun = _noun(words, several=number is not None and number > 1)
    return _Phrase(noun, color, number) if noun else None


def _noun(words: list[str], several: bool) -> str:
    """The singular noun, or "" if these words are none."""
    last = words[-1]
    if len(words) > _MAX_NOUN_WORDS or not all(_WORD.fullmatch(word) for word in words):
        return ""
    if not _CLOSED.isdisjoint(words) and words != ["orange"]:
        return ""
    if last.endswith("ing") and last not in _NOUNS_IN_ING:
        return ""  # "a man running"
    if any(word.endswith("ed") and len(word) > 5 for word in words[1:]):
        return ""  # "a ship sailed away"; but "a potted plant", "a flower bed"
    if not several:
        return " ".join(words)
    one = singular(last)
    return " ".join([*words[:-1], one]) if one != last or last in _INVARIANT else ""


def _one(text: str, phrase: _Phrase | None) -> Prompt:
    if phrase is None:
        return Prompt(text)
    nouns = (phrase.noun,)
    attr_nouns = (phrase.attr_noun,) if phrase.color else ()
    if phrase.number is not None:
        return Prompt(text, "counting", nouns, attr_nouns, counts=((phrase.noun, phrase.number),))
    return Prompt(text, "colors" if phrase.color else "single_object", nouns, attr_nouns)


def _two(text: str, first: _Phrase | None, relation: str, second: _Phrase | None) -> Prompt:
    if first is None or second is None:
        return Prompt(text)
    nouns = (first.noun, second.noun)
    attr_nouns = (first.attr_noun, second.attr_noun) if first.color or second.color else ()
    counted = first.number is not None or second.number is not None
    if relation and counted:
        return Prompt(text)
    if relation:
        task = "spatial_3d" if relation in DEPTH_RELATIONS else "position"
        return Prompt(
            text, task, nouns, attr_nouns, spatial=(first.noun, RELATIONS.get(relation, relation), second.noun)
        )
    if counted:
        counts = ((first.noun, first.number or 1), (second.noun, second.number or 1))
        return Prompt(text, "counting", nouns, attr_nouns, counts=counts)
    return Prompt(text, "color_attr" if attr_nouns else "two_object", nouns, attr_nouns)


# ----- fields -> text


def write(nouns: Sequence[str], *, colors: Sequence[str] = (), relation: str = "", count: int = 1) -> str:
    """The prompt that `read` gives back these fields for.

    Args:
        nouns: one or two singular nouns.
        colors: nothing, or for each noun one of `COLORS` or "".
        relation: "", or for two nouns one of `RELATIONS` or `DEPTH_RELATIONS`: `nouns[0] relation nouns[1]`.
        count: how many of a single noun, 1..MAX_COUNT; 1 is said with an article.

    Raises:
        ValueError: anything else; the message carries the value.
    """
    colors = tuple(colors) or ("",) * len(nouns)
    if isinstance(nouns, str) or len(nouns) not in (1, 2):
        raise ValueError(f"nouns={nouns!r}: give a sequence of one or two nouns")
    if len(colors) != len(nouns) or not {*colors} <= {"", *COLORS}:
        raise ValueError(f"colors={colors!r}: give {len(nouns)} colour(s), each '' or one of {', '.join(COLORS)}")
    if relation and (len(nouns) != 2 or relation not in (*RELATIONS, *DEPTH_RELATIONS)):
        known = [*RELATIONS, *DEPTH_RELATIONS]
        raise ValueError(f"relation={relation!r} of {len(nouns)} noun(s): give two nouns and one of {known}")
    if not 1 <= count <= (MAX_COUNT if len(nouns) == 1 else 1):
        raise ValueError(f"count={count} of {len(nouns)} noun(s): give 1..{MAX_COUNT} and a single noun")
    names = [f"{color} {noun}".lstrip() for color, noun in zip(colors, nouns, strict=True)]
    if count > 1:
        return f"{LEAD} {_NUMBER_WORDS[count - 1]} {plural(names[0])}"
    return f"{LEAD} " + f" {relation or 'and'} ".join(f"{article(name)} {name}" for name in names)


# ----- equality


def canonical(prompt: Prompt) -> tuple:
    """What the prompt asks for, however it is worded: equal tuples mean that one would leak the other.

    Two objects are unordered, "A left of B" equals "B right of A" and "A to the left of B", "A behind B" equals "B in
    front of A". A prompt whose fields do not say all of it, being of another task or without nouns, is only equal to
    its own text.
    """
    if prompt.task not in (*TASKS, *SAID_BY_FIELDS) or not prompt.nouns:
        return ("", normalize(prompt.text))
    names = prompt.attr_nouns if len(prompt.attr_nouns) == len(prompt.nouns) else prompt.nouns
    if prompt.task in ("position", "spatial_3d") and prompt.spatial:
        return (prompt.task, *_canonical_relation(prompt, names))
    if prompt.task == "counting" and len(prompt.counts) == len(names):
        return ("counting", *sorted((n, name) for (_, n), name in zip(prompt.counts, names, strict=True)))
    return (prompt.task, *sorted(names))


def _canonical_relation(prompt: Prompt, names: tuple[str, ...]) -> tuple[str, str, str]:
    first, relation, second = prompt.spatial
    if prompt.nouns == (first, second):
        first, second = names
    direction, swapped = _DIRECTIONS.get(RELATIONS.get(relation, relation), (relation, False))
    if swapped or (direction == "near" and second < first):
        first, second = second, first
    return direction, first, second
