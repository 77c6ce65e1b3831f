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

from data.grammar import COLORS, MAX_COUNT, RELATIONS, TASKS, article, canonical, plural, read, singular, write
from data.intent import lost
from data.make_prompts import COLD_START, MORE_TASKS, RL_STEM, main, make_prompts
from data.prompts import dump_prompt, load_prompts
from data.text import normalize
from data.vocabulary import COUNTS, NOUNS, SHAPES, TEXTURES
from errors import UserError
from evaluation.geneval import CLASS_NAMES
from interfaces import Prompt

ROOT = Path(__file__).resolve().parent.parent
TXT, JSONL = ROOT / "data" / f"{RL_STEM}.txt", ROOT / "data" / f"{RL_STEM}.jsonl"
COLD = ROOT / "data" / COLD_START


def geneval(text: str, tag: str, *include: dict) -> dict:
    return {"tag": tag, "include": [{"count": 1, **item} for item in include], "prompt": f"a photo of {text}"}


GENEVAL_ROWS = [
    geneval("a bench", "single_object", {"class": "bench"}),
    geneval("a scissors and a bowl", "two_object", {"class": "scissors"}, {"class": "bowl"}),
    geneval("three benchs", "counting", {"class": "bench", "count": 3}),
    geneval("a black tv remote", "colors", {"class": "tv remote", "color": "black"}),
    geneval(
        "a skateboard above a person",
        "position",
        {"class": "person"},
        {"class": "skateboard", "position": ["above", 0]},
    ),
    geneval(
        "a red car and an orange cup",
        "color_attr",
        {"class": "car", "color": "red"},
        {"class": "cup", "color": "orange"},
    ),
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


@pytest.mark.parametrize(
    "fields",
    [
        ("a photo of a bench", "single_object", ("bench",)),
        ("a photo of a cat and a stop sign", "two_object", ("cat", "stop sign")),
        ("a photo of three cars", "counting", ("car",), (), None, (("car", 3),)),
        ("a cat and three dogs", "counting", ("cat", "dog"), (), None, (("cat", 1), ("dog", 3))),
        ("a photo of three blue cars", "counting", ("car",), ("blue car",), None, (("car", 3),)),
        ("a photo of a purple teddy bear", "colors", ("teddy bear",), ("purple teddy bear",)),
        ("a photo of an orange", "single_object", ("orange",)),
        ("a photo of an orange orange", "colors", ("orange",), ("orange orange",)),
        ("a red cup and a green vase", "color_attr", ("cup", "vase"), ("red cup", "green vase")),
        ("a red cup and a green cup", "color_attr", ("cup", "cup"), ("red cup", "green cup")),
        ("a red cup and a vase", "color_attr", ("cup", "vase"), ("red cup", "vase")),
        ("a red cup above a hat", "position", ("cup", "hat"), ("red cup", "hat"), ("cup", "above", "hat")),
    ],
)
def test_a_prompt_gives_back_its_fields(fields):
    assert read(fields[0]) == Prompt(*fields)


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_is_read_as_its_locality(relation):
    prompt = read(f"a photo of a dog {relation} a hot dog")
    assert (prompt.task, prompt.nouns) == ("position", ("dog", "hot dog"))
    assert prompt.spatial == ("dog", RELATIONS[relation], "hot dog")


@pytest.mark.parametrize("text", ["a cat and a dog", "A photo of a cat and a DOG.", "image of the cat  and a dog"])
def test_lead_case_and_article_do_not_matter_but_the_text_stays(text):
    prompt = read(text)
    assert (prompt.text, prompt.task, prompt.nouns) == (text, "two_object", ("cat", "dog"))


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of", "a photo of a", "a photo of a man riding a horse on the beach", "a photo of a man running",
        "a cat perched", "three boys snapped pictures with three cameras", "a photo of three car",
        "a photo of two red and white cars", "a light blue car", "a photo of a cat and a dog and a bird",
        "a photo of two cats left of a dog", "a cat and", "and a cat", "cats",
    ],
)  # fmt: skip
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
    [("mouse", "mice"), ("person", "people"), ("wine glass", "wine glasses"), ("tomato", "tomatoes"), ("emu", "emus")],
)
def test_plurals_go_both_ways(one, many):
    assert (plural(one), singular(many)) == (many, one)


@pytest.mark.parametrize(
    "pair",
    "benchs bench, sandwichs sandwich, toothbrushs toothbrush, knifes knife, persons person, sheeps sheep, mouses "
    "mouse, batterys battery, boxerses boxers, sunglasseses sunglasses, brases bras, skises skis, flip-flopses "
    "flip-flops, gloveses gloves, sandalses sandals, headphoneses headphones, crutcheses crutches, "
    "pajamases pajamas, kimonoses kimonos, horses horse, houses house, purses purse, vases vase, suitcases suitcase, "
    "cheeses cheese, roses rose, tortoises tortoise, geese goose, buses bus, walruses walrus, glasses glass, dresses "
    "dress, compasses compass, thermoses thermos, lenses lens, canvases canvas".split(", "),
)
def test_plurals_of_published_prompts_are_read_and_no_word_is_made_a_plural_twice(pair):
    many, one = pair.split()
    assert read(f"a photo of two {many}").counts == ((one, 2),)
    assert plural(plural(one)) == plural(one)
    assert plural(one) == one or not one.endswith("s") or one in "bus walrus glass dress compass thermos lens canvas"
    assert lost(read(f"a photo of two {many}"), f"Two {plural(one)} on a table.") == ()


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
        ("a photo of a drum behind a key", "a key in front of a drum"),
        ("a drum hidden by a key", "a drum behind a key"),
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
        ("a drum behind a key", "a key behind a drum"),
    ],
)
def test_different_requests_have_different_canonical_forms(one, other):
    assert canonical(read(one)) != canonical(read(other))


# ----- files


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_t2i_r1_rows_say_what_the_grammar_reads_and_more(tmp_path, suffix):
    *known, other = load_prompts(rows_file(tmp_path / f"p{suffix}", T2I_ROWS))
    assert known == [read(row["prompt"]) for row in T2I_ROWS[:3]]
    assert (other.task, other.nouns) == ("complex", ("pebble", "river"))


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


BAD_FILES = {  # name -> content, and what the error names
    "empty.txt": (b"\n \n", "empty.txt"),
    "prompts.csv": (b"a cat", "'.csv'"),
    "array.json": (b'[{"prompt": "a cat"}]', "line 1"),
    "deep.json": (b"[" * 100_000, "line 1"),
    "no_prompt.jsonl": (b'{"nouns": ["cat"]}', "'prompt'"),
    "blank.jsonl": (b'{"prompt": " "}', "' '"),
    "number.jsonl": (b'{"prompt": 7}', "7"),
    "surrogate.jsonl": (b'{"prompt": "a \\ud800"}', "ud800"),
    "task.jsonl": (row(task_type="spacial"), "'spacial'"),
    "nouns.jsonl": (row(nouns="car"), "'car'"),
    "stranger.jsonl": (row(nouns=["car", "dog"]), "'zebra'"),
    "locality.jsonl": (row(spatial_info={"obj1": "car", "obj2": "zebra", "locality": "inside"}), "'inside'"),
    "half_info.jsonl": (row(spatial_info={"obj1": "car"}), "locality"),
    "no_info.jsonl": (row(spatial_info=None), "spatial_info"),
    "no_count.jsonl": (row(task_type="numeracy"), "numeracy_info"),
    "zero.jsonl": (row(numeracy_info=[{"obj_name": "car", "num": 0}]), "0"),
    "flat.jsonl": (row(numeracy_info=3), "int"),
    "tag.jsonl": (b'{"prompt": "a cat", "tag": "colour", "include": []}', "'colour'"),
    "target.jsonl": (b'{"prompt": "a cat", "tag": "position", "include": []}', "line 1"),
    "missing.txt": (None, "missing.txt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_named_error_of_one_line(tmp_path, name):
    content, named = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
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
    assert {*counts[1].values()} == {603, 604} and (len(rl), len(cold)) == (1000, 8000)


def test_no_two_prompts_of_either_file_ask_for_the_same_thing():
    prompts = [*load_prompts(JSONL), *load_prompts(COLD)]
    assert len({normalize(prompt.text) for prompt in prompts}) == 9000
    assert len({canonical(prompt) for prompt in prompts}) == 9000


def test_every_object_colour_and_number_is_used_about_as_often_as_any_other():
    prompts = load_prompts(COLD)
    nouns = Counter(noun for prompt in prompts if prompt.task != "text" for noun in prompt.nouns)
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
    for prompt in [*load_prompts(JSONL), *load_prompts(COLD)[::7]]:
        assert lost(prompt, f"{prompt.text}, soft light") == (), prompt
        gone = lost(prompt, "an empty room")
        assert f"object {prompt.nouns[0]}" in gone and all(f"text {text}" in gone for text in prompt.texts)


def test_rewards_get_what_they_need_of_each_type():
    of = {task: [p for p in load_prompts(COLD) if p.task == task] for task in MORE_TASKS}
    for task in ("texture", "shape"):
        assert all(len(p.nouns) == len(p.attr_nouns) == 2 for p in of[task])
    assert all(p.spatial[1] in ("in front of", "behind", "hidden by") for p in of["spatial_3d"])
    assert all(len(p.nouns) == 3 and p.counts and p.spatial for p in of["complex"])
    for prompt in of["negation"]:
        absent = re.split(r"\b(?:without an?|no) ", prompt.text)[1]
        assert absent in NOUNS and absent not in prompt.nouns
    assert all(len(p.texts) == 1 and f'"{p.texts[0]}"' in p.text for p in of["text"])
    assert all(read(prompt.text) == Prompt(prompt.text) for prompt in of["non"])  # nothing that a template would say
    assert {bool(p.attr_nouns) for p in of["non"]} == {bool(p.counts) for p in of["non"]} == {True, False}


@pytest.mark.slow
def test_the_committed_files_are_what_the_program_makes(tmp_path):
    command = [sys.executable, "data/make_prompts.py", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^position +166 +604 +0$", done.stdout, re.MULTILINE)
    assert re.search(r"^all +1000 +8000 +0$", done.stdout, re.MULTILINE)
    for committed in (TXT, JSONL, COLD):
        assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()


def test_the_readme_has_the_hashes_of_the_files():
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for file in (TXT, JSONL, COLD):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in readme


def test_nouns_are_many_distinct_and_plain():
    assert len(set(NOUNS)) == len(NOUNS) >= 280
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){0,2}", noun) for noun in NOUNS)
    assert all(singular(plural(noun)) == noun for noun in NOUNS)
    assert all(
        read(f"a {noun}").nouns == (noun,) and {*noun.split()}.isdisjoint((*TEXTURES, *SHAPES)) for noun in NOUNS
    )
    assert not [(one, other) for one in NOUNS for other in NOUNS if one.endswith(f" {other}")]


def test_no_object_is_one_of_coco():
    assert {*NOUNS}.isdisjoint([*CLASS_NAMES, "mouse", "remote", "keyboard"])  # GenEval's names, and COCO's own


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


def test_more_prompts_than_exist_are_refused_with_their_number():
    with pytest.raises(UserError, match=f"{len(NOUNS)} of 1000 .* single_object"):
        make_prompts(0, 1000, ["single_object"])


@pytest.mark.parametrize(("options", "named"), [(["--rl", "0"], "0"), (["--exclude", "/nowhere.txt"], "/nowhere.txt")])
def test_a_wrong_option_is_exit_code_2_before_anything_is_written(tmp_path, capsys, options, named):
    assert main([*options, "--out_dir", str(tmp_path / "new")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "new").exists()
