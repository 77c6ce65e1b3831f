"""Claims about reading: every program reads other people's files in one way and compares texts in one normal form."""

import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE

import pytest

import sft
from data.grammar import read
from data.intent import lost
from data.prompts import load_prompts
from data.text import json_value, normalize, read_text, text_lines, visible
from errors import UserError
from evaluation import judged, parses
from evaluation.benchmark import Item
from evaluation.compbench import load_items
from evaluation.leak import leaks
from evaluation.run import _given
from interfaces import Prompt
from run.options import parse
from scripts.make_sft import Options

CAT, ROW = "a photo of a cat", '{"prompt": "a photo of a cat", "rewrite": "a cat", "reasoning": "r"}'
PARSES = f'{{"source": "s", "prompts": {{"{CAT}": {{"chunks": ["a cat"], "nouns": ["cat"]}}}}}}'
READERS = {  # name of a file -> its text, what a program reads of it, and the value
    "p.txt": (CAT, lambda path: load_prompts(path)[0].text, CAT),
    "p.jsonl": (ROW, lambda path: load_prompts(path)[0].text, CAT),
    "sft.jsonl": (ROW, lambda path: sft.load_examples(path, True)[0].prompt, CAT),
    "given.jsonl": (ROW, lambda path: _given(path, [Item("1", Prompt(CAT), "")])["1"][0], "a cat"),
    "list.json": (f"[{ROW}]", lambda path: judged.json_list(path)[0][1]["prompt"], CAT),
    "cells.csv": (f"id,text\n1,{CAT}", lambda path: next(judged.csv_rows(path, [], ["id", "text"]))[1]["text"], CAT),
    "non_spatial_val.txt": (CAT, lambda path: load_items(path, None, ["non_spatial"])[0].prompt.text, CAT),
    "parses.json": (PARSES, lambda path: parses.parser(path).parse(CAT).nouns[0], "cat"),
    "o.yaml": (f"data: {CAT}\nout: o", lambda path: parse([Options], None, ["--config", str(path)])[0].data, CAT),
}
ENCODED = {
    "plain": str.encode,
    "BOM": lambda text: f"\ufeff{text}\r\n".encode(),
    "BOMs of joined files": lambda text: f"\ufeff\ufeff{text}\n\ufeff".encode(),
    "old line ends": lambda text: text.replace("\n", "\r").encode(),
    "UTF-16": lambda text: BOM_UTF16_LE + f"{text}\r\n\ufeff".encode("utf-16-le"),
    "UTF-16, big end first": lambda text: BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-16 without BOM": lambda text: text.encode("utf-16-le"),
    "UTF-16 without BOM, big end first": lambda text: text.encode("utf-16-be"),
    "invisible": lambda text: text.replace("cat", "c\u200b\xada\u2060t\ufeff").encode(),
    "blanks": lambda text: text.replace("photo of", "photo\u202fof").replace("a cat", "a\xa0cat").encode(),
}
NO_TEXT = {"NUL": b"\n\0", "NUL in UTF-16": "\0".encode("utf-16"), "binary": b"\n\xff\xe8"}


@pytest.mark.parametrize("encoding", [*ENCODED, *NO_TEXT])
@pytest.mark.parametrize("name", READERS)
def test_every_program_reads_every_encoding_and_refuses_what_is_no_text(tmp_path, name, encoding):
    text, program, value = READERS[name]
    (tmp_path / name).write_bytes(NO_TEXT.get(encoding) or ENCODED[encoding](text))
    if encoding in ENCODED:
        assert program(tmp_path / name) == value
    else:
        with pytest.raises(UserError, match=name):
            program(tmp_path / name)


def test_only_line_ends_end_lines_and_a_line_with_nothing_to_see_is_none(tmp_path):
    lines = "a\u2028b\x85c\x0bd\x0ce\r\n\u200b\n\ufeff\n\u3164\n\u2800\n\xa0\r\x1a\n\u202a\u202c\nf"
    (tmp_path / "p.txt").write_text(lines, encoding="utf-8", newline="")
    assert text_lines(tmp_path / "p.txt") == [(1, "a b c d e"), (9, "f")]


UNSEEN = (
    "\u200b\u200c\u200d\u200e\u200f\u2060\u2064\xad\u202a\u202e\u2066\u2069\ufeff\u061c\u180e\ufe0f\u034f\u2065\ufff9"
)
SHAPED = "👩\u200d🚀❤\ufe0f\u200d🔥می\u200cخواهم क\u094d\u200dष1\ufe0f\u20e3葛\U000e0100🙂\u200d↔\ufe0f©\ufe0f‼\ufe0f"
SHAPED += " 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f café e\u0301 ３ “x” – 狐 \ue000 \t\n"


@pytest.mark.parametrize("mark", [*UNSEEN, *"\ufffc\x07\x7f\x9f\U000e0041\U000e0100"], ids=ascii)
def test_what_cannot_be_seen_changes_no_prompt_and_what_can_be_seen_stays(mark):
    assert visible(f"{mark}a photo of a {mark}red ca{mark}t{mark}") == "a photo of a red cat"
    assert visible(f"{SHAPED}A  B. \t-- {mark}'y' & {{z}}~") == f"{SHAPED}A  B. \t-- 'y' & {{z}}~"


@pytest.mark.parametrize("content", [
    "élan, naïve\ncafé\n".encode() + b"caf\xe9\n", "élan, naïve, café".encode()[:-1], b"\x1f\x8b" + bytes(range(256)),
    "a cat\n".encode("utf-16")[:-1], "a cat\n".encode("utf-16") + BOM_UTF16_BE + "a dog\n".encode("utf-16-be"),
    b"a cat\n" + "a dog".encode("utf-16"), "一只猫\n两只狗".encode("utf-16-le"), "café".encode("latin1"),
    "a cat’s “bed”".encode("cp1252"), "一只红色的猫".encode("gb18030"), "テーブルの上の赤い猫".encode("cp932"),
])  # fmt: skip
def test_another_encoding_is_refused_without_a_command_that_could_spoil_it(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.txt, line \d+"):
        read_text(tmp_path / "p.txt")


@pytest.mark.parametrize("row", [
    '{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "noun": ["a"]}', "[1]", "null",
    '{"prompt": "a",}', '{"prompt": "a"},', '{"prompt": "a\\u0000"}', '{"prompt": "\\u200b"}', '{"Prompt": "a"}',
    '{"prompt": "a"} {"prompt": "b"}', "{'prompt': 'a'}", '{"prompt": "a"',
])  # fmt: skip
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, row):
    (tmp_path / "p.jsonl").write_text(f'\n{{"prompt": "a cat"}}\n\n{row}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, line 4: "):
        load_prompts(tmp_path / "p.jsonl")


def test_a_field_that_is_not_read_is_named_once_and_escapes_are_texts_too(tmp_path, caplog):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\u00a0cat\\ufeff", "id": 1}\n{"prompt": "a dog", "id": 2}\n')
    assert [prompt.text for prompt in load_prompts(tmp_path / "p.jsonl")] == ["a cat", "a dog"]
    assert re.findall(r"line \d+: .*'id'", caplog.text) == ["line 1: the field 'id'"]
    assert json_value('[["\\u200ba"]]', "x") == [["a"]]


SAME = [  # texts of one normal form
    ("a photo of a sofa", "A photo of a sofa.", "a  photo of a sofa …", "“a photo of a sofa!”",
     "a photo of\u200b a so\xadfa", "ａ　photo of a ｓｏｆａ。", "a\xa0photo of a sofa;",
     "\ufeffa photo of a sofa?", "a photo of a sofa\u200d\u3164"),
    ("a photo of a chef's hat", "a photo of a chef’s hat", "a photo of a chef＇s hat.", "a photo of a chef`s hat"),
    ("a photo of a t-shirt", "a photo of a T–shirt", "a photo of a t‑shirt", "a photo of a t－shirt"),
    ("a photo of 3 éclairs", "a photo of ３ e\u0301clairs", "A PHOTO OF 3 ÉCLAIRS", "a photo of ③ éclairs"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "other"), [(one, other) for one, *others in SAME for other in others])
def test_what_differs_in_form_alone_is_one_prompt_to_grammar_leak_check_and_files(tmp_path, text, other):
    known = read(text)
    assert known.nouns and vars(read(other)) == {**vars(known), "text": other} and lost(known, other) == ()
    assert leaks([Item("1", Prompt(other), "")], [Prompt(text)]).exact == ("1",)
    (tmp_path / "p.txt").write_text(f"{text}\n{other}\n", encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(tmp_path / "p.txt")] == [text]
    assert all(normalize(normalize(odd)) == normalize(odd) != "" for odd in ("...", "!", "ß ẞ", "ﷺ", "Ǆ ΐ", SHAPED))
