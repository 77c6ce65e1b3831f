"""Is all that a prompt asks for still said in a rewrite? `lost(prompt, rewrite)` names what is not.

    quoted text ("Open"; or: that says Open)    of its text: letter for letter, between marks of any kind
    objects, attributes, numbers, relations     of the prompt's fields
    negated things ("without a lamp")           of its text: the rewrite must not bring them in
    other numbers and colours                   of its text: they must come up somewhere
    content words                               of its text: more than half of them

Words are compared, no model is asked. An attribute must stand before its noun or after "is"; numbers may be said or
listed ("a red dog, a black dog"); a relation may be turned round or said by places ("at the top left"). Few synonyms
are known. A rewrite that is called lost by mistake costs one more answer of the teacher; one that is kept by mistake
teaches the policy to forget, so in doubt it is lost. A prompt in which no word can be looked for is not `can_check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, islice, pairwise, product
from typing import Any, NamedTuple

from data.grammar import COLORS, MEDIA, plural, singular
from data.text import fold, plain
from interfaces import QUOTED, Prompt

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.,;:!?()\n]")
_MOST_WORDS = 1000  # of a text that are read: more than any image model reads
_HARD = frozenset(".;!?\n")  # ends a sentence; a list of things may go on beyond ", : ( )"
_SOFT = frozenset(",:()")

_NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS.split(), 1)}
_PAIRS = {"pair": 2, "couple": 2, "trio": 3, "dozen": 12}
_NEW = frozenset("a an another".split())  # introduce one more thing
_KNOWN = frozenset("the this that these those both each every all his her its their my your our".split())
_DETERMINERS = _NEW | _KNOWN
_NEGATORS = frozenset("no not without nor neither lacks lacking lack absent minus devoid free".split())
_CLOSERS = _HARD | {"but", "with", "while", "just", "only"}  # what a negation does not go beyond
_PREPOSITIONS = frozenset(
    "of in on at by to from into onto with without over under near behind between among through across around along "
    "against inside outside above below beside beneath underneath atop next left right upon toward towards".split()
)
_COPULAS = frozenset("is are was were".split())
_VERBS = _COPULAS | frozenset(
    "be has have had sits sit stands stand lies lie rests rest hangs hang floats float hovers hover walks walk runs "
    "run appears appear shows show features feature".split()
)
_STOPS = _PREPOSITIONS | _VERBS | frozenset("and or but as while which who where it they them".split()) | _NEGATORS
_UNNAMED = _STOPS | _DETERMINERS | {"any"}  # no part of a name
_SAME = [  # attributes that say one thing
    {"wooden", "wood"}, {"golden", "gold"}, {"woolen", "woollen"}, {"metallic", "metal"}, {"round", "circular"},
    {"big", "large", "huge", "giant", "enormous", "oversized", "massive"}, {"small", "little", "tiny", "miniature"},
    {"red", "crimson", "scarlet"}, {"purple", "violet"}, {"blue", "azure", "navy"}, {"green", "emerald"},
    {"child", "kid", "boy", "girl", "toddler"}, {"man", "gentleman", "guy"}, {"woman", "lady"}, {"old", "elderly"},
    {"sea", "ocean"}, {"street", "road"}, {"sofa", "couch"}, {"airplane", "plane"}, {"bike", "bicycle"},
    {"forest", "woods"}, {"rock", "stone"},
]  # fmt: skip
_MEANING = {word: frozenset(words) for words in _SAME for word in words}

# What may stand between two things -> (axis, sign): the first is at the lower (-1) or higher (+1) end of that axis,
# x to the right, y down, z away from the viewer.
_RELATIONS = {
    tuple(phrase.split()): meaning
    for meaning, phrases in {
        ("x", -1): ("left of", "left side of", "its left"),
        ("x", 1): ("right of", "right side of", "its right"),
        ("y", -1): ("above", "over", "atop", "on top of", "on"),
        ("y", 1): ("below", "under", "underneath", "beneath", "on the bottom of"),
        ("z", -1): ("in front of",),
        ("z", 1): ("behind", "hidden by"),
        ("near", 0): ("next to", "beside", "near", "on side of", "on the side of", "by"),
    }.items()
    for phrase in phrases
}
_ENDS = {  # word of a place -> axis and end; "center" is the middle of both
    "left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "upper": ("y", -1), "bottom": ("y", 1), "lower": ("y", 1),
    "foreground": ("z", -1), "background": ("z", 1), "center": ("x", 0), "centre": ("x", 0), "middle": ("x", 0),
}  # fmt: skip
_PLACES = {words: dict(_ENDS[word] for word in words) for n in (1, 2) for words in product(_ENDS, repeat=n)}
_PLACE_OPENERS = frozenset("the at in on to far".split())

_TOLD = re.compile(  # words with capitals that are not between marks
    r"\b(?:says?|saying|reads?|reading|words?|text|letters|labell?ed|titled|inscribed)(?: with| as)?[:,]? "
    r"([A-Z][\w'’&-]*(?: [A-Z0-9][\w'’&-]*)*)"
)
# What a rewrite may leave out: words of style and of asking, and verbs and persons that say next to nothing.
_FILLERS = """
realistic photography photographic photorealistic style detail quality high resolution hd uhd cinematic art artwork
render masterpiece beautiful scene please create generate make show depict close up there some being been very so too
also then than such other we you me us about before during for off out down away when because whose what together
person people someone somebody do does did get go side lot several many few much more most thing empty just still look
play hold take use wear start be has have had sit sat stand stood lie lying put place rest appear feature word text
letter say read written
"""
_FOREIGN = frozenset(
    "un une le la les de des du et sur dans avec der die das dem den ein eine einen einer und mit auf im am el los "
    "las del una con en y il sul della di een het op van um uma na em på och ett".split()
)


class _Mention(NamedTuple):
    """One time that a noun is said, as words[start:end]."""

    noun: str
    start: int
    end: int
    before: tuple[str, ...]  # the words of its phrase before it, without the determiner
    number: int | None  # how many things it brings in; None for known ones ("the", "both") and without a number
    many: bool  # said in the plural
    sentence: int  # index of its sentence


def lost(prompt: Prompt, rewrite: str) -> tuple[str, ...]:
    """What `prompt` asks for and `rewrite` no longer says, as "object square", "number 3 circle", ...; () if nothing.

    Fields that the prompt's own text does not say (metadata of other hands has such) are not asked of a rewrite.
    """
    text, quoted = _take_quotations(prompt.text)
    rest, found = _take_quotations(rewrite)
    gone = [f"text {one}" for one in quoted if one not in found and not _stands_in(one, rest)]
    gone += [f"text {one}" for one in map(_letters, _TOLD.findall(text)) if not _stands_in(one, rewrite)]
    asked, said = _Text(text), _Text(_take_quotations(rewrite, quoted)[0])
    missing = _missing(prompt, asked, said)
    unsaid = _missing(prompt, asked, asked) if missing else []
    gone += [thing for thing in missing if thing not in unsaid]
    return tuple(gone or _missing_words(asked, said))


def can_check(prompt: Prompt) -> bool:
    """Has the text anything that `lost` would miss in any other rewrite: a noun of the fields, or a content word?"""
    asked = _Text(_take_quotations(prompt.text)[0])
    asked.read(prompt.nouns)
    return any(asked.mentions.values()) or bool(asked.content())


def _take_quotations(text: str, which: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """`text` with a mark for each quotation (of `which`, if given), and those; marks around all of it mean nothing."""
    text, found = text.strip(), []
    if (whole := QUOTED.match(text)) and whole.end() == len(text):
        text = text[1:-1]

    def take(match: re.Match) -> str:
        quotation = _letters(match[0]).strip("' ,\\")
        ways = dict.fromkeys((quotation, quotation.removesuffix(".")))  # a full stop may be the sentence's
        if which is not None and ways.keys().isdisjoint(which):
            return match[0]
        found.extend(ways)
        return ' " '

    return QUOTED.sub(take, text), found


def _letters(text: str) -> str:
    """`text` as it is compared letter for letter: marks, widths and blanks of all kinds are alike, case is not."""
    return " ".join(plain(text).replace('"', "'").split())


def _stands_in(quotation: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(quotation)}(?!\w)", _letters(text)) is not None


def _missing_words(asked: _Text, said: _Text) -> list[str]:
    """The missing content words, if they are half or more; numbers and colours have been looked for by now."""
    words = asked.content()
    there = {_stem(word) for word, denied in zip(said.words, said.negated, strict=True) if not denied}
    looked_for = [word for word in words if word not in COLORS and not _number(word)]
    missing = [word for word in looked_for if _stem(word) not in there]
    return [f"words {' '.join(missing)}"] if words and 2 * len(missing) >= len(words) else []


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
    said.read(unwanted)
    gone += [f"absence of {thing}" for thing in unwanted if said.mentions[thing]]
    asked.read(nouns)
    fields = [phrase for phrase in prompt.attr_nouns if asked.mentions.get(_split(phrase, nouns)[0])]
    covered = {*map(str, numbers.values()), *" ".join(fields).split()}
    return gone + [name for name in _loose_ends(asked, said) if name.split()[1] not in covered]


def _split(phrase: str, nouns: Sequence[str]) -> tuple[str, str]:
    """(noun, attribute) of "purple teddy bear"; the attribute is "" if the phrase is the noun alone."""
    for noun in sorted(nouns, key=len, reverse=True):
        if phrase == noun or phrase.endswith(f" {noun}"):
            return noun, phrase[: -len(noun)].strip()
    return "", ""


def _loose_ends(asked: _Text, said: _Text) -> Iterator[str]:
    """Numbers above one and colours of the text that come up nowhere in the rewrite."""
    there = {_number(word) or _PAIRS.get(word) for word in said.words}
    for word, denied in dict.fromkeys(zip(asked.words, asked.negated, strict=True)):
        if word in COLORS and _MEANING.get(word, {word}).isdisjoint(said.words) and not denied:
            yield f"colour {word}"
        if _number(word) > 1 and _number(word) not in there and not denied:
            yield f"number {_number(word)}"


def _number(word: str) -> int:
    """0 if the word is no number."""
    return int(word) if word.isdecimal() and len(word) < 6 else _NUMBERS.get(word, 0)


def _words(text: str) -> list[str]:
    """Lower-case words and punctuation marks; "grey" is "gray", "dog's" is "dog", "bright-red" is two words."""
    tokens = islice(_TOKEN.finditer(fold(text).replace("grey", "gray")), _MOST_WORDS)
    return [token[0].removesuffix("'s") for token in tokens]


@lru_cache(maxsize=4096)
def _stem(word: str) -> str:
    """What "chase", "chases" and "chasing", or "boys" and "child", have in common; a rule with exceptions."""
    word = singular(singular(word))  # "boxerses" is published
    word = min(_MEANING.get(word, (word,)))
    ends = ("ing", "ed", "es", "ly", "er", "y", "e")
    stem = next((word[: -len(end)] for end in ends if word.endswith(end) and len(word) > len(end) + 2), word)
    return (stem[:-1] if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "sl" else stem)[:6]


_SKIPPED = _UNNAMED.difference(_VERBS).union(_COPULAS, _ENDS, _PAIRS, MEDIA, ("photos", "draw"))
_FILLER_STEMS = frozenset(map(_stem, _FILLERS.split()))


@lru_cache(maxsize=4096)
def _forms(noun: str) -> dict[tuple[str, ...], bool]:
    """The words of a noun -> whether they are a plural, GenEval's "benchs" and "sheeps" among them."""
    many = {tuple(_words(form)): True for form in (plural(noun), noun + "s", noun + "es")}
    return {form: is_many for form, is_many in {**many, tuple(_words(noun)): False}.items() if form}


class _Text:
    """A text as words, with what is said in it of given nouns."""

    def __init__(self, text: str):
        self.words = _words(text)
        self.sentences = list(accumulate(word in _HARD for word in self.words))  # number of each word's sentence
        self.negated = self._scopes()
        self.mentions: dict[str, list[_Mention]] = {}

    def _scopes(self) -> list[bool]:
        """Of each word, whether a "no" or "without" before it denies it: "no cups, plates or forks; a table"."""
        negated, inside = [], False
        for i, word in enumerate(self.words):
            list_ends = word == "," and {"or", "nor"}.isdisjoint(self.words[i + 1 : i + 8])
            another = word in _DETERMINERS and self.words[i - 1] == "and"  # "no people and a dog"
            inside = inside and word not in _CLOSERS and not list_ends and not another
            negated.append(inside)
            inside = inside or (word in _NEGATORS and (word != "free" or self.words[i + 1 : i + 2] == ["of"]))
        return negated

    def negated_things(self) -> list[str]:
        """The singular names of what the text denies: "a kitchen without a lamp" -> ["lamp"]."""
        things, name = [], []
        for word, no in zip([*self.words, "."], [*self.negated, False], strict=True):
            if no and word.isalpha() and word not in _UNNAMED:
                name.append(word)
            elif name:
                things.append(singular(" ".join(name)))
                name = []
                if word not in (",", "or", "and", "nor"):
                    break
        return things

    def content(self) -> list[str]:
        """The distinct words that say what is to be seen; none where the text does not seem to be English."""
        if 4 * sum(word in _FOREIGN or not word.isascii() for word in self.words) >= len(self.words):
            return []
        pairs = zip(self.words, self.negated, strict=True)
        told = dict.fromkeys(word for word, denied in pairs if not denied and (word.isalpha() or _number(word)))
        return [w for w in told if w not in _SKIPPED and _stem(w) not in _FILLER_STEMS and _number(w) != 1]

    # ----- mentions

    def read(self, nouns: Sequence[str]) -> None:
        """Find the mentions of `nouns` that are not denied; of "bear" and "teddy bear" each has its own."""
        new = [noun for noun in nouns if noun not in self.mentions]
        lasts = frozenset(form[-1] for noun in new for form in _forms(noun))
        taken: set[int] = set()
        for noun in sorted(new, key=len, reverse=True):
            spans = [
                (i, i + len(form), many)
                for form, many in _forms(noun).items()
                for i, word in enumerate(self.words)
                if word == form[0] and tuple(self.words[i : i + len(form)]) == form
            ]
            own = [(start, end, many) for start, end, many in sorted(spans) if not taken & {start, end - 1}]
            taken.update(i for start, end, _ in own for i in range(start, end))
            self.mentions[noun] = [self._mention(noun, *span, lasts) for span in own if not self.negated[span[0]]]

    def _mention(self, noun: str, start: int, end: int, many: bool, lasts: frozenset[str]) -> _Mention:
        at, before = self._phrase(start, lasts)
        opener, number = self.words[at] if at >= 0 else "", None
        pair = _PAIRS.get(self.words[at - 1] if opener == "of" else opener)
        if _number(opener):
            number = None if at and self.words[at - 1] in _KNOWN else _number(opener)
        elif many or opener not in _KNOWN:
            number = pair if many else 1
        return _Mention(noun, start, end, before, number, many, self.sentences[start])

    def _phrase(self, start: int, lasts: frozenset[str]) -> tuple[int, tuple[str, ...]]:
        """Where the phrase of a noun opens, and its words between there and the noun; "and" may join two colours."""
        before = []
        for i in range(start - 1, max(-1, start - 10), -1):
            word = self.words[i]
            if word in _DETERMINERS or _number(word) or word in _PAIRS:
                return i, tuple(before)
            if word in _STOPS or word in _HARD or word in _SOFT or word in lasts:
                if word != "and" or self.words[i - 1] not in COLORS:
                    return i, tuple(before)
            else:
                before.append(word)
        return -1, tuple(before)

    # ----- what is said of them

    def has_attribute(self, noun: str, attribute: str, number: int) -> bool:
        """Is `attribute` said of `noun`, and of as many as `number`?"""
        with_it = [m for m in self.mentions[noun] if all(self._is(m, word) for word in attribute.split())]
        if number <= 1:
            return bool(with_it)
        return any(m.many for m in with_it) or sum(m.number or 0 for m in with_it) >= number

    def _is(self, mention: _Mention, attribute: str) -> bool:
        told = self.words[mention.end : mention.end + 6]
        ends = [k for k, word in enumerate(told) if k and word in _UNNAMED | _HARD and word != "and"]
        told = told[: ends[0]] if ends else told
        if not told or told[0] not in _COPULAS:
            told = []
        return not _MEANING.get(attribute, frozenset({attribute})).isdisjoint([*mention.before, *told])

    def has_number(self, noun: str, number: int) -> bool:
        """Are there `number` of them: brought in one by one, or at once?

        Beside "three cats" single ones may come up again ("a cat on the left"), but no more than three.
        """
        numbers = [m.number for m in self.mentions[noun] if m.number is not None]
        at_once = numbers.count(number) == 1 and {*numbers} <= {1, number} and len(numbers) <= number + 1
        return sum(numbers) == number or at_once

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
        for (a, here), (b, there) in product(list(self._placed(both)), repeat=2):
            known = a is not b and (a.noun, b.noun) == (first, second) and axis in here and axis in there
            if known and here[axis] != there[axis]:
                placed.add(1 if (here[axis] < there[axis]) == (sign < 0) else -1)
        ways = [found for found in (spoken, placed) if found]
        return bool(ways) and all(1 in found for found in ways)

    def _spoken(self, both: Sequence[_Mention]) -> Iterator[tuple[str, tuple[str, int], str]]:
        """(thing, axis and sign, thing) of each relation that is spoken out between mentions."""
        nouns = list(dict.fromkeys(mention.noun for mention in both))
        for start, end, meaning in self._find(_RELATIONS):
            sentence = [mention for mention in both if mention.sentence == self.sentences[start]]
            ends_in_it = self.words[end : end + 1] == ["it"]
            end += ends_in_it
            before = [m for m in sentence if m.end <= start]
            after = [m for m in sentence if m.start >= end]
            near = after[0] if after and self._reaches(end, after[0]) else None
            subject, object_ = before[-1] if before else None, near and near.noun
            its = ends_in_it or self.words[start] == "its"
            if its and len(nouns) == 2:  # "beneath it, a cat", or "a cat beneath it"
                subject = near or subject
                object_ = next((noun for noun in nouns if subject and noun != subject.noun), None)
            elif near and not before:  # "above the dog is a cat"
                subject = next(iter(after[1:]), None)
            if subject and object_:
                yield subject.noun, meaning, object_

    def _find(self, phrases: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[int, int, Any]]:
        """(start, end, meaning) of each of the `phrases` in the text, longest first, none within another."""
        i = 0
        while i < len(self.words):
            sizes = (n for n in range(4, 0, -1) if tuple(self.words[i : i + n]) in phrases)
            if size := next(sizes, 0):
                yield i, i + size, phrases[tuple(self.words[i : i + size])]
            i += size or 1

    def _reaches(self, i: int, mention: _Mention) -> bool:
        """Is there nothing between word `i` and the mention but what belongs to its phrase?"""
        others = _STOPS.union(_HARD, _SOFT) - {","}
        return self._brought(i, mention.start, _DETERMINERS) <= 1 and others.isdisjoint(self.words[i : mention.start])

    def _brought(self, start: int, end: int, openers: frozenset[str] = _NEW) -> int:
        return sum(word in openers or _number(word) > 0 for word in self.words[start:end])

    # ----- places

    def _placed(self, both: Sequence[_Mention]) -> Iterator[tuple[_Mention, dict[str, int]]]:
        """Mentions with the place that is said of them: "a cat on the left", or "on the left, a cat"."""
        taken, leads = set(), {}
        for start, end, place in self._find(_PLACES):
            if _PLACE_OPENERS.isdisjoint(self.words[max(0, start - 1) : start]):
                continue
            number = self.sentences[start]
            sentence = [mention for mention in both if mention.sentence == number]
            before, after = [m for m in sentence if m.end <= start], [m for m in sentence if m.start >= end]
            opening = self.sentences.index(number)
            fronted = leads.setdefault(number, not before and not self._brought(opening, start))
            owner = None
            if fronted and after and self._brought(end, after[0].start) <= 1:
                owner = after[0]
            elif before and (not fronted or not after) and self._goes_on(before[-1].end, start):
                owner = before[-1]
            if owner and owner.start not in taken:
                taken.add(owner.start)
                yield owner, place if "z" in place else {"x": 0, "y": 0, **place}

    def _goes_on(self, start: int, end: int) -> bool:
        """Does no other thing come in between? "A cat, a tabby, sits on the left" is one thing."""
        words = self.words[start:end]
        inserted = any(word == "," and after in _VERBS for word, after in pairwise(words))
        return inserted or not self._brought(start, end)
