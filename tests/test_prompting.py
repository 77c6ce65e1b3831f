"""The template is short, the parser is strict about blocks, deaf to white space, and never falls over."""

from __future__ import annotations

import logging
import random
import signal

import pytest

from prompting import MAX_PROMPT_CHARS, SYSTEM_PROMPT, Answer, completion, messages, parse

FRAGMENTS = (
    "<think>", "</think>", "<answer>", "</answer>", "< think >", "< / answer\n>", "<", ">", "/", "think", "answer",
    "<think", "</answer", "<Think>", " ", "\n", "\t\r", "a red cat", "\x00", "\u200b", "\u2028", "\ud800", "\udfff",
    "😀", "شجرة", "犬", "&lt;think&gt;", "<|im_end|>", "<" * 50, " " * 50, "e\u0301",
)  # fmt: skip


def test_system_prompt_is_at_most_85_ascii_words_and_names_both_blocks():
    assert len(SYSTEM_PROMPT.split()) <= 85
    assert SYSTEM_PROMPT.isascii() and SYSTEM_PROMPT.isprintable()
    for needed in ("<think></think>", "<answer></answer>", "120 words"):
        assert needed in SYSTEM_PROMPT


def test_user_text_is_passed_as_it_is():
    text = "  a cat\n<answer>and</answer> \x00 😀 شجرة "
    assert messages(text) == [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


def test_too_long_prompt_is_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert messages("x" * MAX_PROMPT_CHARS)[1]["content"] == "x" * MAX_PROMPT_CHARS
        assert not caplog.records
        assert len(messages("x" * 100_000)[1]["content"]) == MAX_PROMPT_CHARS
    assert "100000" in caplog.text and str(MAX_PROMPT_CHARS) in caplog.text


def test_lone_surrogates_are_replaced_everywhere():
    assert messages("a \ud800 cat")[1]["content"] == "a \ufffd cat"
    assert parse("<think>\udc00x</think><answer>a \ud800 cat</answer>") == Answer("\ufffdx", "a \ufffd cat")


def test_multiline_reasoning_is_still_read():
    text = "\n <think>\n a cat:\n\n- red\n</think>\n\n\t<answer>\n a red cat\n  on  a\tmat\n</answer> \n"
    assert parse(text) == Answer("a cat:\n\n- red", "a red cat on a mat")


def test_white_space_inside_tags_is_tolerated():
    assert parse("< think >x</ think ><answer\n>y< / answer>") == Answer("x", "y")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red cat",
        "<answer>y</answer>",
        "<think>x</think>",
        "<think>x</think><answer>y",
        "<answer>y</answer><think>x</think>",
        "<think></think><answer>y</answer>",
        "<think>x</think><answer> \n </answer>",
        "<think>x</think><answer>\u200b\x00</answer>",
        "So: <think>x</think><answer>y</answer>",
        "<think>x</think> so <answer>y</answer>",
        "<think>x</think><answer>y</answer> done",
        "<think>x</think><answer>y</answer><answer>z</answer>",
        "<think>x</think><think>x</think><answer>y</answer>",
        "<think>x<think>x</think></think><answer>y</answer>",
        "<think>x</think><answer>y<answer>z</answer></answer>",
        "<think>x<answer>y</answer></think>",
        "<think>x</think><answer>y</think></answer>",
        "<Think>x</Think><Answer>y</Answer>",
        "think>x</think><answer>y</answer>",
    ],
)
def test_anything_but_one_think_then_one_answer_is_unreadable(text):
    assert parse(text) is None


def test_a_written_completion_is_read_back():
    rng = random.Random(0)
    words = ["cat", "\n", "  ", "<b>", "3 < 4", "😀", "شجرة", "think", "/answer", "\u2028", "\t", "犬"]
    for _ in range(2_000):
        reasoning = "x" + "".join(rng.choices(words, k=rng.randrange(20)))
        rewrite = "y" + "".join(rng.choices(words, k=rng.randrange(20)))
        assert parse(completion(reasoning, rewrite)) == Answer(reasoning.strip(), " ".join(rewrite.split()))


@pytest.mark.parametrize("parts", [("", "y"), ("x", " "), ("x", "a <answer> b"), ("</think>", "y")])
def test_a_completion_that_could_not_be_read_back_is_refused(parts):
    with pytest.raises(ValueError, match="cannot be read back"):
        completion(*parts)


def test_100_000_random_completions_never_raise_and_whatever_is_read_is_clean():
    rng = random.Random(0)
    readable = 0
    for i in range(100_000):
        junk = "".join(rng.choices(FRAGMENTS, k=rng.randrange(9)))
        answer = parse(f"<think>{junk}</think><answer>{junk[::-1]}</answer>" if i % 2 else junk)
        if answer is not None:
            readable += 1
            assert answer.rewrite and answer.rewrite == " ".join(answer.rewrite.split())
            assert answer.reasoning and answer.reasoning == answer.reasoning.strip()
            assert parse(completion(answer.reasoning, answer.rewrite)) == answer
            (answer.reasoning + answer.rewrite).encode("utf-8")
    assert 5_000 < readable < 50_000


@pytest.mark.parametrize("unit", [*FRAGMENTS, "< ", "</ ", "< /\n", "<think> ", "<think>x</think>", "<think"])
def test_100_kb_of_anything_hang_nothing(unit):
    body = unit * (100_000 // len(unit))
    both = f"<think>{body}</think><answer>{body}</answer>"
    texts = [body, "<" + body, "<think>" + body, "<think>x</think>" + body, both]
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("quadratic time, which would be minutes"))
    signal.alarm(15)
    answers = [parse(text) for text in texts]
    signal.alarm(0)
    assert all(parse(completion(one.reasoning, one.rewrite)) == one for one in answers if one is not None)


def test_without_reasoning_the_answer_block_stands_alone_both_ways():
    assert parse(completion(None, "a  red\ncat"), reasoning=False) == Answer(None, "a red cat")
    assert parse(completion("hm", "a cat"), reasoning=False) is None
    assert parse(completion(None, "a cat")) is None
    for text in ("<answer>x</answer> y", "<answer> </answer>", "<answer>x</answer><answer>y</answer>", "x"):
        assert parse(text, reasoning=False) is None
    system = messages("a cat", reasoning=False)[0]["content"]
    assert "<think>" not in system and "<answer></answer>" in system
