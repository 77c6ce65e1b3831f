"""Is all that a prompt asks for still said in a rewrite? `lost(prompt, rewrite)` names what is not.

Words are compared, nothing is drawn and no model is asked. Wording is free: singular or plural, "2" or "two" or two
things listed one by one, "A left of B" or "B to the right of A" or "A at the top left, B on the right". An attribute
must stand with its noun ("a red apple", "the apple is red"), a number with its noun, a relation between its two.

    objects, attributes, numbers, relations     of the prompt's fields
    negated things ("without a lamp")           of its text: the rewrite must not bring them in
    other numbers and colours                   of its text: they must come up somewhere

Left out: synonyms of nouns, pronouns but for "it" and "them", and all that takes understanding. A rewrite that is
called lost although a reader would find everything costs one more answer of the teacher; one that is kept although
something is missing teaches the policy to forget, so where words cannot settle it, fields must be found again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, product
from typing import NamedTuple

from data.grammar import COLORS, plural, singular
from interfaces import Prompt

_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[.,;:!?()\n]")
_MOST_WORDS = 1000  # of a text that are read: more than any image model reads
_HARD = frozenset(".;!?\n")  # ends a sentence; a list of things may go on beyond ", : ( )"
_SOFT = frozenset(",:()")

_NUMBERS = {
    word: number
    for number, word in enumerate(
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split(),
        1,
    )
}
_GROUPS = {"pair": 2, "couple": 2, "duo": 2, "trio": 3, "triplet": 3, "quartet": 4, "quintet": 5, "dozen": 12}
_NEW = frozenset("a an another".split())  # introduce one more thing
_KNOWN = frozenset("the this that these those both each every all his her its their my your our".split())
_DETERMINERS = _NEW | _KNOWN
_NEGATORS = frozenset("no not without nor neither lacks lacking lack absent minus devoid free".split())
_PREPOSITIONS = frozenset(
    "of in on at by to from into onto with without over under near behind between among through across around along "
    "against inside outside above below beside beneath underneath atop next left right upon toward towards".split()
)
_VERBS = frozenset(
    "is are was were be has have had sits sit stands stand lies lie rests rest hangs hang floats float hovers hover "
    "walks walk runs run appears appear shows show features feature".split()
)
_STOPS = _PREPOSITIONS | _VERBS | frozenset("and or but as while which who where it they them".split()) | _NEGATORS
_UNNAMED = _STOPS | _DETERMINERS | {"any"}  # no part of a name
_SURFACES = frozenset(
    "fur coat hair feathers plumage finish paint skin petals surface texture shape hue shade tone color colour".split()
)
_LINKS = _SURFACES | frozenset(  # may stand between a noun and a colour said after it
    ", in of a an that which with its colored coloured painted dyed tinted made out from entirely mostly all very "
    "deep bright dark light pale vivid rich pure solid glossy matte soft warm cool smooth shiny silky thick long "
    "short shades tones".split()
)
_CLOSERS = (
    _STOPS | _DETERMINERS | _SURFACES | {"one", "ones", *COLORS}
)  # an attribute before one of these ends its phrase
_COPULAS = frozenset("is are was were appears appear looks look being".split())
_SAME = [  # attributes that say one thing
    {"wooden", "wood"}, {"golden", "gold"}, {"woolen", "woollen", "wool"}, {"metallic", "metal"}, {"silken", "silk"},
    {"big", "large", "huge", "giant", "enormous", "oversized", "massive"}, {"small", "little", "tiny", "miniature"},
    {"round", "circular", "spherical"}, {"rectangular", "rectangle"}, {"triangular", "triangle"},
    {"oval", "elliptical"},
    {"fluffy", "furry"}, {"tall", "towering"}, {"cubic", "cube", "cubical"}, {"conical", "cone"}, {"pink", "rosy"},
    {"gray", "grayish"}, {"blue", "bluish"}, {"red", "reddish"}, {"green", "greenish"}, {"yellow", "yellowish"},
]  # fmt: skip
_MEANING = {word: frozenset(words) for words in _SAME for word in words}

# What may stand between two things -> (axis, sign): the first is at the lower (-1) or higher (+1) end of that axis,
# x to the right, y down, z away from the viewer.
_RELATIONS = {
    tuple(phrase.split()): meaning
    for meaning, phrases in {
        ("x", -1): ("left of", "left side of", "left hand side of", "its left"),
        ("x", 1): ("right of", "right side of", "right hand side of", "its right"),
        ("y", -1): ("above", "over", "atop", "on top of", "on the top of", "on", "upon"),
        ("y", 1): ("below", "under", "underneath", "beneath", "on the bottom of"),
        ("z", -1): ("in front of",),
        ("z", 1): ("behind", "in back of", "at the back of", "hidden by", "obscured by", "concealed by"),
        ("near", 0): (
            "next to", "beside", "near", "alongside", "adjacent to", "close to", "by", "against", "on side of",
            "on the side of", "at the side of", "along with", "together with",
        ),
    }.items()
    for phrase in phrases
}  # fmt: skip
_BY_FIRST_WORD = {  # longest first
    first: sorted((words for words in _RELATIONS if words[0] == first), key=len, reverse=True)
    for first in {words[0] for words in _RELATIONS}
}
_SIDES = {"left": -1, "leftmost": -1, "right": 1, "rightmost": 1}
_HEIGHTS = {"top": -1, "upper": -1, "topmost": -1, "bottom": 1, "lower": 1, "bottommost": 1}
_MIDDLES = frozenset("center centre middle central".split())
_DEPTHS = {"foreground": -1, "background": 1}
_PLACES = frozenset((*_SIDES, *_HEIGHTS, *_MIDDLES, *_DEPTHS))
_PLACE_OPENERS = frozenset("the at in on to toward towards near from far very extreme along".split())
_PLACE_PARTS = frozenset("side hand corner half part edge third area portion section quadrant most".split())
_FRAMES = frozenset(
    "image frame picture scene canvas composition photo photograph view page screen painting drawing shot center "
    "centre".split()
)


class _Mention(NamedTuple):
    """One time that a noun is said.

    Attributes:
        noun: which.
        start, end: its words are words[start:end].
        before: the words of its phrase that stand before it, nearest first, determiner left out.
        number: how many things it brings in; None if it speaks of known ones ("the", "both") or gives no number.
        many: whether it is said in the plural.
        sentence: index of its sentence.
    """

    noun: str
    start: int
    end: int
    before: tuple[str, ...]
    number: int | None
    many: bool
    sentence: int


class _Place(NamedTuple):
    """Where a mention is said to stand; None on an axis of which nothing is said."""

    x: int | None
    y: int | None
    z: int | None


def lost(prompt: Prompt, rewrite: str) -> tuple[str, ...]:
    """What `prompt` asks for and `rewrite` no longer says, as "object square", "number 3 circle", ...; () if nothing.

    Fields that the prompt's own text does not say (metadata of other hands has such) are not asked of a rewrite.
    """
    asked = _Text(prompt.text)
    gone = _missing(prompt, asked, _Text(rewrite))
    unsaid = _missing(prompt, asked, asked) if gone else []
    return tuple(thing for thing in gone if thing not in unsaid)


def _missing(prompt: Prompt, asked: _Text, said: _Text) -> list[str]:
    unwanted = asked.negated_things()
    nouns = [noun for noun in dict.fromkeys(prompt.nouns) if noun not in unwanted]
    said.read(nouns)
    gone = [f"object {noun}" for noun in nouns if not said.mentions[noun]]
    there = {noun for noun in nouns if said.mentions[noun]}
    numbers = dict(prompt.counts)
    for phrase in prompt.attr_nouns:
        noun, attribute = _split(phrase, nouns)
        if noun in there and attribute and not said.has_attribute(noun, attribute, numbers.get(noun, 1)):
            gone.append(f"attribute {phrase}")
    for noun, number in prompt.counts:
        if noun in there and not said.has_number(noun, number):
            gone.append(f"number {number} {noun}")
    if prompt.spatial and {prompt.spatial[0], prompt.spatial[2]} <= there and not said.has_relation(*prompt.spatial):
        gone.append(f"relation {' '.join(prompt.spatial)}")
    gone += [f"absence of {thing}" for thing in unwanted if said.brings_in(thing)]
    asked.read(nouns)
    fields = [phrase for phrase in prompt.attr_nouns if asked.mentions.get(_split(phrase, nouns)[0])]
    covered = {*map(str, numbers.values()), *" ".join(fields).split()}
    return gone + [name for name in _loose_ends(asked, said) if name.split()[1] not in covered]


def _split(phrase: str, nouns: Sequence[str]) -> tuple[str, str]:
    """(noun, attribute) of "purple teddy bear"; the attribute is "" if the phrase is the noun alone."""
    for noun in sorted(nouns, key=len, reverse=True):
        if phrase == noun:
            return noun, ""
        if phrase.endswith(f" {noun}"):
            return noun, phrase[: -len(noun) - 1]
    return "", ""


def _loose_ends(asked: _Text, said: _Text) -> Iterator[str]:
    """Numbers above one and colours of the text that come up nowhere in the rewrite."""
    colors = [word for word, no in zip(asked.words, asked.negated, strict=True) if word in COLORS and not no]
    for color in dict.fromkeys(colors):
        if not _MEANING.get(color, {color}) & said.vocabulary:
            yield f"colour {color}"
    there = {_number(word) for word in said.words} | {_GROUPS.get(word) for word in said.words}
    for i, word in enumerate(asked.words):
        number = _number(word)
        if number <= 1 or number in there or asked.negated[i]:
            continue
        thing = next((w for w in asked.words[i + 1 : i + 4] if singular(w) != w), "")
        said.read([singular(thing)] if thing else [])
        if not (thing and said.has_number(singular(thing), number)):
            yield f"number {number}"


def _number(word: str) -> int:
    """0 if the word is no number."""
    return int(word) if word.isdecimal() and len(word) < 6 else _NUMBERS.get(word, 0)


def _words(text: str) -> list[str]:
    """Lower-case words and punctuation marks; "grey" is "gray", "dog's" is "dog", "bright-red" is two words."""
    tokens = islice(_TOKEN.finditer(text.lower().replace("grey", "gray")), _MOST_WORDS)
    return [re.sub(r"['’]s$", "", token[0]) for token in tokens]


@lru_cache(maxsize=4096)
def _forms(noun: str) -> dict[tuple[str, ...], bool]:
    """The words of a noun -> whether they are a plural, GenEval's "benchs" and "sheeps" among them."""
    many = {tuple(_words(form)): True for form in (plural(noun), noun + "s", noun + "es")}
    return {form: is_many for form, is_many in {**many, tuple(_words(noun)): False}.items() if form}


class _Text:
    """A text as words, with what is said in it of given nouns."""

    def __init__(self, text: str):
        self.words = _words(text)
        self.vocabulary = frozenset(self.words)
        self.sentences: list[int] = []
        for word in self.words:
            last = self.sentences[-1] if self.sentences else 0
            self.sentences.append(last + (word in _HARD))
        self.negated = self._scopes()
        self.mentions: dict[str, list[_Mention]] = {}

    def _scopes(self) -> list[bool]:
        """Of each word, whether a "no" or "without" before it denies it: "no cups, plates or forks on a table"."""
        negated, inside = [], False
        for i, word in enumerate(self.words):
            after, following = self.words[i - 1 : i], self.words[i + 1 : i + 8]
            closed = word in _HARD or word in ("but", "with", "while", "just", "only")
            closed = closed or (word == "," and not {"or", "nor"} & set(following))
            closed = closed or (word in _DETERMINERS and after in ([","], ["and"]))
            inside = inside and not closed
            negated.append(inside)
            inside = inside or (word in _NEGATORS and (word != "free" or following[:1] == ["of"]))
        return negated

    def negated_things(self) -> list[str]:
        """The singular names of what the text denies: "a kitchen without a lamp" -> ["lamp"]."""
        things, name = [], []
        for word, no in zip([*self.words, "."], [*self.negated, False], strict=True):
            verb = bool(name) and word.endswith(("ing", "ed"))
            if no and word.isalpha() and not verb and word not in _UNNAMED:
                name.append(word)
            elif name:
                things.append(singular(" ".join(name)))
                name = []
                if word not in (",", "or", "and", "nor"):
                    break
        return things

    # ----- mentions

    def read(self, nouns: Sequence[str]) -> None:
        """Find the mentions of `nouns` that are not denied; of "bear" and "teddy bear" each has its own."""
        new = [noun for noun in nouns if noun not in self.mentions]
        lasts = frozenset(form[-1] for noun in new for form in _forms(noun))
        taken: set[int] = set()
        for noun in sorted(new, key=len, reverse=True):
            found = sorted(
                (start, start + len(form), many) for form, many in _forms(noun).items() for start in self._starts(form)
            )
            own = [(start, end, many) for start, end, many in found if start not in taken and end - 1 not in taken]
            taken.update(i for start, end, _ in own for i in range(start, end))
            self.mentions[noun] = [self._mention(noun, *span, lasts) for span in own if not self._denied(*span[:2])]

    def _starts(self, name: tuple[str, ...]) -> list[int]:
        if name[-1] not in self.vocabulary:
            return []
        size = len(name)
        return [i for i in range(len(self.words) - size + 1) if tuple(self.words[i : i + size]) == name]

    def _denied(self, start: int, end: int) -> bool:
        return self.negated[start] or self.words[end : end + 2] in (["is", "absent"], ["are", "absent"])

    def _mention(self, noun: str, start: int, end: int, many: bool, lasts: frozenset[str]) -> _Mention:
        before, determiner, at = self._phrase(start, lasts)
        number = None
        if determiner in _NEW or (not many and determiner not in _KNOWN):
            number = 1
        if _number(determiner):
            number = None if at and self.words[at - 1] in _KNOWN else _number(determiner)
        elif many:
            number = _GROUPS.get(self.words[at - 1] if determiner == "of" else determiner, number)
        return _Mention(noun, start, end, before, number, many, self.sentences[start])

    def _phrase(self, start: int, lasts: frozenset[str]) -> tuple[tuple[str, ...], str, int]:
        """(words before the noun, nearest first; what opens the phrase; where that is).

        "a glossy, red apple" is one phrase, "cups, red apples" is not: a comma is crossed only on the way to a
        determiner or number, "and" only between two colours.
        """
        before, comma = [], None
        for i in range(start - 1, max(-1, start - 10), -1):
            word = self.words[i]
            if word in _DETERMINERS or _number(word) or word in _GROUPS:
                return tuple(before), word, i
            if word == ",":
                comma = len(before) if comma is None else comma
            elif word == "and" and i and self.words[i - 1] in COLORS:
                continue
            elif word in _STOPS or word in _HARD or word in _SOFT or word in lasts:
                return tuple(before[:comma]), word, i
            else:
                before.append(word)
        return tuple(before[:comma]), "", 0

    # ----- what is said of them

    def has_attribute(self, noun: str, attribute: str, number: int) -> bool:
        """Is `attribute` said of `noun`, and of as many as `number`?"""
        with_it = [m for m in self.mentions[noun] if all(self._is(m, word) for word in attribute.split())]
        if number <= 1:
            return bool(with_it)
        return any(m.many for m in with_it) or sum(m.number or 0 for m in with_it) >= number

    def _is(self, mention: _Mention, attribute: str) -> bool:
        meaning = _MEANING.get(attribute, frozenset({attribute}))
        if not meaning.isdisjoint(mention.before):
            return True
        free = False  # after "is" any adjectives may come first
        for i in range(mention.end, min(len(self.words), mention.end + 9)):
            word = self.words[i]
            if word in meaning:
                return self._closes(i + 1)
            if word in _COPULAS:
                free = True
            elif word in _STOPS and word not in _LINKS and not (free and word == "and"):
                return False
            elif word not in _LINKS and word not in COLORS and not (free and word.isalpha()):
                return False
        return False

    def _closes(self, i: int) -> bool:
        """Does the word at `i` not go on with a noun that the attribute before it would belong to?"""
        if i == len(self.words):
            return True
        word = self.words[i]
        return not word.isalpha() or word in _CLOSERS

    def has_number(self, noun: str, number: int) -> bool:
        """Are there `number` of them: said with that number, or as many brought in one by one?

        Beside "three cats" single ones may come up again ("a cat on the left"), but no more than three, and the
        number itself in another sentence.
        """
        brought = [m for m in self.mentions[noun] if m.number is not None]
        total = sum(m.number for m in brought)
        if total == number:
            return True
        said = [m for m in brought if m.number == number]
        others = [m for m in brought if m.number != number]
        if number == 1:
            return bool(self.mentions[noun]) and not others and len({m.sentence for m in said}) == len(said)
        apart = len({m.sentence for m in said}) == len(said) > 0
        return apart and all(m.number == 1 for m in others) and len(others) <= number

    def brings_in(self, thing: str) -> bool:
        """Is `thing` said anywhere without being denied?"""
        self.read([thing])
        return bool(self.mentions[thing])

    # ----- relations

    def has_relation(self, first: str, relation: str, second: str) -> bool:
        """Is "first relation second" said, or its inverse, or by places; and not the contrary?"""
        words = tuple(relation.split())
        meaning = _RELATIONS.get(words) or _RELATIONS.get(words[2:])  # "to the left of", "on the right side of"
        if meaning is None:
            return True  # no words for it are known here
        axis, sign = meaning
        both = sorted({*self.mentions[first], *self.mentions[second]}, key=lambda mention: mention.start)
        spoken, placed = set(), set()
        for a, (its_axis, its_sign), b in self._spoken(both):
            if axis == "near":
                spoken |= {1} if its_axis in ("near", "x") else set()
            elif its_axis == axis and (a != b or first == second):
                spoken.add(1 if (its_sign if a == first else -its_sign) == sign else -1)
        places = list(self._placed(both))
        for (a, here), (b, there) in product(places, places):
            if a is not b and (a.noun, b.noun) == (first, second):
                placed |= self._compared(here, there, axis, sign)
        if axis == "near" and re.search(r"\b(side by side|each other|together)\b", " ".join(self.words)):
            spoken.add(1)
        verdicts = [1 if 1 in found else -1 for found in (spoken, placed) if found]
        return 1 in verdicts and -1 not in verdicts

    def _compared(self, here: _Place, there: _Place, axis: str, sign: int) -> set[int]:
        """{1} if the two places say it, {-1} if they say the contrary, else nothing."""
        if axis == "near":
            return {1} if here.y is not None and here.y == there.y else set()
        one, two = ((p.x, p.y, p.z)["xyz".index(axis)] for p in (here, there))
        if one is None or two is None or one == two:
            return set()
        return {1} if (one < two) == (sign < 0) else {-1}

    def _spoken(self, both: Sequence[_Mention]) -> Iterator[tuple[str, tuple[str, int], str]]:
        """(thing, axis and sign, thing) of each relation that is spoken out between mentions."""
        nouns = list(dict.fromkeys(mention.noun for mention in both))
        for start, end, meaning in self._phrases():
            sentence = self.sentences[start]
            its = self.words[start] == "its" or self.words[end : end + 1] in (["it"], ["them"])
            end += self.words[end : end + 1] in (["it"], ["them"])
            before = [m for m in both if m.end <= start and m.sentence == sentence]
            after = [m for m in both if m.start >= end and m.sentence == sentence]
            near = after[0] if after and self._reaches(end, after[0]) else None
            if its and len(nouns) == 2:  # "beneath it, a cat", or "a cat beneath it"
                subject = near or (before[-1] if before else None)
                object_ = next((noun for noun in nouns if subject and noun != subject.noun), None)
            elif near:
                object_ = near.noun
                fronted = not before or (before[-1].noun == object_ and len(nouns) == 2)  # "above the dog is a cat"
                others = [m for m in after[1:] if m.noun != object_ or len(nouns) == 1] if fronted else before[-1:]
                subject = others[0] if others else None
            else:
                continue
            if subject and object_:
                yield subject.noun, meaning, object_

    def _phrases(self) -> Iterator[tuple[int, int, tuple[str, int]]]:
        """(start, end, axis and sign) of each relation's words, longest first, none within another."""
        i = 0
        while i < len(self.words):
            candidates = _BY_FIRST_WORD.get(self.words[i], ())
            found = next((r for r in candidates if tuple(self.words[i : i + len(r)]) == r), None)
            if found:
                yield i, i + len(found), _RELATIONS[found]
            i += len(found or (1,))

    def _reaches(self, i: int, mention: _Mention) -> bool:
        """Is there nothing between word `i` and the mention but what belongs to its phrase?"""
        between = self.words[i : mention.start]
        if between[:1] == [","]:
            between = between[1:]
        new = [word for word in between if word in _DETERMINERS or _number(word)]
        others = [word for word in between if word in _STOPS or word in _HARD or word in _SOFT - {","}]
        return len(new) <= 1 and len(between) <= 8 and not others

    # ----- places

    def _placed(self, both: Sequence[_Mention]) -> Iterator[tuple[_Mention, _Place]]:
        """Mentions with the place that is said of them: "a cat on the left", or "on the left, a cat"."""
        runs = list(self._place_runs())
        taken = set()
        for start, end, place in runs:
            sentence = [m for m in both if m.sentence == self.sentences[start]]
            first_run = next(run for run in runs if self.sentences[run[0]] == self.sentences[start])
            before = [m for m in sentence if m.end <= start]
            after = [m for m in sentence if m.start >= end]
            opening = self.sentences.index(self.sentences[start])
            leads = bool(sentence) and first_run[0] < sentence[0].start and not self._brought(opening, first_run[0])
            owner = None
            if leads and after and self._brought(end, after[0].start) <= 1:
                owner = after[0]
            elif before and (not leads or not after) and self._same_thing(before[-1].end, start):
                owner = before[-1]
            if owner and owner.start not in taken:
                taken.add(owner.start)
                yield owner, place

    def _place_runs(self) -> Iterator[tuple[int, int, _Place]]:
        i = 0
        while i < len(self.words):
            start = i
            while i < len(self.words) and self.words[i] in _PLACES:
                i += 1
            if i > start and start and self.words[start - 1] in _PLACE_OPENERS and self._is_place(i):
                yield start, i, _place(self.words[start:i])
            i += i == start

    def _is_place(self, i: int) -> bool:
        """After a place may come "side" and "corner", and "of the image", but no "of" another thing."""
        while i < len(self.words) and self.words[i] in _PLACE_PARTS:
            i += 1
        if self.words[i : i + 1] != ["of"]:
            return True
        return not _FRAMES.isdisjoint(self.words[i + 1 : i + 4])

    def _brought(self, start: int, end: int) -> int:
        return sum(word in _NEW or _number(word) > 0 for word in self.words[start:end])

    def _same_thing(self, start: int, end: int) -> bool:
        """Does no other thing come in between, after a comma or an "and"? "A cat, a tabby, sits" is one thing."""
        between = self.words[start:end]
        apposed = next((i for i, word in enumerate(between) if i and word == ","), None)
        if apposed and between[0] == "," and between[apposed + 1 : apposed + 2] and between[apposed + 1] in _VERBS:
            between, start = between[apposed + 1 :], start + apposed + 1
        breaks = [i for i, word in enumerate(between) if word in (",", "and", "while", "or")]
        return not breaks or not self._brought(start + breaks[0], end)


def _place(words: Sequence[str]) -> _Place:
    depth = next((_DEPTHS[word] for word in words if word in _DEPTHS), None)
    if all(word in _DEPTHS for word in words):
        return _Place(None, None, depth)
    side = next((_SIDES[word] for word in words if word in _SIDES), 0)
    height = next((_HEIGHTS[word] for word in words if word in _HEIGHTS), 0)
    return _Place(side, height, depth)
