"""Claims about the prompts: the grammar in both directions, the files, and the program that makes them."""

import hashlib
import json
import logging
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from data.grammar import (
    COLORS,
    MAX_COUNT,
    RELATIONS,
    TASKS,
    article,
    canonical,
    normalize,
    plural,
    read,
    singular,
    write,
)
from data.intent import lost
from data.make_prompts import COLD_START, MORE_TASKS, RL_STEM, main, make_prompts
from data.prompts import dump_prompt, load_prompts
from data.vocabulary import COUNTS, FORMS, NOUNS, PARTS, SHAPES, TEXTURES
from errors import UserError
from interfaces import Prompt

ROOT = Path(__file__).resolve().parent.parent
TXT, JSONL = ROOT / "data" / f"{RL_STEM}.txt", ROOT / "data" / f"{RL_STEM}.jsonl"
COLD = ROOT / "data" / COLD_START
COCO = {  # its 80 classes, by the names of COCO and of GenEval
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "computer mouse", "tv remote", "computer keyboard",
}  # fmt: skip

GENEVAL_ROWS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "two_object",
        "include": [{"class": "scissors", "count": 1}, {"class": "bowl", "count": 1}],
        "prompt": "a photo of a scissors and a bowl",
    },
    {
        "tag": "counting",
        "include": [{"class": "bench", "count": 3}],
        "exclude": [{"class": "bench", "count": 4}],
        "prompt": "a photo of three benchs",
    },
    {
        "tag": "colors",
        "include": [{"class": "tv remote", "count": 1, "color": "black"}],
        "prompt": "a photo of a black tv remote",
    },
    {
        "tag": "position",
        "include": [{"class": "person", "count": 1}, {"class": "skateboard", "count": 1, "position": ["above", 0]}],
        "prompt": "a photo of a skateboard above a person",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "car", "count": 1, "color": "red"}, {"class": "cup", "count": 1, "color": "orange"}],
        "prompt": "a photo of a red car and an orange cup",
    },
]
T2I_ROWS = [
    {
        "prompt": "a photo of a car below a zebra",
        "nouns": ["car", "zebra"],
        "spatial_info": {"obj1": "car", "obj2": "zebra", "locality": "below"},
        "task_type": "spatial",
    },
    {
        "prompt": "a photo of four coasters",
        "nouns": ["coaster"],
        "numeracy_info": [{"obj_name": "coaster", "num": 4}],
        "task_type": "numeracy",
    },
    {
        "prompt": "a photo of a purple elephant and a blue teddy bear",
        "nouns": ["elephant", "teddy bear"],
        "attr_nouns": ["purple elephant", "blue teddy bear"],
        "task_type": "color",
    },
    {"prompt": "The smooth pebbles lay by the river.", "nouns": ["pebble", "river"], "task_type": "complex"},
]


def rows_file(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ----- read


def test_a_single_object_gives_back_its_noun():
    assert read("a photo of a bench") == Prompt("a photo of a bench", "single_object", ("bench",))


def test_a_two_object_prompt_gives_back_its_objects():
    prompt = read("a photo of a cat and a stop sign")
    assert (prompt.task, prompt.nouns, prompt.attr_nouns) == ("two_object", ("cat", "stop sign"), ())


def test_a_counting_prompt_gives_back_number_and_singular():
    prompt = read("a photo of three cars")
    assert (prompt.task, prompt.nouns, prompt.counts) == ("counting", ("car",), (("car", 3),))


def test_a_color_prompt_gives_back_its_attribute():
    prompt = read("a photo of a purple teddy bear")
    assert (prompt.task, prompt.nouns, prompt.attr_nouns) == ("colors", ("teddy bear",), ("purple teddy bear",))


def test_attribute_binding_keeps_each_color_with_its_noun():
    prompt = read("a photo of a red apple and a green vase")
    assert (prompt.task, prompt.nouns) == ("color_attr", ("apple", "vase"))
    assert prompt.attr_nouns == ("red apple", "green vase")


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_is_read_as_its_locality(relation):
    prompt = read(f"a photo of a dog {relation} a hot dog")
    assert (prompt.task, prompt.nouns) == ("position", ("dog", "hot dog"))
    assert prompt.spatial == ("dog", RELATIONS[relation], "hot dog")


def test_a_position_prompt_keeps_its_colors():
    prompt = read("a photo of a red circle left of a green square")
    assert prompt.spatial == ("circle", "left of", "square")
    assert (prompt.nouns, prompt.attr_nouns) == (("circle", "square"), ("red circle", "green square"))


def test_a_counting_prompt_keeps_its_color():
    prompt = read("a photo of three blue squares")
    assert (prompt.nouns, prompt.attr_nouns, prompt.counts) == (("square",), ("blue square",), (("square", 3),))


def test_the_same_noun_may_come_twice():
    prompt = read("a photo of a red circle and a green circle")
    assert (prompt.nouns, prompt.attr_nouns) == (("circle", "circle"), ("red circle", "green circle"))


def test_one_named_color_leaves_attributes_in_step_with_nouns():
    assert read("a photo of a red apple and a vase").attr_nouns == ("red apple", "vase")


def test_two_numbers_are_two_counts():
    assert read("a cat and three dogs").counts == (("cat", 1), ("dog", 3))


def test_a_lone_orange_is_a_fruit_and_an_orange_orange_has_a_color():
    assert read("a photo of an orange").nouns == ("orange",)
    assert read("a photo of an orange orange").attr_nouns == ("orange orange",)


@pytest.mark.parametrize("text", ["a cat and a dog", "A photo of a cat and a DOG.", "image of the cat  and a dog"])
def test_lead_case_and_article_do_not_matter_but_the_text_stays(text):
    prompt = read(text)
    assert (prompt.text, prompt.task, prompt.nouns) == (text, "two_object", ("cat", "dog"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of",
        "a photo of a",
        "a photo of a man riding a horse on the beach",
        "a photo of a man running",
        "a cat perched",
        "three boys snapped pictures with three cameras",
        "a photo of three car",
        "a photo of two red and white cars",
        "a light blue car",
        "a photo of a cat and a dog and a bird",
        "a photo of two cats left of a dog",
        "a cat and",
        "and a cat",
        "cats",
    ],
)
def test_what_the_grammar_does_not_know_has_no_fields(text):
    assert read(text) == Prompt(text)


def test_read_never_raises():
    rng = random.Random(0)
    words = "a photo of and three red left to the cats שלום 🦊 \ud800 İ ' -".split() + ["\u2028", "\x00"]
    for _ in range(20_000):
        if rng.random() < 0.5:
            text = " ".join(rng.choices(words, k=rng.randrange(12)))
        else:
            top = rng.choice((128, 0x110000))
            text = "".join(chr(rng.randrange(top)) for _ in range(rng.randrange(40)))
        assert read(text).text == text
        canonical(read(text))
    for huge in ("a " * 50_000, "a photo of a " + "x" * 100_000, "\u202e" * 100_000, "\udfff" * 100_000):
        assert read(huge) == Prompt(huge)


# ----- words


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("mouse", "mice"),
        ("knife", "knives"),
        ("sheep", "sheep"),
        ("scissors", "scissors"),
        ("bench", "benches"),
        ("person", "people"),
        ("teddy bear", "teddy bears"),
        ("wine glass", "wine glasses"),
        ("bus", "buses"),
        ("horse", "horses"),
        ("vase", "vases"),
        ("house", "houses"),
        ("box", "boxes"),
        ("toothbrush", "toothbrushes"),
        ("cherry", "cherries"),
        ("key", "keys"),
        ("cookie", "cookies"),
        ("tie", "ties"),
        ("tomato", "tomatoes"),
        ("piano", "pianos"),
        ("canoe", "canoes"),
        ("axe", "axes"),
        ("prize", "prizes"),
        ("taxi", "taxis"),
        ("emu", "emus"),
    ],
)
def test_plurals_go_both_ways(one, many):
    assert (plural(one), singular(many)) == (many, one)


@pytest.mark.parametrize("wrong", ["benchs", "sandwichs", "toothbrushs", "knifes", "persons", "sheeps"])
def test_the_wrong_plurals_of_geneval_are_read(wrong):
    one = {"knifes": "knife", "persons": "person", "sheeps": "sheep"}.get(wrong, wrong[:-1])
    assert read(f"a photo of two {wrong}").counts == ((one, 2),)


def test_articles_follow_the_sound():
    assert [article(w) for w in ("apple", "hourglass", "unicorn", "ukulele", "umbrella", "yacht")] == [
        "an", "an", "a", "a", "an", "a",
    ]  # fmt: skip


# ----- write


def test_what_is_written_is_read_back():
    for noun, color, count in product(NOUNS, ("", *COLORS), (1, 2, MAX_COUNT)):
        prompt = read(write([noun], colors=[color], count=count))
        assert prompt.nouns == (noun,)
        assert prompt.attr_nouns == ((f"{color} {noun}",) if color else ())
        assert prompt.counts == (((noun, count),) if count > 1 else ())
    for relation, (one, two) in product(("", *RELATIONS), product(("", "red"), ("", "orange"))):
        prompt = read(write(["ukulele", "apple"], colors=[one, two], relation=relation))
        assert prompt.spatial == (("ukulele", RELATIONS[relation], "apple") if relation else None)
        assert prompt.attr_nouns == ((f"{one} ukulele".strip(), f"{two} apple".strip()) if one or two else ())


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"nouns": []}, "[]"),
        ({"nouns": "cat"}, "'cat'"),
        ({"nouns": ["cat"], "colors": ["mauve"]}, "mauve"),
        ({"nouns": ["cat"], "colors": ["red", "blue"]}, "blue"),
        ({"nouns": ["cat"], "relation": "left of"}, "left of"),
        ({"nouns": ["cat", "dog"], "relation": "inside"}, "inside"),
        ({"nouns": ["cat"], "count": 13}, "13"),
        ({"nouns": ["cat", "dog"], "count": 2}, "2"),
    ],
)
def test_write_names_the_value_it_refuses(arguments, value):
    with pytest.raises(ValueError, match=re.escape(value)):
        write(**arguments)


# ----- canonical


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a photo of a cat and a dog", "a dog and a cat"),
        ("a photo of a cat left of a dog", "a photo of a dog right of a cat"),
        ("a photo of a cat left of a dog", "a photo of a cat to the left of a dog"),
        ("a photo of a cat above a dog", "a photo of a dog on the bottom of a cat"),
        ("a photo of a cat next to a dog", "a photo of a dog near a cat"),
        ("a photo of a red cat and a blue dog", "a photo of a blue dog and a red cat"),
        ("a photo of a red circle left of a blue circle", "a photo of a blue circle right of a red circle"),
        ("a photo of two benchs", "two benches"),
        ("a photo of a grey cat", "a photo of a gray cat"),
        ("Rain  at night", "rain at night"),
    ],
)
def test_one_request_has_one_canonical_form(one, other):
    assert canonical(read(one)) == canonical(read(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a photo of a cat left of a dog", "a photo of a dog left of a cat"),
        ("a photo of a cat left of a dog", "a photo of a cat above a dog"),
        ("a photo of a red cat and a blue dog", "a photo of a blue cat and a red dog"),
        ("a photo of a red circle left of a blue circle", "a photo of a blue circle left of a red circle"),
        ("a photo of two cats", "a photo of three cats"),
        ("a photo of two red cats", "a photo of two cats"),
        ("a photo of a cat", "a photo of a red cat"),
        ("a photo of a cat and a dog", "a photo of a cat next to a dog"),
    ],
)
def test_different_requests_have_different_canonical_forms(one, other):
    assert canonical(read(one)) != canonical(read(other))


# ----- files


def test_a_text_file_may_have_bom_blank_lines_and_crlf(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa photo of a cat\r\n\r\n   \r\n  two dogs \r\na \xc3\xa9clair that sings")
    assert load_prompts(path) == [read("a photo of a cat"), read("two dogs"), Prompt("a éclair that sings")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_t2i_r1_rows_give_all_fields(tmp_path, suffix):
    spatial, numeracy, color, other = load_prompts(rows_file(tmp_path / f"p{suffix}", T2I_ROWS))
    assert (spatial.task, spatial.spatial) == ("position", ("car", "below", "zebra"))
    assert (numeracy.task, numeracy.counts) == ("counting", (("coaster", 4),))
    assert (color.task, color.attr_nouns) == ("color_attr", ("purple elephant", "blue teddy bear"))
    assert (other.task, other.nouns) == ("complex", ("pebble", "river"))


def test_t2i_r1_rows_say_what_the_grammar_reads(tmp_path):
    prompts = load_prompts(rows_file(tmp_path / "p.jsonl", T2I_ROWS[:3]))
    assert prompts == [read(row["prompt"]) for row in T2I_ROWS[:3]]


def test_null_fields_are_absent_fields(tmp_path):
    nulls = dict.fromkeys(("nouns", "attr_nouns", "spatial_info", "numeracy_info", "task_type"))
    full = load_prompts(rows_file(tmp_path / "null.jsonl", [nulls | row for row in T2I_ROWS]))
    assert full == load_prompts(rows_file(tmp_path / "absent.jsonl", T2I_ROWS))


def test_a_row_of_only_a_prompt_is_read_by_the_grammar(tmp_path):
    path = rows_file(tmp_path / "p.jsonl", [{"prompt": "two dogs"}, {"prompt": "a cat", "nouns": None}])
    assert load_prompts(path) == [read("two dogs"), read("a cat")]


def test_geneval_metadata_says_what_the_grammar_reads(tmp_path):
    prompts = load_prompts(rows_file(tmp_path / "g.jsonl", GENEVAL_ROWS))
    assert [prompt.task for prompt in prompts] == list(TASKS)
    assert prompts == [read(row["prompt"]) for row in GENEVAL_ROWS]


def test_dump_is_the_inverse_of_load(tmp_path):
    prompts = load_prompts(rows_file(tmp_path / "p.jsonl", T2I_ROWS + GENEVAL_ROWS)) + [read("nothing known here")]
    assert [dump_prompt(prompt) for prompt in prompts[: len(T2I_ROWS)]] == T2I_ROWS
    assert load_prompts(rows_file(tmp_path / "q.jsonl", [dump_prompt(prompt) for prompt in prompts])) == prompts


def test_a_text_that_comes_twice_is_kept_once_and_counted(tmp_path, caplog):
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\na cat\na cat\n")
    with caplog.at_level(logging.WARNING):
        assert [prompt.text for prompt in load_prompts(path)] == ["a cat", "a dog"]
    assert "2 duplicated prompts left out, 2 kept" in caplog.text


def row(**changes) -> bytes:
    return json.dumps(T2I_ROWS[0] | changes).encode()


BAD_FILES = {
    "empty.txt": (b"\n \n", "one prompt a line"),
    "latin.txt": (b"caf\xe9", "not UTF-8 (byte 3)"),
    "prompts.csv": (b"a cat", "'.csv'"),
    "broken.jsonl": (b'{"prompt": "a cat"}\n\n{"prompt": ', "line 3: not JSON"),
    "array.json": (b'[{"prompt": "a cat"}]', "line 1: a list"),
    "deep.json": (b"[" * 100_000, "line 1: not JSON"),
    "no_prompt.jsonl": (b'{"nouns": ["cat"]}', "line 1: prompt is None"),
    "blank.jsonl": (b'{"prompt": " "}', "prompt is ' '"),
    "number.jsonl": (b'{"prompt": 7}', "prompt is 7"),
    "surrogate.jsonl": (b'{"prompt": "a \\ud800"}', "surrogate"),
    "task.jsonl": (row(task_type="spacial"), "task_type is 'spacial'"),
    "nouns.jsonl": (row(nouns="car"), "nouns is 'car'"),
    "stranger.jsonl": (row(nouns=["car", "dog"]), "'zebra' is not among its nouns"),
    "locality.jsonl": (row(spatial_info={"obj1": "car", "obj2": "zebra", "locality": "inside"}), "'inside'"),
    "half_info.jsonl": (row(spatial_info={"obj1": "car"}), "locality"),
    "no_info.jsonl": (row(spatial_info=None), "without spatial_info"),
    "no_count.jsonl": (row(task_type="numeracy"), "without numeracy_info"),
    "zero.jsonl": (row(numeracy_info=[{"obj_name": "car", "num": 0}]), "num of 'car' is 0"),
    "flat.jsonl": (row(numeracy_info=3), "TypeError"),
    "tag.jsonl": (b'{"prompt": "a cat", "tag": "colour", "include": []}', "tag is 'colour'"),
    "target.jsonl": (b'{"prompt": "a cat", "tag": "position", "include": []}', "IndexError"),
}


@pytest.mark.parametrize("name", [*BAD_FILES, "missing.txt"])
def test_a_bad_file_is_one_named_error_of_one_line(tmp_path, name):
    content, message = BAD_FILES.get(name, (None, "cannot be read"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_prompts(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ----- the prompts that come with the project


def test_the_twin_files_say_the_same():
    lines = TXT.read_text(encoding="utf-8").splitlines()
    assert [read(line) for line in lines] == load_prompts(JSONL) == load_prompts(TXT)


def test_there_are_a_thousand_prompts_for_grpo_and_eight_for_the_cold_start_balanced_over_their_tasks():
    rl, cold = load_prompts(JSONL), load_prompts(COLD)
    counts = [Counter(prompt.task for prompt in prompts) for prompts in (rl, cold)]
    assert counts[0].keys() == {*TASKS} and {*counts[0].values()} == {166, 167}
    single = counts[1].pop("single_object")  # "a photo of a <noun>": what GRPO's have left over
    assert single == len(NOUNS) - 167 and counts[1].keys() | {"single_object"} == {*TASKS, *MORE_TASKS}
    assert {*counts[1].values()} == {654} and (len(rl), len(cold)) == (1000, 8000)


def test_no_two_prompts_of_either_file_ask_for_the_same_thing():
    prompts = [*load_prompts(JSONL), *load_prompts(COLD)]
    assert len({normalize(prompt.text) for prompt in prompts}) == 9000
    assert len({canonical(prompt) for prompt in prompts}) == 9000


def test_every_object_colour_and_number_is_used_about_as_often_as_any_other():
    prompts = load_prompts(COLD)
    nouns = Counter(noun for prompt in prompts for noun in prompt.nouns)
    colors = Counter(name.split()[0] for p in prompts for name in p.attr_nouns if name.split()[0] in COLORS)
    counts = Counter(number for prompt in prompts for _, number in prompt.counts)
    assert nouns.keys() == {*NOUNS} and colors.keys() == {*COLORS}
    for use in (nouns, colors, counts):
        assert max(use.values()) <= 1.5 * min(use.values())


def test_the_fields_of_a_prompt_say_what_its_text_says():
    numbers = dict(zip(COUNTS, "two three four five six".split(), strict=True))
    for prompt in [*load_prompts(JSONL), *load_prompts(COLD)]:
        text = f" {re.sub('[.,:?]', '', prompt.text.lower())} "
        for name in (*prompt.nouns, *prompt.attr_nouns):
            assert f" {name} " in text or f" {plural(name)} " in text, prompt
        assert all(f" {numbers[number]} {plural(noun)} " in text for noun, number in prompt.counts), prompt
        if prompt.spatial:
            first, relation, second = prompt.spatial
            assert re.search(f" {first} (that is |is )?{relation} an? {second} ", text), prompt
        assert len(prompt.attr_nouns) in (0, len(prompt.nouns))


def test_a_prompt_keeps_its_own_intent_and_an_empty_room_does_not():
    for prompt in load_prompts(COLD)[::7]:
        assert lost(prompt, prompt.text) == (), prompt
        assert f"object {prompt.nouns[0]}" in lost(prompt, "an empty room")


def test_rewards_get_what_they_need_of_each_type():
    of = {task: [p for p in load_prompts(COLD) if p.task == task] for task in MORE_TASKS}
    for task in ("texture", "shape"):
        assert all(len(p.nouns) == len(p.attr_nouns) == 2 for p in of[task])
    assert sum(bool(p.attr_nouns) for p in of["size"]) > len(of["size"]) / 2
    assert all(p.spatial[1] in ("in front of", "behind", "hidden by") for p in of["spatial_3d"])
    assert all(len(p.nouns) == 3 and p.counts and p.spatial for p in of["complex"])
    for prompt in of["negation"]:
        absent = re.split(r"\b(?:without an?|no) ", prompt.text)[1]
        assert absent in NOUNS and absent not in prompt.nouns
    assert all(read(prompt.text) == Prompt(prompt.text) for prompt in of["non"])  # nothing that a template would say
    assert {bool(p.attr_nouns) for p in of["non"]} == {bool(p.counts) for p in of["non"]} == {True, False}


def test_free_sentences_are_many_and_their_fixed_words_name_no_object():
    fixed = " ".join(
        [*(form for forms in FORMS.values() for form in forms), *(w for part in PARTS.values() for w in part)]
    )
    words = re.sub(r"\{\w+\}|[^\w\s]", " ", fixed).split()
    assert not {singular(word) for word in words} & {*NOUNS} and not {*words} & {*COLORS}
    assert sum(len(forms) for forms in FORMS.values()) >= 40


def test_the_committed_files_are_what_the_program_makes(tmp_path):
    command = [sys.executable, "data/make_prompts.py", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^position +166 +654 +\d+ +0$", done.stdout, re.MULTILINE)
    assert re.search(r"^all +1000 +8000 +\d+ +0$", done.stdout, re.MULTILINE)
    assert f"{len(NOUNS)} of {len(NOUNS)} objects" in done.stdout
    for committed in (TXT, JSONL, COLD):
        assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()


def test_the_readme_has_the_hashes_of_the_files():
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for file in (TXT, JSONL, COLD):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in readme


def test_the_examples_of_the_readme_are_in_the_files():
    found = re.findall(
        r"^\| (\w+) \| (\d+|-) \| (\d+) \| (.+) \|$", (ROOT / "data" / "README.md").read_text(), re.MULTILINE
    )
    rl, cold = ({p.text: p for p in load_prompts(file)} for file in (JSONL, COLD))
    assert [task for task, *_ in found] == [*TASKS, *MORE_TASKS]
    for task, in_rl, in_cold, text in found:
        assert (rl | cold)[text].task == task
        assert sum(p.task == task for p in rl.values()) == int(in_rl.replace("-", "0"))
        assert sum(p.task == task for p in cold.values()) == int(in_cold)


def test_the_program_also_runs_as_a_module(tmp_path):
    small = ["--rl", "12", "--cold_start", "26", "--out_dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "data.make_prompts", *small], cwd=ROOT, capture_output=True, check=True)
    assert len(load_prompts(tmp_path / TXT.name)) == 12 and len(load_prompts(tmp_path / COLD.name)) == 26


def test_nouns_are_many_distinct_and_plain():
    assert len(set(NOUNS)) == len(NOUNS) >= 280
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){0,2}", noun) for noun in NOUNS)
    assert all(singular(plural(noun)) == noun for noun in NOUNS)
    assert all(
        read(f"a {noun}").nouns == (noun,) and {*noun.split()}.isdisjoint((*TEXTURES, *SHAPES)) for noun in NOUNS
    )
    assert not [(one, other) for one in NOUNS for other in NOUNS if one.endswith(f" {other}")]


def test_no_object_is_one_of_coco():
    assert {*NOUNS}.isdisjoint(COCO)


def test_another_seed_makes_other_prompts():
    first, second = ({prompt.text for prompt in make_prompts(seed, 300)[0]} for seed in (0, 1))
    assert len(first - second) > 100


def test_grpos_prompts_of_another_seed_are_not_those_of_the_cold_start(tmp_path):
    main(["--seed", "1", "--cold_start", "13", "--out_dir", str(tmp_path)])
    cold = {canonical(prompt) for prompt in load_prompts(COLD)}
    again = [p.task for p in load_prompts(tmp_path / JSONL.name) if canonical(p) in cold]
    assert (
        not {"position", "color_attr"} & {*again} and len(again) < 250
    )  # of the small tasks, a share comes by chance


def test_excluded_prompts_come_up_in_no_wording(tmp_path, capsys):
    made, _ = make_prompts("0/rl", 120)
    bench = [{"prompt": reworded(prompt)} for prompt in made if prompt.spatial] + [
        {"tag": "single_object", "include": [{"class": prompt.nouns[0], "count": 1}], "prompt": prompt.text.upper()}
        for prompt in made
        if prompt.task == "single_object"
    ]
    sizes = ["--rl", "120", "--cold_start", "130", "--out_dir", str(tmp_path)]
    main([*sizes, "--exclude", str(rows_file(tmp_path / "b.jsonl", bench))])
    kept = {canonical(prompt) for name in (JSONL.name, COLD.name) for prompt in load_prompts(tmp_path / name)}
    assert kept.isdisjoint(canonical(read(row["prompt"])) for row in bench) and len(kept) == 250
    report = capsys.readouterr().out
    assert re.search(r"^position .* 20$", report, re.MULTILINE) and "of 40 benchmark prompts" in report


def reworded(prompt: Prompt) -> str:
    """The same request with its objects the other way round."""
    first, relation, second = prompt.spatial
    turned = {"left of": "right of", "right of": "left of", "above": "under", "below": "above", "next to": "beside"}
    return f"{article(second)} {second} {turned[relation]} {article(first)} {first}"


def test_more_than_can_be_made_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=f"only {len(NOUNS)} of 1000 prompts of single_object exist"):
        make_prompts(0, 1000, ["single_object"])


def test_none_at_all_is_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--rl", "0", "--out_dir", str(tmp_path / "new")])
    assert stopped.value.code == 2 and "--rl is 0" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_what_an_exhausted_task_drew_in_vain_is_not_reported_as_dropped():
    _, report = make_prompts(0, 2 * len(NOUNS), ["single_object", "two_object"])
    assert report.kept["single_object"] == len(NOUNS) and report.repeats["single_object"] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a photo of a drum behind a key", "a key in front of a drum"),
        ("a drum hidden by a key", "a drum behind a key"),
    ],
)
def test_relations_in_depth_are_read_and_equal_their_inverses(one, other):
    assert read(one).task == "spatial_3d" and canonical(read(one)) == canonical(read(other))
    assert canonical(read(one)) != canonical(read("a key behind a drum"))
