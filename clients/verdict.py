"""A judge's answer -> its verdict: the one reader of all rewards and benchmarks that ask a VLM.

Better none than a wrong one: what is denied ("it is false that ..."), bound to a condition, said in two ways or beyond
the scale is no verdict, None. The patterns take linear time, because they repeat possessively or within bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

YES_NO = {  # a sentence may go on without a comma: "no it is not", but not "no idea"
    rf"{word}(?: (?:it|there|this|that|these|those|the|they|he|she|we|you|i|all|both|indeed|definitely)\b.*)?": word
    for word in ("yes", "no")
}

# Full-width angle brackets stay as they are, because they stand for tags that were made harmless.
_NARROW = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F) if chr(full) not in "＜＞"}
_NARROW |= str.maketrans("。｡−　\u00a0", "..-  ", "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\ufe0f")
_QUOTES = str.maketrans("‘’", "''", '"“”{}')
_MIND = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
_THINKING = re.compile(rf"<\s*+{_MIND}\s*+>|◁think▷|\[THINK\]", re.IGNORECASE)
_THOUGHT = re.compile(rf"<\s*+/\s*+{_MIND}\s*+>|◁/think▷|\[/THINK\]|<\|channel\|>final<\|message\|>", re.IGNORECASE)
_ANSWER = re.compile(r"<\s*+answer\s*+>|<\|begin_of_box\|>", re.IGNORECASE)
_ANSWERED = re.compile(r"<\s*+/\s*+answer\s*+>|<\|end_of_box\|>", re.IGNORECASE)
_OBJECT = re.compile(r"\{[^{}]*+\}")
_MARKUP = re.compile(
    r"^[ \t]*+```\w*+[ \t]*+$|[*`$]|\\[a-z]{2,}+\{?|<\|[^<>|]*+\|>|</?(?:b|i|p|em|strong|br ?/?)>"
    r"|^[ \t]*+(?:[#>]++|[-+•]++(?=[ \t]))|(?<!\w)_++|_++(?!\w)",
    re.IGNORECASE | re.MULTILINE,
)

_SENTENCE = re.compile(r"\n++|(?<=[.!?])\s++(?!\d)")  # "no. 5" is one
_CLAUSE = re.compile(r" ?[,;:(–—] ?| -+ | (?:because|since) ")
_LEAD = re.compile(  # what a sentence may begin with before its verdict
    r"(?:(?:so|well|thus|therefore|hence|overall|finally|in (?:short|conclusion|summary)),? |(?:and|but|or|rather) "
    r"|(?:based on|looking at|in) (?:the|this|what) [^,:]{1,60}, )*+"
    r"(?:(?P<label>(?:(?:my|the|final|overall|short|correct) )*(?:answer|verdict|decision|conclusion|choice|winner"
    r"|result|judge?ment|preference)(?: to (?:the|this) question)?(?: is:?| ?[:=]| [-–—]+) ?)"
    r"|i(?:'d| would)? (?:say|think|answer|choose|pick|prefer|go with):? (?:that )?|it(?:'s| is) (?:an? )?)?"
)
_CONDITION = re.compile(r"(?:only |but only )?(?:if|unless|assuming|provided|depending|as long as)\b")
_EDGES = " '()[].!"

_NUMBER = r"([+-]?+[0-9]++(?:\.[0-9]++)?+)"
_NO_MORE = r"(?![\w%⁄]|[.,]\d|\s*+\(?(?:[/|–-]|out of|of|to|or|and) ?\d|\s*+(?:stars?|if|unless|would)\b)"
_DENIED = re.compile(r"(?:\b(?:not|no|never|false|wrong|if|would)|n't)\b[^\n.,;:!?]*+$", re.IGNORECASE)
_LIST = re.compile(
    r'<score>\s*+\[?([^<>[\]]*+)\]?\s*+</score>|\bscores?"?+\s*+[:=]\s*+\[([^<>[\]]*+)\]', re.IGNORECASE
)
_MARK = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}


def final(answer: str, unwrap: bool = True) -> str:
    """What an answer says in the end, in plain characters, without what is put around it; a line per JSON field.

    "" where thinking or the last answer tag is left open, because then nothing was decided.
    """
    said = _THOUGHT.split(answer)[-1]
    if _THINKING.search(said):
        return ""
    said = said.translate(_NARROW)
    *before, block = _ANSWER.split(said)
    if before and unwrap:
        block, *closed = _ANSWERED.split(block, maxsplit=1)
        said = block if closed else ""
    for written in _OBJECT.findall(said)[-1:]:
        try:
            said = "\n".join(f"{name}: {value}" for name, value in json.loads(written).items()) or said
        except (ValueError, RecursionError):  # braces around something else
            pass
    return _MARKUP.sub("", said).strip()


def choice(answer: str, verdicts: Mapping[str, str]) -> str | None:
    r"""The verdict of an answer's labelled sentences, or else of its first or last; None if it has none, or two.

    `verdicts` are pattern of a whole clause in lower case -> verdict, in which "\g<0>" stands for the clause.
    """
    sentences = _SENTENCE.split(final(answer).translate(_QUOTES).lower())
    sentences = [one for one in (" ".join(sentence.split()).strip(_EDGES) for sentence in sentences) if one]
    labelled, others, at_an_end = set(), set(), False
    for place, sentence in enumerate(sentences):
        lead = _LEAD.match(sentence)
        first, *rest = _CLAUSE.split(sentence[lead.end() :])
        said = {_verdict(first, verdicts)}
        if None in said or (rest and _CONDITION.match(rest[0])):
            continue
        said |= {_verdict(clause[_LEAD.match(clause).end() :], verdicts) for clause in rest} - {None}
        (labelled if lead["label"] else others).update(said)
        at_an_end |= place in (0, len(sentences) - 1)
    found = labelled or (others if at_an_end else set())
    return found.pop() if len(found) == 1 else None


def _verdict(clause: str, verdicts: Mapping[str, str]) -> str | None:
    found = ((re.fullmatch(pattern, clause.strip(_EDGES)), verdict) for pattern, verdict in verdicts.items())
    return next((match.expand(verdict) for match, verdict in found if match), None)


def number(answer: str, best: int, label: str = "score|grade|rating", bare: bool = True) -> float | None:
    """The grade from 0 to `best` that an answer gives; None if it gives none, several that differ, or one beyond.

    Between tags one beyond is the nearest end. `label` is a pattern. With `bare` a grade without label will do, on a
    line of its own or as "7/10".
    """
    scale = rf"(?:\s*+\(?(?:/|out of|of)\s*+{best}(?![\w/]|\.\d))" if best > 1 else "(?!)"  # "0/1" is a choice
    grade, name = rf"{_NUMBER}{scale}?+{_NO_MORE}", rf"(?:{label})s?(?: score| grade)?(?: ?\([^()\n]{{1,40}}\))?"
    given = r"(?:(?:so|the|my|final|overall|its|i give it|i'd give it|i would give it) )*+(?:an? )?"
    patterns = [
        rf"<\s*+(?:{label})\s*+>\s*+{grade}\s*+<\s*+/\s*+(?:{label})\s*+>",
        rf"(?<![^\W_]){name}\s*+:\s*+{grade}"
        rf"|^[^\w\n]*+{given}{name}(?: | is:? | of | [-–—]+ | ?[=|] ?){grade}(?=[^\w\n]*+$)",
    ]
    if bare:
        patterns[1] += rf"|(?<![\w.,/-]){_NUMBER}{scale}(?=\W*?$|\s?[.,;:)–—]|\s(?:-\s|because|since))"
        patterns += [rf"^[ \t]*+{grade}[ \t]*+\.?[ \t]*+$"]
    for pattern in patterns:
        text = final(answer, unwrap=pattern != patterns[0]).translate(_QUOTES)  # a tag may stand outside
        if found := list(re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE)):
            denied = any(_DENIED.search(text, max(0, one.start() - 200), one.start()) for one in found)
            grades = {float(one[one.lastindex]) for one in found}
            if pattern == patterns[0]:  # in the form that was asked for, as RePrompt's judge is read
                grades = {min(max(grade, 0.0), best) for grade in grades}
            return grades.pop() if len(grades) == 1 and not denied and 0 <= min(grades) <= best else None
    return None


def marks(answer: str, count: int) -> list[int] | None:
    """The `count` scores of 0 or 1 in an answer's list; None without one, or if two lists differ."""
    found = ["".join(either).strip(", \t\n") for either in _LIST.findall(final(answer))]
    lists = {tuple(_MARK.get(one) for one in re.split(r"[,\s]+", block)) for block in found}
    scores = lists.pop() if len(lists) == 1 else ()
    return list(scores) if len(scores) == count and None not in scores else None
