"""Claims about T2I-CompBench: rules on hand-made boxes and answers, files, tiny random models of the real classes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    DPTConfig,
    DPTForDepthEstimation,
    Owlv2Config,
    Owlv2ForObjectDetection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from errors import UserError
from evaluation import depth, parses
from evaluation.benchmarks import BENCHMARKS, BenchmarkOptions
from evaluation.blip_vqa import BlipVQA, cleaned
from evaluation.boxes import Owlv2, frame_size
from evaluation.clip_score import ClipScore
from evaluation.compbench import (
    RELATIONS_2D,
    RELATIONS_3D,
    ROWS,
    CompBench,
    attribute_score,
    count_score,
    counts_of,
    distinct,
    judges_of,
    load_items,
    position_2d,
    position_3d,
    questions_of,
    relation_of,
    score_2d,
    score_3d,
    verdict,
)
from evaluation.depth import Depth, eight_bits
from evaluation.geneval import Detection
from evaluation.parses import Parse, around_the_place, by_grammar, freeze, parser
from rewards import RewardOptions
from rewards.gdino import iou
from tests import tiny
from tests.tiny import BERT_MARKS, SIZE, WORDS, picture, randomize, write_words

SINGULARS = {"fish": "fish", "dogs": "dog", "mice": "mouse", "people": "person", "boys": "boy",
             "teddy bears": "teddy bear", "goldfish": "goldfish", "paintings": "painting"}  # fmt: skip
GRAMMAR = parser("grammar")


def seen(label: str, left: float, top: float, right: float, bottom: float, score: float = 0.8) -> Detection:
    return Detection(label, score, (left, top, right, bottom))


def at(x: float, y: float, label: str = "thing", score: float = 0.8) -> Detection:
    """A box of 20 pixels around a centre."""
    return seen(label, x - 10, y - 10, x + 10, y + 10, score)


# ----- attributes


def test_four_chunks_are_dropped_by_their_exact_words_and_eight_of_the_rest_are_asked():
    chunks = ["The top", "top", "the side", "a mug", "the left", "the right", "The left", *"abcdefgh"]
    assert questions_of(chunks) == ["The top?", "a mug?", "The left?", "a?", "b?", "c?", "d?", "e?"]
    assert questions_of(["the top"]) == ["the top?"]
    assert questions_of([]) == []


def test_an_attribute_score_is_the_product_of_rounded_answers():
    assert attribute_score([0.99996, 0.99996]) == 1, "each becomes 1; their product would be 0.9999"
    assert attribute_score([0.0123, 0.0123]) == 0.0002, "0.00015129"
    assert attribute_score([0.9] * 8) == 0.4305, "0.43046721"


@pytest.mark.parametrize(
    "question, read",
    [
        ("The Red Car?", "the red car?"),
        ('a "big" (old) dog!?', "a big old dog?"),
        ("10:30 #1 *star* a;b ~c.?", "1030 1 star ab c?"),
        ("it's,  a dog ?  ", "it's,  a dog ?"),
        (" ".join(["word"] * 60) + "?", " ".join(["word"] * 50)),
    ],
)
def test_a_question_is_read_as_blips_own_dataset_reads_it(question, read):
    assert cleaned(question) == read


# ----- places in the plane


PLACES = {"on the left of": (-100, 0), "on the right of": (100, 0), "on the top of": (0, -100), "on top of": (0, -100),
          "on the bottom of": (0, 100), "inside": None, None: None}  # fmt: skip


@pytest.mark.parametrize("relation", PLACES)
@pytest.mark.parametrize("place", [(-100, 0), (100, 0), (0, -100), (0, 100)])
def test_a_direction_holds_where_the_first_thing_stands_there_and_nowhere_else(relation, place):
    x, y = place
    assert position_2d(relation, at(200 + x, 200 + y), at(200, 200)) == (PLACES[relation] == place)


def test_a_direction_needs_strictly_more_along_than_across():
    assert position_2d("on the left of", at(100, 100), at(150, 150)) == 0
    assert position_2d("on the left of", at(100, 100), at(151, 150)) == 1
    assert position_2d("on the left of", at(100, 100), at(100, 100)) == 0


def test_overlap_divides_a_direction_from_a_tenth_on():
    first = seen("a", 0, 0, 30, 20)  # area 600
    tenth = seen("b", 20, 10, 70, 20)  # area 500, common 100: exactly 100 / 1000
    assert iou(first.box, tenth.box) == 0.1
    assert position_2d("on the left of", first, tenth) == 1
    eighth = seen("b", 20, 10, 50, 20)  # area 300, common 100: 100 / 800
    assert position_2d("on the left of", first, eighth) == pytest.approx(0.8)
    quarter = [seen("a", 0, 0, 50, 20), seen("b", 30, 0, 80, 20)]  # common 400 of 1600
    assert position_2d("on the left of", *quarter) == pytest.approx(0.4)


def test_near_is_150_pixels_along_x_or_y_and_falls_with_the_larger_difference():
    def near(x: float, y: float) -> list[float]:
        return [
            position_2d(relation, at(20, 20), at(20 + x, 20 + y)) for relation in ("next to", "near", "on side of")
        ]

    assert near(149, 400) == near(400, 149) == [1, 1, 1]
    assert near(150, 150) == [1, 1, 1], "150 / 150"
    assert near(150, 300) == pytest.approx([0.5] * 3)
    assert near(-400, 200) == pytest.approx([0.375] * 3)


@pytest.mark.parametrize(
    "prompt, relation",
    [
        ("a dog on the top of a cat", "on the top of"),
        ("The mug was on top of the tray.", "on top of"),
        ("a cat near a dog on side of a road", "on side of"),
        ("a cat inside a box", None),
    ],
)
def test_the_first_relation_of_the_list_that_stands_in_the_prompt_is_taken(prompt, relation):
    assert relation_of(prompt, RELATIONS_2D) == relation


def test_a_place_scores_a_quarter_of_each_detection_and_half_of_the_position_or_nothing_below_a_half():
    found = [at(100, 100, "cat", 0.9), at(300, 100, "dog", 0.7)]
    assert score_2d(["cat", "dog"], "on the left of", found) == pytest.approx(0.25 * 1.6 + 0.5)
    assert score_2d(["dog", "cat"], "on the right of", found) == pytest.approx(0.25 * 1.6 + 0.5)
    assert score_2d(["cat", "dog"], "on the right of", found) == 0, "0.4 for both things"
    assert score_2d(["cat", "cow"], "on the left of", found) == score_2d(["pig", "cow"], "near", found) == 0
    certain = [at(100, 100, "cat", 1.0), at(300, 100, "dog", 1.0)]
    assert score_2d(["cat", "dog"], "on the right of", certain) == 0.5, "0.5 is not below 0.5"


def test_the_first_detection_of_exactly_that_name_is_taken_and_the_first_of_equals():
    dog = at(300, 100, "dog")
    far, close = at(500, 100, "cat", 0.9), at(100, 100, "cat", 0.9)
    assert score_2d(["cat", "dog"], "on the left of", [far, close, dog]) == 0
    assert score_2d(["cat", "dog"], "on the left of", [close, far, dog]) == pytest.approx(0.25 * 1.7 + 0.5)
    assert score_2d(["cat", "dog"], "on the left of", [at(100, 100, "wildcat"), dog]) == 0


def test_two_things_of_one_name_are_its_two_best_boxes_in_the_order_that_suits():
    one, two, three = at(100, 100, "person", 0.8), at(300, 100, "person", 0.6), at(500, 100, "person", 0.5)
    objects = ["person", "person"]
    assert score_2d(objects, "near", [one]) == 0
    for relation in ("on the left of", "on the right of"):
        assert score_2d(objects, relation, [one, two, three]) == pytest.approx(0.25 * 1.4 + 0.5)


# ----- places in depth


def wall(left_half: int, right_half: int) -> np.ndarray:
    """A map of 100 x 100 with one nearness on its left and one on its right."""
    return np.repeat(np.array([[left_half, right_half]], np.uint8), 50, axis=1).repeat(100, axis=0)


LEFT, RIGHT = seen("cat", 0, 0, 60, 90), seen("dog", 20, 0, 80, 90)  # common 40 of 80 columns: IoU 0.5


def test_the_nearer_thing_is_in_front_and_the_overlap_counts():
    third = seen("cat", 0, 0, 40, 90), seen("dog", 20, 0, 60, 90)  # 20 of 60 columns
    most = seen("cat", 0, 0, 60, 90), seen("dog", 15, 0, 60, 90)  # 45 of 60
    apart = seen("cat", 0, 0, 40, 90), seen("dog", 40, 0, 60, 90)
    near = wall(200, 100)
    assert position_3d("in front of", *third, near) == pytest.approx(2 / 3)
    assert position_3d("in front of", LEFT, RIGHT, near) == position_3d("in front of", *most, near) == 1
    assert position_3d("in front of", *apart, near) == 0
    assert position_3d("in front of", *third[::-1], near) == 0
    for relation in ("behind", "hidden"):
        assert position_3d(relation, *third, near) == 0
        assert position_3d(relation, *third[::-1], near) == pytest.approx(2 / 3)


def test_the_depth_map_is_read_by_rows_then_columns():
    high, low = seen("cat", 0, 0, 90, 40), seen("dog", 0, 20, 90, 60)  # 20 of 60 rows
    assert position_3d("in front of", high, low, wall(200, 100).T) == pytest.approx(2 / 3)


def test_equally_near_things_and_boxes_without_a_whole_pixel_stand_in_no_relation():
    flat = wall(7, 7)
    assert [position_3d(relation, LEFT, RIGHT, flat) for relation in RELATIONS_3D] == [0, 0, 0]
    assert position_3d("inside", LEFT, RIGHT, wall(200, 100)) == 0
    assert position_3d("in front of", seen("cat", 10.2, 0, 10.8, 90), RIGHT, wall(200, 100)) == 0


def test_a_place_in_depth_has_no_floor_and_takes_labels_that_hold_the_name():
    third = [seen("tabby cat", 0, 0, 40, 90, 0.4), seen("dog", 20, 0, 60, 90, 0.2)]
    near_left = wall(200, 100)
    assert score_3d(["cat", "dog"], "in front of", third, near_left) == pytest.approx(0.15 + 0.5 * 2 / 3)
    assert score_3d(["cat", "dog"], "behind", third, near_left) == pytest.approx(0.15)
    assert score_3d(["cat", "cow"], "behind", third, near_left) == pytest.approx(0.1)
    assert score_3d(["pig", "cow"], "behind", third, near_left) == 0
    another = seen("cat", 70, 0, 90, 90, 0.3)
    assert score_3d(["cat", "dog"], "in front of", [third[0], another, third[1]], near_left) == pytest.approx(
        0.15 + 0.5 * 2 / 3
    ), "the best box of a thing"


# ----- numbers


@pytest.mark.parametrize(
    "prompt, counts",
    [
        ("three mice, and a fish were there", [("mouse", 3), ("fish", 1)]),
        ("Two dogs", [("dog", 2)]),
        ("one dog and eight people", [("dog", 1), ("person", 8)]),
        ("two boys, three goldfish, one painting", [("person", 2), ("fish", 3), ("picture", 1)]),
        ("four teddy bears and a teddy bear", [("teddy bear", 4), ("teddy bear", 1)]),
        ("nine dogs", []),
        ("dogs and a", []),
        ("two big dogs", []),
    ],
)
def test_a_number_word_before_a_known_thing_counts_it(prompt, counts):
    assert counts_of(prompt, SINGULARS) == counts


def spread(label: str, number: int) -> list[Detection]:
    return [at(20 + 40 * i, 50, label) for i in range(number)]


@pytest.mark.parametrize(
    "counts, found, score",
    [
        ({"dog": 2}, [], 0),
        ({"dog": 2}, spread("dog", 1), 0.5),
        ({"dog": 2}, spread("dog", 2), 1),
        ({"dog": 2}, spread("dog", 3), 0.5),
        ({"dog": 2, "cat": 1, "fish": 4}, [*spread("dog", 2), *spread("cat", 2)], (1 + 0.5 + 0) / 3),
        ({"fish": 2}, spread("goldfish", 2), 1),
        ({"fish": 2}, [*spread("fish", 1), *spread("goldfish", 1)], 0.5),
        ({"fish": 1, "goldfish": 1}, spread("goldfish", 1), 0.5),
    ],
)
def test_a_number_scores_half_for_being_there_and_half_for_being_right(counts, found, score):
    """A name that is missing takes, for good, the labels that contain it."""
    assert count_score(list(counts.items()), found) == pytest.approx(score)


def test_a_box_that_covers_an_earlier_one_of_its_label_by_more_than_nine_tenths_is_the_same_thing():
    big = seen("dog", 0, 0, 99, 99)  # 100 x 100 pixels, both ends counted
    inside, most = seen("dog", 10, 10, 30, 30), seen("dog", 0, 0, 99, 90)
    nine_tenths, less = seen("dog", 10, 0, 109, 99), seen("dog", 11, 0, 110, 99)  # 0.9 of each, and 0.89
    dot = seen("dog", 50, 50, 50, 50)
    assert distinct([big, inside, most, dot]) == [big]
    assert distinct([inside, big]) == [inside]
    assert distinct([big, nine_tenths]) == [big, nine_tenths], "0.9 is not above 0.9"
    assert distinct([big, less, seen("cat", 0, 0, 99, 99)]) == [big, less, seen("cat", 0, 0, 99, 99)]
    assert distinct([big, seen("dog", 9, 0, 108, 99)]) == [big], "0.91 of each"


# ----- parses


def words(text: str) -> list[tuple[str, str]]:
    """ "the/DET cat/NOUN" as tokens."""
    return [tuple(word.rsplit("/", 1)) for word in text.split()]


@pytest.mark.parametrize(
    "tokens, pair",
    [
        ("The/DET hat/NOUN was/AUX on/ADP top/NOUN of/ADP the/DET brown/ADJ coat/NOUN rack/NOUN", ("hat", "coat")),
        ("The/DET cat/NOUN is/AUX on/ADP the/DET left/NOUN of/ADP the/DET soft/ADJ bag/NOUN ./PUNCT", ("cat", "bag")),
        ("Tom/PROPN stood/VERB next/ADV to/ADP Old/PROPN Big/PROPN Ben/PROPN ./PUNCT", ("Tom", "Ben")),
        ("Tom/PROPN stood/VERB near/ADP Ben/PROPN", ()),
        ("balloons/NOUN float/VERB near/ADP planes/NOUN near/ADP birds/NOUN", ()),
        ("The/DET phone/NOUN was/AUX resting/VERB on/ADP the/DET charger/NOUN", ()),
    ],
)
def test_the_things_of_a_complex_prompt_are_the_nouns_around_its_place_word(tokens, pair):
    assert around_the_place(words(tokens)) == pair


def test_the_grammar_gives_chunks_as_they_stand_in_the_prompt_or_nothing():
    parse = by_grammar("A red Car and a Grey teddy bear")
    assert parse == Parse(("A red Car", "a Grey teddy bear"), ("car", "teddy bear"))
    assert by_grammar("a cat behind a cat").chunks == ("a cat", "a cat")
    assert by_grammar("three cats") is by_grammar("A bathroom has a towel on the bar.") is None


def fake_spacy(monkeypatch, documents: dict[str, tuple[str, list[str]]]) -> None:
    """A spaCy that knows these prompts: (tagged words, chunks)."""

    class Document(list):
        noun_chunks: tuple = ()

    def nlp(prompt: str) -> Document:
        tagged, chunks = documents[prompt]
        document = Document(SimpleNamespace(text=text, pos_=tag) for text, tag in words(tagged))
        document.noun_chunks = tuple(SimpleNamespace(text=chunk) for chunk in chunks)
        return document

    nlp.meta = {"spacy_version": ">=3.8", "version": "3.8.0"}
    monkeypatch.setattr(parses, "_spacy", lambda: nlp)


SENTENCE = "The green plant was next to the tall lamp."
TAGS = "The/DET green/ADJ plant/NOUN was/AUX next/ADV to/ADP the/DET tall/ADJ lamp/NOUN ./PUNCT"
PARSED = Parse(
    ("The green plant", "the tall lamp"), ("plant", "lamp"), ("plant", "lamp"), "The plant was next to the lamp ."
)


def test_spacy_freezes_what_it_parses_and_the_file_gives_it_back_and_takes_no_other_version(monkeypatch, tmp_path):
    documents = {SENTENCE: (TAGS, list(PARSED.chunks)), "a dog": ("a/DET dog/NOUN", ["a dog"])}
    fake_spacy(monkeypatch, documents)
    assert parser("spacy").parse(SENTENCE) == PARSED
    prompts, frozen = tmp_path / "complex_val.txt", tmp_path / "parses.json"
    for text in (f"{SENTENCE}\n\n", "a dog\n"):
        prompts.write_text(text)
        freeze(prompts, frozen)
    source = parser(frozen)
    assert source.parse(SENTENCE) == PARSED and source.parse("a dog").pair == () and source.parse("a cat") is None
    assert source.name == "parses.json by spacy >=3.8, en_core_web_sm 3.8.0"
    frozen.write_text(json.dumps({"source": "by hand", "prompts": {}}))
    with pytest.raises(UserError, match="by hand"):
        freeze(prompts, frozen)


def test_missing_spacy_is_a_users_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="--parses spacy"):
        parser("spacy")


# ----- files


COMPLEX = {
    "The cat is near the dog.": ("near", ["cat", "dog"], "The cat is near the dog ."),
    "The man kicked the red ball.": (None, None, "The man kicked the ball ."),
    "A tall boy waved": (None, [], "A boy waved"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """All categories, two or three prompts each."""
    lines = {
        "color": ["a red car and a blue dog", "", "a red car and a blue dog"],
        "shape": ["a round car and a square dog"],
        "texture": ["a wooden car and a metal dog"],
        "spatial": ["a girl on the left of a dog", "a dog near a car"],
        "3d_spatial": ["a cat hidden by a dog", "a man in front of a boy"],
        "numeracy": ["two dogs and a car", "nothing here"],
        "non_spatial": ["A man is reading."],
        "complex": list(COMPLEX),
    }
    for category, prompts in lines.items():
        (tmp_path / f"{category}_val.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "complex_val_spatial.txt").write_text("the cat is near the DOG\n")
    (tmp_path / "complex_val_action.txt").write_text("The man kicked the red ball.\n")
    (tmp_path / "new_objects.txt").write_text("dog - dogs\ncar - cars\n")
    parsed = {text: by_grammar(text) for prompts in lines.values() for text in prompts}
    frozen = {text: {"chunks": one.chunks, "nouns": one.nouns} for text, one in parsed.items() if one}
    for text, (_, pair, clip_text) in COMPLEX.items():
        frozen[text] = {"chunks": [text.split(" ")[1]], "nouns": [], "pair": pair or [], "clip_text": clip_text}
    (tmp_path / "parses.json").write_text(json.dumps({"source": "by hand", "prompts": frozen}))
    return tmp_path


def test_a_folder_gives_every_category_with_ids_by_line(folder):
    items = load_items(folder, parser(folder / "parses.json"))
    assert [item.id for item in items if item.category == "color"] == ["color_00001", "color_00003"]
    assert len({item.id for item in items}) == len(items) == 14
    assert {item.category for item in items} == set(ROWS.values())
    assert json.loads(json.dumps([dict(item.meta) for item in items]))
    metas = {item.id: item.meta for item in items}
    assert metas["color_00001"]["questions"] == ["a red car?", "a blue dog?"]
    assert metas["spatial_00001"]["relation"] == "on the left of"
    assert metas["spatial_00001"]["objects"] == ["person", "dog"]
    assert metas["3d_spatial_00002"]["objects"] == ["person", "person"]
    assert metas["numeracy_00001"]["counts"] == [("dog", 2), ("car", 1)]
    assert metas["non_spatial_00001"]["clip_text"] == "A man is reading."


def test_a_complex_prompt_is_judged_by_the_list_that_names_it_else_by_all_three(folder):
    near, kicked, waved = load_items(folder / "complex_val.txt", parser(folder / "parses.json"))
    assert near.meta["objects"] == ["cat", "dog"] and "clip_text" not in near.meta
    assert kicked.meta["clip_text"] == "The man kicked the ball ." and "objects" not in kicked.meta
    assert waved.meta["objects"] == [] and waved.meta["clip_text"] == "A boy waved"
    for name in ("complex.txt", "complex_val_spatialaction.txt"):  # published as well
        (folder / name).write_bytes((folder / "complex_val.txt").read_bytes().replace(b"\n", b"\r\n"))
        assert [item.meta for item in load_items(folder / name, parser(folder / "parses.json"))] == [
            item.meta for item in (near, kicked, waved)
        ]


BROKEN = [
    "{",
    "[]",
    '{"source": "x", "prompts": {"a dog": {"chunks": "a dog", "nouns": ["dog"]}}}',
    '{"source": "x", "prompts": {"x": {"chunks": [], "nouns": [], "pair": ["a"]}}}',
]


@pytest.mark.parametrize(
    "change, path, named",
    [
        (lambda f: (f / "complex_val_action.txt").unlink(), ".", "complex_val_action.txt.*--categories color"),
        (lambda f: (f / "new_objects.txt").unlink(), "numeracy_val.txt", "new_objects.txt"),
        (lambda f: (f / "new_objects.txt").unlink(), ".", "new_objects.txt.*--categories color shape .* complex$"),
        (lambda f: (f / "shape_val.txt").write_text("no parse\n" * 100), ".", "100 prompts: .*95 more"),
        (lambda f: (f / "new_objects.txt").write_text("dog\n"), "numeracy_val.txt", "'dog'"),
        (lambda f: (f / "shape_val.txt").write_text(" \n"), "shape_val.txt", "shape_val.txt"),
        (lambda f: (f / "shape_val.txt").write_text("a dog\n\nno parse\n"), "shape_val.txt", "line 3 'no parse'"),
        (lambda f: (f / "complex_val.txt").write_text("a red car and a blue dog"), "complex_val.txt", "'pair'"),
        (lambda f: None, "nothing_val.txt", "nothing_val.txt"),
        (lambda f: (f / "empty").mkdir(), "empty", "color_val.txt"),
        *[
            (lambda f, text=text: (f / "parses.json").write_text(text), "shape_val.txt", "parses.json")
            for text in BROKEN
        ],
    ],
)
def test_a_missing_or_unfit_file_is_named(folder, change, path, named):
    change(folder)
    with pytest.raises(UserError, match=named):
        load_items(folder / path, parser(folder / "parses.json"))


def test_one_category_may_be_asked_for_by_any_file_name_and_others_are_refused(folder):
    (folder / "mine.txt").write_text("a red car and a blue dog\n")
    assert [item.category for item in load_items(folder / "mine.txt", GRAMMAR, ["texture"])] == ["texture"]
    with pytest.raises(UserError, match="color_val.txt"):
        load_items(folder / "color_val.txt", GRAMMAR, ["shape"])
    with pytest.raises(UserError, match="colour"):
        judges_of(["colour"])


# ----- models


def write_blip(folder: Path, image_size: int = 480) -> Path:
    size = write_words(folder, ["yes", "no", *WORDS], BERT_MARKS)["vocab_size"]
    ids = {"vocab_size": size + 2, "bos_token_id": size, "pad_token_id": 0}
    text = {**SIZE, **ids, "eos_token_id": None, "sep_token_id": None, "max_position_embeddings": 64}
    vision = {**SIZE, "image_size": image_size, "patch_size": 96}
    randomize(BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    side = {"height": 48, "width": 48}
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=side).save_pretrained(folder)
    return tiny.write_clip(folder)


def write_owl(folder: Path) -> Path:
    text = {**SIZE, **write_words(folder, WORDS), "max_position_embeddings": 16}
    vision = {**SIZE, "image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    randomize(Owlv2ForObjectDetection(config)).save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def write_dpt(folder: Path) -> Path:
    bit = {
        "model_type": "bit", "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "embedding_size": 8, "num_groups": 2,
        "global_padding": "same", "layer_type": "bottleneck", "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    }  # fmt: skip
    neck = {"neck_hidden_sizes": [8, 16, 8, 8], "fusion_hidden_size": 8, "backbone_featmap_shape": [1, 16, 4, 4]}
    size = {**SIZE, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3]}
    config = DPTConfig(is_hybrid=True, backbone_config=bit, use_auxiliary_head=False, **neck, **size)
    torch.manual_seed(0)
    DPTForDepthEstimation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    writers = {"blip": write_blip, "clip": write_clip, "detector": write_owl, "depth": write_dpt}
    for name, write in writers.items():
        (root / name).mkdir()
        write(root / name)
    return {f"{name}_path": root / name for name in writers}


# ----- BLIP


@torch.inference_mode()
def plain_blip(blip: BlipVQA, image: Image.Image, ids: list[int]) -> float:
    """p(yes) of one question without padding: the picture by PIL and NumPy, a softmax over all the vocabulary."""
    pixels = np.asarray(image.convert("RGB").resize((480, 480), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    looked = blip.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    read = blip.model.text_encoder(input_ids=torch.tensor([ids]), encoder_hidden_states=looked).last_hidden_state
    start = torch.tensor([[blip.model.config.text_config.bos_token_id]])
    said = blip.model.text_decoder(input_ids=start, encoder_hidden_states=read).logits[0, 0].softmax(-1)
    yes, no = said[3].item(), said[4].item()
    return yes / (yes + no)


ASKED = [["a red car?"], ["a dog?", "the green cat?", "a man"], [], ["a red car?", "a"]]


def test_blip_is_one_plain_forward_per_question_and_looks_at_each_picture_once(weights):
    blip, passes = BlipVQA(weights["blip_path"], device="cpu", batch_size=4), []
    for part, given in (("vision_model", "pixel_values"), ("text_encoder", "input_ids")):
        getattr(blip.model, part).register_forward_pre_hook(
            lambda _, args, named, part=part, given=given: passes.append((part, len(named[given]))), with_kwargs=True
        )
    rows = [(picture(i, 64 + 30 * i, 64), questions) for i, questions in enumerate(ASKED)]
    answers = blip.ask(rows)
    assert [len(row) for row in answers] == [1, 3, 0, 2]
    assert passes == [("vision_model", 3), *[("text_encoder", n) for n in (3, 1, 1, 1)]], "questions of one length"
    enc = len(blip.tokenizer) + 1
    ids = {"a": 5, "red": 6, "green": 7, "car": 9, "dog": 10, "cat": 11, "man": 12, "the": 17, "?": 24}
    for (image, questions), row in zip(rows, answers, strict=True):
        for question, p in zip(questions, row, strict=True):
            read = [enc, *(ids[word] for word in question.replace("?", " ?").split()), ids["?"] + 1]
            assert p == pytest.approx(plain_blip(blip, image, read), abs=1e-5)
    assert np.ptp(np.concatenate(answers)) > 0.01, "questions and pictures are told apart"


def test_a_question_is_cut_to_35_tokens(weights):
    blip = BlipVQA(weights["blip_path"], device="cpu")
    ids = blip.question_ids("dog " * 49 + "dog?")
    assert len(ids) == 35 and ids[0] == blip.enc and ids[-1] == blip.tokenizer.sep_token_id


def test_other_position_tables_are_interpolated_and_layer_norms_are_the_originals(tmp_path):
    blip = BlipVQA(write_blip(tmp_path, image_size=384), device="cpu")
    assert 0 < blip.ask([(picture(0), ["a dog?"])])[0][0] < 1
    assert blip.model.vision_model.post_layernorm.eps == 1e-6


# ----- OWLv2


def test_the_frame_is_torchvisions_resize_to_479_and_480_at_most():
    from torchvision.transforms import Resize

    for size in [(512, 512), (64, 64), (1024, 768), (300, 900), (519, 500)]:
        assert frame_size(size) == Resize(479, max_size=480)(Image.new("RGB", size)).size


@torch.inference_mode()
def plain_owl(owl: Owlv2, image: Image.Image, nouns: list[str]) -> list[Detection]:
    """The library's own forward and post-processing of one picture, then suppression by hand."""
    read = owl.tokenizer(
        [f"a photo of a {noun}" for noun in nouns], padding="max_length", max_length=16, return_tensors="pt"
    )
    out = owl.model(
        input_ids=read.input_ids,
        attention_mask=read.attention_mask,
        pixel_values=owl.processor([image], return_tensors="pt")["pixel_values"],
    )
    said = owl.processor.post_process_object_detection(out, owl.threshold, [image.size[::-1]])[0]
    width, height = frame_size(image.size)
    found = []
    for score, label, box in sorted(
        zip(*(said[k].tolist() for k in ("scores", "labels", "boxes")), strict=True), key=lambda row: -row[0]
    ):
        sides = [side * to / of for side, to, of in zip(box, (width, height) * 2, image.size * 2, strict=True)]
        sides = tuple(min(max(side, 0), most) for side, most in zip(sides, (width, height) * 2, strict=True))
        one = Detection(nouns[label], score, sides)
        inside = sides[2] > sides[0] and sides[3] > sides[1]
        if inside and all(iou(one.box, other.box) <= 0.5 for other in found if other.name == one.name):
            found.append(one)
    return found


SOUGHT = [["dog"], ["car", "cat", "man"], [], ["cat", "dog"]]


def test_owl_is_the_librarys_forward_and_post_processing_with_suppression(weights):
    owl = Owlv2(weights["detector_path"], device="cpu", threshold=0.6)
    rows = [(picture(i, 64 + 40 * (i % 2), 64), nouns) for i, nouns in enumerate(SOUGHT)]
    found = owl.detect(rows)
    assert found[2] == [] and sum(map(len, found)) > 3
    for (image, nouns), own in zip(rows, found, strict=True):
        expected = plain_owl(owl, image, nouns) if nouns else []
        assert [one.name for one in own] == [one.name for one in expected]
        for one, other in zip(own, expected, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.box == pytest.approx(other.box, abs=1e-2)


def test_a_detector_that_is_not_finite_finds_nothing_to_judge(weights):
    owl = Owlv2(weights["detector_path"], device="cpu")
    owl.model.box_head.dense2.bias.fill_(float("nan"))
    assert owl.detect([(picture(0), ["dog"]), (picture(1), [])]) == [None, []]


# ----- depth


def test_depth_is_stretched_resized_and_cut_to_whole_numbers():
    ramp = torch.tensor([[2.0, 4.0], [2.0, 4.0]])
    whole = eight_bits(ramp, (480, 480))
    assert whole.shape == (479, 479) and whole.dtype == np.uint8
    assert whole[0, 0] == 0 and whole[0, -1] in (254, 255), "the greatest is 255 before the frame's resize"
    assert whole[100, 239] == 127, "the middle, 127.5, is cut"
    assert eight_bits(torch.full((4, 4), 3.0), (64, 32)).max() == 0
    assert eight_bits(ramp, (960, 480)).shape == (240, 480)
    assert eight_bits(torch.tensor([[1.0, float("inf")]]), (8, 8)) is None


def test_depth_maps_are_the_models_own_one_by_one_or_together(weights):
    model = Depth(weights["depth_path"], device="cpu", batch_size=2)
    images = [picture(i, 64, 48 + 16 * i) for i in range(2)]
    together = model.maps(images)
    for image, own in zip(images, together, strict=True):
        pixels = np.asarray(image.resize((480, 480), Image.Resampling.BILINEAR), np.float32) / 255
        pixels = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = eight_bits(model.model(pixel_values=pixels).predicted_depth[0], image.size)
        assert own.shape == frame_size(image.size)[::-1]
        assert np.abs(own.astype(int) - expected).max() <= 1
        assert np.ptp(own) > 200, "the map is not flat"


def test_weights_that_dpt_never_uses_may_be_missing(weights, tmp_path):
    for file in weights["depth_path"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith(depth.UNUSED)}
    assert len(used) < len(tensors)
    save_file(used, tmp_path / "model.safetensors", {"format": "pt"})
    assert Depth(tmp_path, device="cpu")


# ----- CLIP


def test_clip_score_is_the_raw_cosine_of_features(weights):
    clip = ClipScore(weights["clip_path"], device="cpu", batch_size=2)
    rows = [
        (picture(i, 64, 48 + 9 * i), text) for i, text in enumerate(["a dog", "the man is reading a photo", "a dog"])
    ]
    for (image, text), cosine in zip(rows, clip.cosines(rows), strict=True):
        read = clip.tokenizer([text], return_tensors="pt")
        with torch.inference_mode():
            out = clip.model(
                input_ids=read.input_ids,
                attention_mask=read.attention_mask,
                pixel_values=clip.processor(image, return_tensors="pt")["pixel_values"],
            )
        assert cosine == pytest.approx((out.image_embeds @ out.text_embeds.T).item(), abs=1e-5)


# ----- the benchmark


def built(weights: dict[str, Path], **options) -> CompBench:
    """As `--benchmark compbench` builds it."""
    options = BenchmarkOptions(**{name: str(path) for name, path in weights.items()}, **options)
    return BENCHMARKS["compbench"](options, RewardOptions(), "cpu")


def test_every_category_is_judged_by_its_models_and_a_batch_is_one_by_one(folder, weights):
    bench = built(weights, parses=str(folder / "parses.json"))
    bench.judges["detector"].threshold = 0.3
    items = bench.load(folder)
    images = [picture(i, 64 + 8 * (i % 3), 64) for i in range(len(items))]
    verdicts = bench.judge(items, images)
    assert [list(one.parts) for one in verdicts] == [[item.category] for item in items]
    assert json.loads(json.dumps([one.detail for one in verdicts]))
    assert set(bench.categories) == {item.category for item in items}
    for item, image, one in zip(items, images, verdicts, strict=True):
        (score,) = one.parts[item.category]
        (alone,) = bench.judge([item], [image])[0].parts[item.category]
        assert score == pytest.approx(alone, abs=2e-4), item.id  # answers are rounded to 4 decimals
        assert (score is None) == (item.id == "numeracy_00002"), "it counts nothing"


PLACE = {"objects": ["cat", "dog"], "relation": "on top of"}
FOUND = [at(200, 100, "cat"), at(200, 300, "dog")]  # 0.9 by the rule of places
FLAT, NAN = np.zeros((9, 9), np.uint8), float("nan")


def score_of(kind: str, meta: dict, **seen_) -> float | None:
    (score,) = verdict({"kind": kind, **meta}, **seen_).parts[ROWS[kind]]
    return score


def test_a_complex_prompt_scores_the_mean_of_what_it_is_judged_by():
    asked, text = {"questions": ["a?"]}, {"clip_text": "a cat"}
    assert score_of("complex", asked | PLACE, answers=[0.5], found=FOUND) == pytest.approx((0.5 + 0.9) / 2)
    assert score_of("complex", asked | text, answers=[0.5], cosine=0.3) == pytest.approx((0.5 + 0.3) / 2)
    three = asked | PLACE | text
    assert score_of("complex", three, answers=[0.5], found=FOUND, cosine=0.3) == pytest.approx(1.7 / 3)
    no_pair = three | {"objects": []}
    assert score_of("complex", no_pair, answers=[0.5], cosine=0.3) == pytest.approx((0.5 + 0 + 0.3) / 3)
    assert score_of("complex", three, answers=[0.5], found=None, cosine=0.3) is None


@pytest.mark.parametrize(
    "kind, meta, seen_",
    [
        ("color", {"questions": []}, {}),
        ("color", {"questions": ["a?"]}, {"answers": [NAN]}),
        ("spatial", PLACE, {}),
        ("spatial", {**PLACE, "objects": []}, {"found": []}),
        ("3d_spatial", PLACE, {"found": []}),
        ("3d_spatial", PLACE, {"nearness": FLAT}),
        ("numeracy", {"counts": [("dog", 1)]}, {}),
        ("numeracy", {"counts": []}, {"found": []}),
        ("non_spatial", {"clip_text": "a cat"}, {"cosine": NAN}),
    ],
)
def test_what_cannot_be_judged_is_none_with_a_reason(kind, meta, seen_):
    found = verdict({"kind": kind, **meta}, **seen_)
    assert found.parts == {ROWS[kind]: [None]}
    assert [part["reason"] for part in found.detail.values() if part["score"] is None] == found.absent != []


def test_only_the_models_of_the_categories_are_loaded_and_named(weights):
    bench = built({"clip_path": weights["clip_path"]}, categories=["non_spatial"])
    assert bench.settings["contents"]["clip_path"][0] == str(weights["clip_path"])
    assert bench.categories == ("non_spatial",)
    assert bench.overall({"color": 0.8, "shape": 0.5, "non_spatial": 0.3}) == pytest.approx(1.6 / 3)
