"""Claims about GroundingDINO: formulas on hand-made boxes, and the model part on a random toy of the real class."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    SwinConfig,
)

from data.grammar import RELATIONS
from errors import UserError
from interfaces import Prompt, Sample
from rewards.gdino import (
    Detection,
    GroundingDino,
    caption_of,
    corners,
    count_score,
    iou,
    nms,
    object_score,
    picture_score,
    position_term,
    spans,
    spatial_score,
)
from tests.tiny import picture, sample, write_bert_tokenizer

FRAME = (480, 480)
# locality -> where it puts object 1, as seen from object 2
PLACES = {
    **dict.fromkeys(("left of", "on the left of"), "left"),
    **dict.fromkeys(("right of", "on the right of"), "right"),
    **dict.fromkeys(("above", "on top of", "on the top of"), "top"),
    **dict.fromkeys(("below", "on the bottom of"), "bottom"),
    **dict.fromkeys(("next to", "near", "on side of"), "near"),
}
SHIFTS = {"left": (-0.375, 0.0625), "right": (0.375, 0.0625), "top": (0.0625, -0.375), "bottom": (0.0625, 0.375)}


def box(noun: int, x: float, y: float, w: float = 0.1, h: float = 0.1, score: float = 0.9) -> Detection:
    return Detection(noun, score, (x, y, w, h))


def cells(noun: int, left: int, top: int, right: int, bottom: int, score: float = 0.9) -> Detection:
    """A box by its corners, in sixteenths of the picture: such numbers are exact."""
    return box(noun, (left + right) / 32, (top + bottom) / 32, (right - left) / 16, (bottom - top) / 16, score)


def related(relation: str, first: str = "car", second: str = "zebra") -> Prompt:
    return Prompt("a prompt", "position", (first, second), spatial=(first, relation, second))


def counted(*counts: tuple[str, int]) -> Prompt:
    return Prompt("a prompt", "counting", tuple(name for name, _ in counts), counts=counts)


# ----- position


def test_every_locality_of_the_data_is_known_here():
    assert set(PLACES) == set(RELATIONS.values())


@pytest.mark.parametrize("place", SHIFTS)
@pytest.mark.parametrize("locality", PLACES)
def test_a_position_is_full_where_the_locality_puts_it_and_nowhere_else(locality, place):
    x, y = SHIFTS[place]
    found = [box(0, 0.5 + x, 0.5 + y), box(1, 0.5, 0.5)]
    holds = PLACES[locality] in (place, "near")
    assert spatial_score(related(locality), found, FRAME) == pytest.approx(1.0 if holds else 0.4)
    assert spatial_score(related(locality), found[1:], FRAME) == pytest.approx(0.2)
    assert spatial_score(related(locality), [], FRAME) == 0


@pytest.mark.parametrize("locality", [locality for locality, place in PLACES.items() if place != "near"])
def test_a_direction_needs_strictly_more_along_than_across(locality):
    for x in (-0.25, 0.25):
        for y in (-0.25, 0.25):
            assert position_term(locality, (0.5 + x, 0.5 + y, 0.1, 0.1), (0.5, 0.5, 0.1, 0.1), FRAME) == 0
    x, y = SHIFTS[PLACES[locality]]
    nearly = (0.5 + np.sign(x) * (0.25 + (abs(x) > abs(y)) / 64), 0.5 + np.sign(y) * (0.25 + (abs(y) > abs(x)) / 64))
    assert position_term(locality, (*nearly, 0.1, 0.1), (0.5, 0.5, 0.1, 0.1), FRAME) == 1


def test_overlap_takes_from_a_direction_from_a_tenth_on():
    tenth = [cells(0, 0, 0, 3, 2), cells(1, 2, 1, 7, 2)]  # areas 6 and 5, intersection 1: exactly 1 / 10
    eighth = [cells(0, 0, 0, 3, 2), cells(1, 2, 1, 5, 2)]  # 6 and 3, intersection 1
    quarter = [cells(0, 0, 0, 5, 2), cells(1, 3, 0, 8, 2)]  # 10 and 10, intersection 4
    assert iou(corners(tenth[0].box), corners(tenth[1].box)) == 0.1
    assert spatial_score(related("left of"), tenth, FRAME) == pytest.approx(1.0)
    assert spatial_score(related("left of"), eighth, FRAME) == pytest.approx(0.4 + 0.6 * 0.8)
    assert spatial_score(related("left of"), quarter, FRAME) == pytest.approx(0.4 + 0.6 * 0.1 / 0.25)
    assert spatial_score(related("near"), quarter, FRAME) == pytest.approx(1.0)


def test_near_is_150_of_480_pixels_along_x_or_y_and_falls_with_the_larger_distance():
    def score(x: float, y: float, size=FRAME) -> float:
        return spatial_score(related("near"), [box(0, 0.125, 0.125), box(1, 0.125 + x, 0.125 + y)], size)

    assert score(0.3125, 0.3125) == pytest.approx(1.0)
    assert score(0.625, 0.625) == pytest.approx(0.4 + 0.6 * 150 / 300)
    assert score(0.375, 0.75) == pytest.approx(0.4 + 0.6 * 150 / 360)
    assert score(0.75, 0.3125) == pytest.approx(0.4 + 0.6 * 150 / 360)  # 150 is not below 150
    assert score(0.75, 0.3) == score(0.3, 0.75) == pytest.approx(1.0)  # one row or one column is near: as published
    assert score(0.625, 0.625, (64, 64)) == pytest.approx(0.7)


def test_near_is_measured_on_the_shorter_side_of_a_picture():
    far = [box(0, 0.125, 0.125), box(1, 0.125 + 0.3125, 0.125 + 0.625)]  # 300 and 300, or 150 and 600 pixels
    assert spatial_score(related("next to"), far, (960, 480)) == pytest.approx(0.4 + 0.6 * 150 / 300)
    assert spatial_score(related("next to"), far, (480, 960)) == pytest.approx(0.4 + 0.6 * 150 / 600)


def test_directions_are_compared_in_pixels():
    found = [box(0, 0.25, 0.25), box(1, 0.45, 0.55)]  # 192 pixels to the right, 144 down on 960 x 480
    assert spatial_score(related("left of"), found, (960, 480)) == pytest.approx(1.0)
    assert spatial_score(related("on the top of"), found, (960, 480)) == pytest.approx(0.4)


def test_the_best_box_of_each_object_is_compared_and_the_first_of_equals():
    zebra = box(1, 0.5, 0.5)
    left, right = box(0, 0.1, 0.5, score=0.5), box(0, 0.9, 0.5, score=0.4)
    for cars, holds in [
        ([left, right], True),
        ([right, left], True),
        ([left, replace(right, score=0.6)], False),
        ([left, replace(right, score=0.5)], True),
        ([replace(right, score=0.5), left], False),
    ]:
        assert spatial_score(related("left of"), [*cars, zebra], FRAME) == pytest.approx(0.4 + 0.6 * holds)


def test_two_objects_of_one_name_are_its_two_best_boxes_in_either_order():
    def score(locality: str, *found: Detection) -> float:
        return spatial_score(related(locality, "dog", "dog"), found, FRAME)

    left, right, copy = box(0, 0.2, 0.5, score=0.5), box(1, 0.8, 0.5, score=0.8), box(1, 0.2, 0.5, score=0.4)
    for locality, expected in [("left of", 1.0), ("right of", 1.0), ("near", 1.0), ("above", 0.4)]:
        assert score(locality, left, right, copy) == pytest.approx(expected)
    assert score("left of", left, copy) == pytest.approx(0.2), "one dog, seen for both nouns, is one dog"
    assert score("left of") == 0


# ----- number


@pytest.mark.parametrize("there", range(5))
@pytest.mark.parametrize("asked", range(1, 5))
def test_a_number_scores_one_if_it_is_right(asked, there):
    found = [box(0, 0.1 + 0.2 * i, 0.5) for i in range(there)]
    copies = [box(0, 0.105 + 0.2 * i, 0.5, score=0.4) for i in range(there)]  # IoU 0.095 / 0.105: the same objects
    assert count_score(counted(("dog", asked)), copies + found) == (there == asked)
    cat = box(1, 0.5, 0.9)
    assert count_score(counted(("dog", asked), ("cat", 1)), [*found, cat]) == ((there == asked) + 1) / 2


def test_suppression_keeps_the_best_first_and_an_overlap_of_just_the_threshold():
    whole, half, low = cells(0, 0, 0, 4, 2, 0.5), cells(0, 0, 0, 2, 2, 0.7), cells(0, 0, 0, 4, 2, 0.4)
    assert nms([whole, half, low]) == [half, whole]
    assert nms([]) == []
    twins = [replace(whole, noun_index=i) for i in range(3)]
    assert nms(twins) == twins[:1]


# ----- objects


def test_objects_score_the_share_that_has_a_box():
    prompt = Prompt("a prompt", "two_object", ("car", "zebra", "dog"))
    assert object_score(prompt, [box(0, 0.5, 0.5), box(2, 0.1, 0.1), box(2, 0.9, 0.9)]) == pytest.approx(2 / 3)
    assert object_score(prompt, []) == 0
    one_query = (0.5, 0.5, 0.2, 0.2)
    assert object_score(prompt, [Detection(noun, 0.4, one_query) for noun in range(3)]) == 1


def test_empty_boxes_and_boxes_beyond_the_picture_are_counted_and_never_overlap_wrongly():
    line, beyond = box(0, 0.2, 0.5, 0.0, 0.2), box(0, 1.0, 0.5, 0.4, 0.4)
    assert iou(corners(line.box), corners(line.box)) == 0
    assert count_score(counted(("dog", 3)), [line, line, beyond]) == 1
    point = [box(0, 0.2, 0.5, 0.0, 0.0), box(1, 1.0, 0.5, 2.0, 2.0)]
    assert spatial_score(related("left of"), point, FRAME) == pytest.approx(1.0)
    assert iou(corners((1.0, 0.5, 0.4, 0.4)), corners((1.2, 0.5, 0.4, 0.4))) == pytest.approx(1 / 3)


# ----- which formula


def test_the_task_says_what_is_judged():
    found = [box(0, 0.9, 0.5), box(1, 0.1, 0.5)]  # both there, each once, the car on the right
    spatial, counts = ("car", "left of", "zebra"), (("car", 2), ("zebra", 1))

    def score(task: str, **fields) -> float:
        return picture_score(Prompt("a prompt", task, ("car", "zebra"), **fields), found, FRAME)

    assert score("position", spatial=spatial) == pytest.approx(0.4)
    assert score("counting", counts=counts) == 0.5
    for task in ("single_object", "two_object", "colors", "color_attr", "shape", "texture", "complex", "non", ""):
        assert score(task, spatial=spatial, counts=counts, attr_nouns=("a red car", "a blue zebra")) == 1


@pytest.mark.parametrize(
    "prompt, named",
    [
        (Prompt("x", "counting", ("dog",), counts=(("cow", 1),)), "cow"),
        (Prompt("x", "position", ("dog",), spatial=("dog", "left of", "cow")), "cow"),
        (related("behind"), "behind"),
    ],
)
def test_an_object_or_a_locality_that_is_unknown_is_named(prompt, named):
    with pytest.raises(ValueError, match=named):
        picture_score(prompt, [box(i, 0.5, 0.5) for i in range(len(prompt.nouns))], FRAME)


# ----- the released formula


def test_the_released_formula_scores_as_the_released_code():
    def position(locality: str, *found: Detection, size=FRAME, names=("car", "zebra")) -> float:
        return spatial_score(related(locality, *names), found, size, released=True)

    left, right = box(0, 0.2, 0.5), box(1, 0.8, 0.5)
    assert position("left of", left, right) == position("next to", left, right) == pytest.approx(0.9)
    assert position("right of", left, right) == pytest.approx(0.4) and position("near", right) == pytest.approx(0.2)
    over, tops = (box(0, 0.5, 0.1), box(1, 0.5, 0.8)), ("above", "on top of", "on the top of")
    assert [position(name, *over) for name in tops] == pytest.approx([0.4, 0.4, 0.9])
    assert position("near", box(0, 0.0, 0.0), box(1, 1.0, 1.0), size=(960, 480)) == pytest.approx(0.9)
    aslant = box(0, 0.25, 0.25), box(1, 0.45, 0.55)  # more to the right in pixels of 960 x 480, lower as shares
    assert position("left of", *aslant, size=(960, 480)) == pytest.approx(0.4)
    assert position("left of", left, right, names=("dog", "dog")) == 0

    def count(asked: int, *found: Detection) -> float:
        return count_score(counted(("dog", asked)), found, released=True)

    small = [box(0, 0.5, 0.5, 0.4, 0.4), box(0, 0.5, 0.5, 0.4, 0.4, 0.8)]  # (0.5, 0.5)-(0.4, 0.4) as corners: empty
    large = [box(0, 0.5, 0.5, 0.9, 0.9), box(0, 0.5, 0.5, 0.9, 0.9, 0.8)]  # (0.5, 0.5)-(0.9, 0.9) as corners: a box
    assert (len(nms(small)), len(nms(small, released=True)), len(nms(large, released=True))) == (1, 2, 1)
    assert [count(1), count(1, *small), count(2, *small), count(1, *large)] == [0, 0.2, 1, 1]
    nouns = ("car", "teddy bear", "toy train set")
    found = [box(noun, 0.2 + 0.3 * noun, 0.5) for noun in range(3)]
    assert object_score(Prompt("", "", nouns), found) == 1
    assert object_score(Prompt("", "", nouns), found, released=True) == pytest.approx(2 / 3)
    assert object_score(Prompt("", "", ("toy train set", "toy set")), found[:1], released=True) == 0.5
    assert spans(nouns, released=True) == [[(0, 3)], [(6, 11), (12, 16)], [(19, 22), (29, 32)]]


# ----- caption


def test_a_noun_is_all_its_characters():
    nouns = ("car", "teddy bear", "toy train set")
    assert caption_of(nouns) == "car . teddy bear . toy train set."
    assert spans(nouns) == [[(0, 3)], [(6, 16)], [(19, 32)]]


# ----- the model, a random toy

WORDS = "car zebra dog cat teddy bear toy train set ele ##phant red".split()
FIRST_WORD, MAX_TEXT = 200, 24
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZE = {"shortest_edge": 64, "longest_edge": 128}


def write_folder(folder: Path) -> Path:
    """A random GroundingDINO with 12 queries; boxes and the text's influence are made as random as the rest."""
    vocab = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # the ids that it knows
    write_bert_tokenizer(folder, vocab | {word: FIRST_WORD + i for i, word in enumerate(WORDS)})
    GroundingDinoImageProcessorPil(size=SIZE).save_pretrained(folder)
    swin = SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4,
        out_indices=[2, 3],
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=12,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        num_feature_levels=3, max_text_len=MAX_TEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    for name, parameter in model.named_parameters():
        if "bbox_embed" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith(("vision_param", "text_param")):
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("gdino"))


@pytest.fixture(scope="module")
def gdino(folder) -> GroundingDino:
    return GroundingDino(folder, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def every_query(folder) -> GroundingDino:
    """Keeps all queries for all nouns, so that scores can be compared one by one."""
    return GroundingDino(folder, device="cpu", batch_size=3, box_threshold=-1.0)


def samples() -> list[Sample]:
    """Two groups of four, captions of several lengths, pictures of two shapes."""
    prompts = [related("left of"), Prompt("toys", "two_object", ("toy train set", "teddy bear", "elephant"))]
    sizes = [(64, 64), (128, 64), (64, 64), (128, 64)]
    return [sample(p, picture(4 * row + i, *size)) for row, p in enumerate(prompts) for i, size in enumerate(sizes)]


def numbers(detections: list[Detection]) -> np.ndarray:
    return np.array([[one.noun_index, one.score, *one.box] for one in detections])


def forwarded(monkeypatch, gdino: GroundingDino) -> list[tuple[int, ...]]:
    """The shape of the pictures of each forward pass from now on."""
    shapes, original = [], gdino.model.forward

    def count(**inputs):
        shapes.append(tuple(inputs["pixel_values"].shape))
        return original(**inputs)

    monkeypatch.setattr(gdino.model, "forward", count)
    return shapes


def ids_of(*words: str) -> list[int]:
    ids = {".": 1012, "[UNK]": 100} | {word: FIRST_WORD + i for i, word in enumerate(WORDS)}
    return [101, *(ids[word] for word in words), 102]


def test_the_tokens_of_a_noun_are_those_of_its_characters(folder, gdino):
    nouns = ("toy train set", "elephant", "Car")
    caption = gdino.tokenize(nouns)
    assert caption.ids == ids_of("toy", "train", "set", ".", "ele", "##phant", ".", "car", ".")
    assert caption.tokens == [[1, 2, 3], [5, 6], [8]]
    released = GroundingDino(folder, device="cpu", released=True)
    assert released.tokenize(nouns).tokens == [[1, 3], [5, 6], [8]]


@pytest.mark.parametrize("released, rows", [(False, [[1, 2, 3], [5]]), (True, [[1, 3], [5]])])
def test_a_detection_is_a_query_whose_mean_sigmoid_over_the_noun_is_above_the_threshold(folder, released, rows):
    gdino, image = GroundingDino(folder, device="cpu", released=released), picture(3)
    pixels = ((np.asarray(image) / 255 - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)
    ids = torch.tensor([ids_of("toy", "train", "set", ".", "dog", ".")])
    with torch.no_grad():
        outputs = gdino.model(pixel_values=torch.from_numpy(pixels), input_ids=ids)
    sigmoid = 1 / (1 + np.exp(-outputs.logits[0].numpy().astype(np.float64)))
    boxes = outputs.pred_boxes[0].numpy()
    scores = [sigmoid[:, row].mean(axis=1) for row in rows]
    expected = [[n, scores[n][q], *boxes[q]] for n in range(2) for q in range(12) if scores[n][q] > 0.3]
    assert 0 < len(expected) < 24
    found = gdino.detect([(image, ("toy train set", "dog"))])[0]
    np.testing.assert_allclose(numbers(found), np.array(expected), atol=1e-5)


def test_a_score_is_the_formula_on_the_detections(gdino):
    for one in samples():
        found = gdino.detect([(one.images[0], one.prompt.nouns)])[0]
        assert gdino([one]) == [picture_score(one.prompt, found, one.images[0].size)]


def test_boxes_are_shares_of_the_picture_itself(every_query, monkeypatch):
    shapes = forwarded(monkeypatch, every_query)
    every_query.detect([(picture(0), ("dog",)), (picture(1, 120, 40), ("dog",))])
    assert shapes == [(1, 3, 64, 64), (1, 3, 43, 128)], "no picture is padded to the size of another"


def test_outputs_that_are_not_finite_leave_the_sample_without_a_score(gdino, monkeypatch):
    original, prompt = gdino.model.forward, Prompt("a dog", "", ("dog",))
    batch = [sample(prompt, picture(seed)) for seed in range(3)]
    for field in ("logits", "pred_boxes"):

        def broken(field=field, **inputs):
            outputs = original(**inputs)
            outputs[field][0] = torch.nan
            return outputs

        monkeypatch.setattr(gdino.model, "forward", broken)
        scores = gdino(batch)
        assert scores[0] is None
        assert all(isinstance(score, float) for score in scores[1:])
        assert gdino([sample(prompt, picture(0), picture(1))]) == [None]


def test_prompts_without_nouns_score_one_without_a_look_and_are_reported(gdino, monkeypatch):
    shapes = forwarded(monkeypatch, gdino)
    assert gdino([sample(Prompt("sunset vibes"), picture(0))]) == [1.0]
    assert gdino([]) == []
    assert shapes == []
    assert len(gdino.limits([related("near")])) == 1
    assert "2 of 3 prompts" in gdino.limits([related("near"), Prompt("sunset vibes"), Prompt("mood")])[0]


def test_an_unknown_locality_in_the_data_stops_the_load(folder):
    with pytest.raises(UserError, match="'behind'"):
        GroundingDino(folder, device="cpu", prompts=[related("near"), related("behind")])


def test_a_noun_of_which_a_token_is_cut_counts_as_not_found_and_is_reported(gdino, every_query):
    nouns = ("dog " * 10 + "dog", "cat " * 8 + "cat")  # 11 + 9 words, two dots, [CLS] and [SEP]: these just fit
    assert gdino.tokenize(nouns).tokens == [list(range(1, 12)), list(range(13, 22))]
    assert gdino.tokenize(("dog " * 21 + "dog",)).tokens == [list(range(1, 23))], "only the dot behind it is cut"
    assert "cuts 0 of 1 prompts" in gdino.limits([Prompt("x", nouns=nouns)])[-1]
    nouns = ("dog", "dog " * 22 + "dog", "cat")
    caption = gdino.tokenize(nouns)
    assert len(caption.ids) == MAX_TEXT and caption.ids[-1] == 102 and caption.tokens == [[1], [], []]
    assert "cuts 1 of 1 prompts" in gdino.limits([Prompt("x", nouns=nouns)])[-1]
    assert every_query([sample(Prompt("x", "", nouns), picture(0))]) == [pytest.approx(1 / 3)]


def test_characters_beyond_the_alphabet_and_typed_brackets_do_not_shift_the_nouns_after_them(gdino):
    assert gdino.tokenize(("[SEP]",)).ids.count(102) == 1
    caption = gdino.tokenize(("🦓", "İ dog", "teddy bear"))
    assert [caption.ids[token] for token in caption.tokens[2]] == ids_of("teddy", "bear")[1:-1]
    assert FIRST_WORD + WORDS.index("dog") in [caption.ids[token] for token in caption.tokens[1]]


@pytest.mark.parametrize(
    "given, plain",
    [
        (("toy.",), ("toy",)),
        (("red. toy",), ("red toy",)),
        (("toy?", "red dog!"), ("toy", "red dog")),
        (("red, toy;", "teddy: bear…", "dog"), ("red toy", "teddy bear", "dog")),
        (("toy。", "dog．", "cat，", "red、 car"), ("toy", "dog", "cat", "red car")),
        (("St. dog", "U.S. toy", "red.toy"), ("St dog", "U S toy", "red toy")),
        (("dog", "?!", "cat"), ("dog", "cat")),
    ],
)
def test_a_nouns_own_marks_enter_neither_the_caption_nor_a_mean(given, plain, gdino, every_query):
    caption, image = gdino.tokenize(given), picture(0)
    assert caption.ids == gdino.tokenize(plain).ids and caption.ids.count(1012) == len(plain)
    assert [tokens for tokens in caption.tokens if tokens] == gdino.tokenize(plain).tokens
    found, same = every_query.detect([(image, given), (image, plain)])
    np.testing.assert_allclose(numbers(found)[:, 1:], numbers(same)[:, 1:], atol=1e-6)
    assert every_query([sample(Prompt("x", "", given), image)]) == every_query([sample(Prompt("x", "", plain), image)])


def test_a_noun_of_marks_alone_is_no_noun(gdino):
    assert gdino([sample(Prompt("x", "", (".", "?!", "。")), picture(0))]) == [1.0]
