"""Claims about GenEval: its rules by hand, its rows, and its models as tiny random ones of the real classes."""

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from errors import UserError
from evaluation.benchmark import Item
from evaluation.benchmarks import BENCHMARKS, BenchmarkOptions
from evaluation.clip_colours import ClipColours, crop_of
from evaluation.geneval import (
    CLASS_NAMES,
    COLORS,
    Detection,
    GenEval,
    colour_questions,
    found_objects,
    relations,
    shortcomings,
)
from evaluation.mask2former import Mask2Former, box_of, detections_of, network_input, padded, resized
from interfaces import Prompt
from rewards import RewardOptions
from tests.tiny import picture, write_clip

BOX = (10.0, 10.0, 30.0, 30.0)


def seen(name: str, score: float = 0.95, box=BOX, mask=None) -> Detection:
    return Detection(name, score, box, mask)


def thing(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def row(tag: str, *include: dict, exclude=(), prompt: str = "a prompt") -> dict:
    return {"tag": tag, "include": list(include), **({"exclude": list(exclude)} if exclude else {}), "prompt": prompt}


def number_of(name: str, count: int) -> dict:
    return row("counting", thing(name, count), exclude=[thing(name, count + 1)])


def reasons(meta: dict, detections: list[Detection], colours: dict[int, list[str]] | None = None) -> list[str]:
    return shortcomings(meta, found_objects(detections, meta["tag"]), colours or {})


# ----- presence, number, exclusion


@pytest.mark.parametrize(
    ("meta", "detected", "lacks"),
    [
        (row("single_object", thing("dog")), ["dog"], []),
        (row("single_object", thing("dog")), ["dog", "dog", "cat"], []),  # whatever else is there
        (row("single_object", thing("dog")), ["cat"], ["expected dog>=1, found 0"]),
        (row("two_object", thing("dog"), thing("cup")), ["cup", "dog"], []),
        (row("two_object", thing("dog"), thing("cup")), ["dog", "dog"], ["expected cup>=1, found 0"]),
        (row("two_object", thing("dog"), thing("cup")), [], ["expected dog>=1, found 0", "expected cup>=1, found 0"]),
        (number_of("dog", 3), ["dog"] * 3 + ["cat"] * 5, []),
        (number_of("dog", 3), ["dog"] * 2, ["expected dog>=3, found 2"]),
        (number_of("dog", 3), ["dog"] * 4, ["expected dog<4, found 4"]),
        (row("two_object", thing("dog"), exclude=[thing("cat", 2)]), ["dog", "cat"], []),
        (row("two_object", thing("dog"), exclude=[thing("cat", 1)]), ["dog", "cat"], ["expected cat<1, found 1"]),
        (row("single_object", thing("dog", 17)), ["dog"] * 20, ["expected dog>=17, found 16"]),  # 16 of a class count
    ],
)
def test_objects_must_be_there_in_number_and_not_be_excluded(meta, detected, lacks):
    assert reasons(meta, [seen(name) for name in detected]) == lacks


@pytest.mark.parametrize(("tag", "edge"), [("single_object", 0.3), ("position", 0.3), ("counting", 0.9)])
def test_a_score_on_the_threshold_does_not_count_and_the_next_number_does(tag, edge):
    assert found_objects([seen("dog", edge)], tag) == {}
    above = seen("dog", float(np.nextafter(edge, 1)))
    assert found_objects([above], tag) == {"dog": [above]}


def test_of_more_than_sixteen_of_a_class_the_best_sixteen_are_kept_and_ties_keep_their_order():
    detections = [seen("dog", 0.5 + place / 100) for place in range(20)] + [seen("cat", 0.4)]
    found = found_objects(detections, "colors")
    assert [one.score for one in found["dog"]] == [0.5 + place / 100 for place in range(19, 3, -1)]
    assert len(found["cat"]) == 1
    ties = [seen("dog", 0.5, (float(place), 0.0, 9.0, 9.0)) for place in range(3)]
    assert found_objects(ties, "colors")["dog"] == ties


# ----- colour


def test_only_the_best_of_a_class_are_asked_for_their_colour():
    meta = row("colors", thing("car", 2, color="red"))
    detections = [seen("car", 0.5), seen("car", 0.8), seen("car", 0.7), seen("dog", 0.99)]
    asked = colour_questions(meta, found_objects(detections, "colors"))
    assert [(place, detection.score) for place, detection in asked] == [(0, 0.8), (0, 0.7)]


def test_no_colour_is_asked_for_where_there_are_too_few_things():
    meta = row("color_attr", thing("car", 2, color="red"), thing("dog", color="blue"))
    found = found_objects([seen("car"), seen("dog")], "color_attr")
    assert [place for place, _ in colour_questions(meta, found)] == [1]
    assert shortcomings(meta, found, {1: ["blue"]}) == ["expected car>=2, found 1"]


def test_all_counted_things_must_have_the_colour_each_its_own():
    meta, cars = row("colors", thing("car", 2, color="red")), [seen("car"), seen("car")]
    assert reasons(meta, cars, {0: ["red", "red"]}) == []
    assert reasons(meta, cars, {0: ["blue", "red"]}) == ["expected red car>=2, found 1 red, 1 blue"]
    meta = row("color_attr", thing("car", color="red"), thing("dog", color="white"))
    pair = [seen("car"), seen("dog")]
    assert reasons(meta, pair, {0: ["red"], 1: ["white"]}) == []
    assert reasons(meta, pair, {0: ["white"], 1: ["red"]}) == [
        "expected red car>=1, found 1 white",
        "expected white dog>=1, found 1 red",
    ]


# ----- position


def square(x: float, y: float, side: float = 10) -> tuple[float, float, float, float]:
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        # target: a square of 10 around (50, 50), so r is the offset less 2
        (square(30, 50), ("left of",)),  # -18/20
        (square(70, 50), ("right of",)),
        (square(50, 30), ("above",)),  # y grows downward
        (square(50, 70), ("below",)),
        (square(70, 70), ("right of", "below")),  # 18/28.28 = 0.64 on both axes
        (square(30, 30), ("left of", "above")),
        (square(70, 60), ("right of",)),  # 18/22.36 = 0.80, 8/22.36 = 0.36
        (square(54, 50), ()),  # 2/4 is 0.5, and not above
        (square(54.1, 50), ("right of",)),  # 2.1/4.1
        (square(53, 53), ()),  # r is 1 on both axes of an offset of 4.24: neither is half of it
        (square(52, 50), ()),  # r is 0
        (square(52.0009, 50), ()),  # r is 0.0009
        (square(50, 50), ()),
    ],
)
def test_relations_are_those_worked_out_by_hand(subject, expected):
    assert relations(subject, square(50, 50)) == expected


def test_sizes_shorten_the_offset_each_along_its_own_axis():
    wide, target = (20.0, 48.0, 60.0, 52.0), (26.0, 40.0, 66.0, 60.0)  # o = (-6, 0), sizes 40 + 40, so r = 0
    assert relations(wide, target) == relations(target, wide) == ()
    tall, target = (38.0, 20.0, 42.0, 60.0), (44.0, 26.0, 48.0, 66.0)  # o = (-6, -6), so r = (-5.2, 0)
    assert relations(tall, target) == ("left of",)


def test_empty_boxes_have_a_place_but_no_relation_to_themselves():
    point = (50.0, 50.0, 50.0, 50.0)
    assert relations(point, point) == ()
    assert relations((40.0, 50.0, 40.0, 50.0), point) == ("left of",)


def place(relation: str = "left of", **target) -> dict:
    return row("position", thing("cup", **target), thing("dog", position=[relation, 0]))


def at(name: str, x: float, y: float, score: float = 0.95) -> Detection:
    return seen(name, score, square(x, y))


TWO_AND_TWO = row("position", thing("cup", 2), thing("dog", 2, position=["left of", 0]))
CUPS = [at("cup", 60, 50), at("cup", 90, 50)]


@pytest.mark.parametrize(
    ("meta", "detected", "found"),
    [
        (place("left of"), [at("cup", 70, 50), at("dog", 30, 50)], ""),
        (place("right of"), [at("cup", 70, 50), at("dog", 30, 50)], "left of"),
        (place("above"), [at("cup", 70, 50), at("dog", 70, 50)], "no relation"),
        (place("left of"), [at("cup", 70, 70), at("dog", 30, 30)], ""),  # two relations that hold are both right
        (place("above"), [at("cup", 70, 70), at("dog", 30, 30)], ""),
        (place("below"), [at("cup", 70, 70), at("dog", 30, 30)], "left of and above"),
        (place(), [at("cup", 50, 50), at("dog", 20, 50, 0.9), at("dog", 80, 50, 0.8)], ""),  # only the best is placed
        (place(), [at("cup", 50, 50), at("dog", 20, 50, 0.8), at("dog", 80, 50, 0.9)], "right of"),
        (TWO_AND_TWO, [*CUPS, at("dog", 10, 50), at("dog", 30, 50)], ""),  # every subject, every target
        (TWO_AND_TWO, [*CUPS, at("dog", 10, 50), at("dog", 75, 50)], "right of"),
    ],
)
def test_a_position_is_the_subjects_and_the_subject_comes_last(meta, detected, found):
    relation = meta["include"][1]["position"][0]
    assert reasons(meta, detected) == ([f"expected dog {relation} target, found {found}"] if found else [])


def test_a_target_that_fails_fails_its_subject():
    colored, pair = place(color="red"), [at("dog", 10, 50), at("cup", 80, 50)]
    assert reasons(place(), pair[:1]) == ["expected cup>=1, found 0", "no target for dog to be left of"]
    assert reasons(colored, pair, {0: ["red"]}) == []
    lacks = ["expected red cup>=1, found 1 blue", "no target for dog to be left of"]
    assert reasons(colored, pair, {0: ["blue"]}) == lacks


# ----- the headline number


def bare(**more) -> GenEval:
    """GenEval over detectors that see nothing, or what is given."""
    parts = {"detect": lambda images: [[] for _ in images], "colours": lambda questions: []}
    return GenEval(**{**parts, "title": "GenEval by nobody", "settings": {}, **more})


@pytest.mark.parametrize(
    "line",
    [
        "SD1.5 0.97 0.38 0.35 0.76 0.04 0.06 0.43",
        "FLUX.1-dev 0.98 0.81 0.74 0.79 0.22 0.45 0.66",
        "FLUX+RePrompt 0.98 0.87 0.77 0.85 0.62 0.49 0.76",
        "PromptRL 1.00 0.99 0.99 0.96 0.99 0.90 0.97",
    ],
)
def test_the_unweighted_mean_of_the_tags_that_are_there_is_the_published_number(line):
    *means, published = map(float, line.split()[1:])
    bench = bare()
    overall = bench.overall(dict(zip(bench.categories, means, strict=True)))
    assert abs(overall - published) < 0.01  # both sides are rounded to two digits
    assert bench.overall({"position": 0.2, "colors": 0.6}) == pytest.approx(0.4)


# ----- rows

GOOD = [
    row("single_object", thing("bench"), prompt="a photo of a bench"),
    {**number_of("clock", 2), "prompt": "a photo of two clocks"},
    row("position", thing("cup"), thing("dog", position=["left of", 0]), prompt="a photo of a dog left of a cup"),
    row("colors", thing("tv remote", color="pink"), prompt="a photo of a pink tv remote"),
]


def write(path: Path, *rows) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows) + "\n", "utf-8")
    return path


def test_rows_become_items_named_by_their_number(tmp_path):
    items = bare().load(write(tmp_path / "metadata.jsonl", *GOOD[:2], "", *GOOD[2:], GOOD[1]))
    assert [item.id for item in items] == ["00000", "00001", "00002", "00003"]
    assert [item.category for item in items] == ["single_object", "counting", "position", "colors"]
    assert [item.meta for item in items] == GOOD
    assert items[1].prompt == Prompt("a photo of two clocks", "counting", ("clock",), counts=(("clock", 2),))
    assert items[2].prompt.spatial == ("dog", "left of", "cup")


BAD = [  # a row, and what its message must name
    ([1], "list"),
    ({"tag": "two_object", "include": [thing("dog")]}, "prompt"),
    (row("shape", thing("dog")), "'shape'"),
    (row("two_object", thing("dog", 0)), "count is 0"),
    (row("colors", thing("dog", color="grey")), "'grey'"),
    (row("colors", thing("dog")), "color"),
    (row("colors", thing("dog", colour="red")), "'colour'"),
    (row("position", thing("dog", position=["left of", 0])), "'left of' of 0"),
    (row("position", thing("cup"), thing("dog")), "position"),
    (row("counting", thing("dog", 2)), "exclude"),
    (row("counting", thing("dog", 2), exclude=[thing("doge", 3)]), "'doge'"),
]


@pytest.mark.parametrize("bad, named", BAD)
def test_a_row_that_would_be_judged_by_less_than_its_tag_is_refused_with_its_line(tmp_path, bad, named):
    with pytest.raises(UserError, match=f"line 3: .*{re.escape(named)}"):
        bare().load(write(tmp_path / "metadata.jsonl", GOOD[0], GOOD[0], bad, GOOD[1]))


# ----- the benchmark over any detector


def item(meta: dict, number: int = 0) -> Item:
    return Item(f"{number:05d}", Prompt(meta["prompt"]), meta["tag"], meta)


def plain(color: str, size=(64, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


class Readers:
    """A detector that sees one car all over each picture, and a namer that reads its pixels; both keep their calls."""

    def __init__(self):
        self.detected, self.asked = [], []

    def detect(self, images):
        self.detected.append(list(images))
        return [[seen("car", 0.5, (0.0, 0.0, float(image.width), float(image.height)))] for image in images]

    def colours(self, questions):
        self.asked.append([detection.name for _, detection in questions])
        palette = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        return [palette[image.getpixel((0, 0))] for image, _ in questions]


RED_CAR = row("colors", thing("car", color="red"))


def test_pictures_are_judged_in_order_and_together():
    readers = Readers()
    bench = bare(detect=readers.detect, colours=readers.colours)
    items = [item(RED_CAR), item(row("single_object", thing("dog"))), item(RED_CAR)]
    verdicts = bench.judge(items, [plain("red"), plain("red"), plain("blue")])
    assert [verdict.parts for verdict in verdicts] == [{"colors": [1.0]}, {"single_object": [0.0]}, {"colors": [0.0]}]
    assert [len(images) for images in readers.detected] == [3]
    assert readers.asked == [["car", "car"]]
    assert verdicts[1].detail["reasons"] == ["expected dog>=1, found 0"]
    assert json.loads(json.dumps(verdicts[2].detail)) == {
        "found": {"car": [[0.0, 0.0, 64.0, 48.0, 0.5]]},
        "colours": [{"include": 0, "seen": ["blue"]}],
        "reasons": ["expected red car>=1, found 1 blue"],
    }


def test_what_could_not_be_judged_is_none_with_a_reason():
    blind = bare(detect=lambda images: [None for _ in images])
    verdict = blind.judge([item(RED_CAR)], [plain("red")])[0]
    assert verdict.parts == {"colors": [None]} and "detector" in verdict.absent[0]
    colourless = bare(detect=Readers().detect, colours=lambda questions: [None for _ in questions])
    verdict = colourless.judge([item(RED_CAR)], [plain("red")])[0]
    assert verdict.parts == {"colors": [None]} and "colour" in verdict.absent[0]


# ----- Mask2Former: what goes in


@pytest.mark.parametrize(
    ("size", "read", "full"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((768, 1024), (800, 1067), (800, 1088)),  # 1066.67
        ((500, 1000), (667, 1333), (672, 1344)),  # the longer side is at its most
    ],
)
def test_pictures_are_brought_to_800_or_1333_and_padded_to_32(size, read, full):
    assert resized(size, 800, 1333) == read
    assert padded(read) == full


def test_the_network_reads_imagenet_units_with_zeros_right_and_below():
    pixels = network_input(plain("#ff8000", (40, 40)), (20, 30))
    assert pixels.shape == (3, 32, 32)
    expected = [(255 - 123.675) / 58.395, (128 - 116.28) / 57.12, (0 - 103.53) / 57.375]
    assert torch.allclose(pixels[:, :20, :30], torch.tensor(expected)[:, None, None].expand(3, 20, 30))
    assert not pixels[:, 20:].any() and not pixels[:, :, 30:].any()


def test_pictures_are_made_smaller_by_the_mean_over_neighbours():
    image = Image.fromarray(np.array([[0, 80, 160, 240]], dtype=np.uint8)).convert("RGB")
    red = network_input(image, (1, 2))[0, 0, :2] * 58.395 + 123.675
    assert red.round().tolist() == [57, 183], "OpenCV's would be 40 and 200, and counts at 0.9 would move"


# ----- Mask2Former: what comes out


def line(values: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation of a row between pixel centres, in a loop."""
    out = []
    for place_ in range(size):
        x = min(max((place_ + 0.5) * len(values) / size - 0.5, 0), len(values) - 1)
        low = min(int(x), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        out.append(values[low] * (1 - (x - low)) + values[high] * (x - low))
    return np.array(out)


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    wide = np.array([line(one, size[1]) for one in values])
    return np.array([line(one, size[0]) for one in wide.T]).T


def slow_mask(logits, input_size, picture_size):
    """(mean sigmoid, box, pixels) of one mask."""
    full = tuple(-(-side // 32) * 32 for side in input_size)
    logits = bilinear(bilinear(logits, full)[: input_size[0], : input_size[1]], picture_size)
    inside = [(y, x) for y in range(picture_size[0]) for x in range(picture_size[1]) if logits[y, x] > 0]
    if not inside:
        return 0.0, (0, 0, 0, 0), 0
    ys, xs = [y for y, _ in inside], [x for _, x in inside]
    quality = np.mean([1 / (1 + np.exp(-logits[y, x])) for y, x in inside])
    return quality, (min(xs), min(ys), max(xs) + 1, max(ys) + 1), len(inside)


def slow(class_logits, mask_logits, input_size, picture_size, threshold):
    """Post-processing again: NumPy in float64, one pair and one row of pixels at a time."""
    exps = np.exp(class_logits - class_logits.max(axis=1, keepdims=True))
    probabilities = (exps / exps.sum(axis=1, keepdims=True))[:, :-1]
    pairs = [(p, q, c) for q, some in enumerate(probabilities) for c, p in enumerate(some)]
    shapes = [slow_mask(one, input_size, picture_size) for one in mask_logits]
    found = []
    for probability, query, number in sorted(pairs, key=lambda pair: -pair[0])[:100]:
        quality, box, area = shapes[query]
        if probability * quality > threshold:
            found.append((number, probability * quality, box, area))
    return sorted(found, key=lambda one: -one[1])


@pytest.mark.parametrize("threshold", [0.0, 0.02])
def test_post_processing_agrees_with_a_slow_reference(threshold):
    rng = np.random.default_rng(0)
    class_logits, mask_logits = rng.normal(0, 3, (9, 81)), rng.normal(-1, 2, (9, 8, 16))
    sizes = ((25, 51), (20, 44))  # the input was padded to 32 x 64, the picture is smaller than it
    expected = slow(class_logits, mask_logits, *sizes, threshold)
    ours = detections_of(torch.tensor(class_logits).float(), torch.tensor(mask_logits).float(), *sizes, threshold)
    assert len(ours) == len(expected) > 5 and (threshold or len(ours) == 100)
    for one, (number, score, box, area) in zip(ours, expected, strict=True):
        assert (one.name, one.box, int(one.mask.sum())) == (CLASS_NAMES[number], box, area)
        assert one.score == pytest.approx(score, abs=1e-5)


def confident(*classes: int) -> torch.Tensor:
    """(1, 81) class logits of a query that is evenly sure of `classes`."""
    logits = torch.full((1, 81), -20.0)
    logits[0, list(classes)] = 20.0
    return logits


def test_a_score_on_the_detectors_threshold_is_no_detection():
    logits = torch.full((1, 8, 8), 50.0)  # sigmoid 1: the score is the class probability
    assert not detections_of(confident(5, 7), logits, (32, 32), (8, 8), 0.5)
    assert len(detections_of(confident(5, 7), logits, (32, 32), (8, 8), 0.499)) == 2


def test_an_empty_mask_is_no_detection_and_a_kept_one_does_not_keep_the_others_in_memory():
    logits = torch.full((2, 81), -20.0)
    logits[0, 5] = logits[1, 7] = 20.0
    masks = torch.stack([torch.full((8, 8), 4.0), torch.full((8, 8), -4.0)])
    (one,) = detections_of(logits, masks, (32, 32), (8, 8), 0.3)
    assert one.mask.base is None and one.mask.flags.owndata
    assert box_of(np.zeros((4, 5), bool)) == (0.0, 0.0, 0.0, 0.0)


# ----- Mask2Former: the network


def write_mask2former(folder: Path, classes: int = 80) -> Path:
    """A random Mask2Former over a tiny Swin as transformers saves it, loud enough that it is sure of some classes."""
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=3, num_attention_heads=2, dim_feedforward=16, num_queries=20,
        num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory) -> Path:
    return write_mask2former(tmp_path_factory.mktemp("mask2former"))


SMALL = {"device": "cpu", "short_side": 64, "long_side": 107, "threshold": 0.05}


def same(one: list[Detection], other: list[Detection]) -> bool:
    """Equal to 1e-5 in scores; masks may differ in pixels whose logit is within rounding of 0."""
    return len(one) == len(other) and all(
        a.name == b.name
        and abs(a.score - b.score) < 1e-5
        and np.allclose(a.box, b.box, atol=1)
        and (a.mask ^ b.mask).mean() < 1e-3
        for a, b in zip(one, other, strict=True)
    )


def test_batched_pictures_of_any_sizes_are_seen_as_alone(detector_folder):
    sizes = [(64, 64), (96, 96), (64, 64), (50, 80), (64, 64), (80, 50), (48, 48)]
    pictures = [picture(seed, *size) for seed, size in enumerate(sizes)]
    batched, single = Mask2Former(detector_folder, **SMALL), Mask2Former(detector_folder, **SMALL, batch_size=1)
    together = batched(pictures)
    for found, image in zip(together, pictures, strict=True):
        assert found and found[0].mask.shape == image.size[::-1]
        assert same(found, single([image])[0])
    assert batched([]) == []


def test_tf32_is_off_inside_the_network_and_as_before_after_it(detector_folder, monkeypatch):
    detector, inside = Mask2Former(detector_folder, **SMALL), []
    detector.model.register_forward_pre_hook(lambda *_: inside.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    detector([picture(0)])
    assert inside == [False] and torch.backends.cudnn.allow_tf32


def test_output_that_is_not_finite_is_no_answer(detector_folder, clip_folder):
    detector, colours = Mask2Former(detector_folder, **SMALL), ClipColours(clip_folder, device="cpu")
    with torch.no_grad():
        detector.model.class_predictor.bias[3] = colours.model.visual_projection.weight[0, 0] = torch.nan
    assert detector([picture(0), picture(1)]) == colours(questions(2)) == [None, None]


def test_a_detector_of_other_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="COCO"):
        Mask2Former(write_mask2former(tmp_path, 133), **SMALL)


# ----- CLIP: the colour of a thing

WORDS = sorted({*" ".join([*COLORS, *CLASS_NAMES, "a photo of object - colored"]).split()})


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), WORDS)


def test_a_crop_is_the_thing_on_grey():
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:15] = True
    mask[10, 5] = False
    crop = crop_of(plain("red"), seen("car", box=(5.0, 10.0, 15.0, 20.0), mask=mask))
    assert crop.size == (10, 10)
    assert crop.getpixel((0, 0)) == (0x99, 0x99, 0x99) and crop.getpixel((1, 0)) == (255, 0, 0)
    wider = crop_of(plain("red"), seen("car", box=(4.0, 10.0, 15.0, 20.0), mask=mask))
    assert wider.getpixel((0, 5)) == (0x99, 0x99, 0x99) and wider.getpixel((1, 5)) == (255, 0, 0)


def test_an_empty_box_has_no_colour(clip_folder):
    boxes = [(5.0, 5.0, 5.0, 9.0), (0.0, 0.0, 0.0, 0.0), (4.6, 5.0, 5.4, 9.0), (9.0, 5.0, 5.0, 9.0)]
    answers = ClipColours(clip_folder, device="cpu")([(plain("red"), seen("car", box=box)) for box in boxes])
    assert answers == [None] * 4


def questions(number: int) -> list:
    names = ["car", "wine glass", "dog"]
    masks = [np.asarray(picture(100 + i).convert("L")) > 60 for i in range(number)]
    return [
        (picture(i), seen(names[i % 3], box=(3.0, 5.0, 40.0 + i % 20, 64.0), mask=mask))
        for i, mask in enumerate(masks)
    ]


def test_colours_batched_are_as_one_by_one(clip_folder):
    asked = questions(12)
    together, alone = ClipColours(clip_folder, device="cpu"), ClipColours(clip_folder, device="cpu", batch_size=1)
    answers = together(asked)
    assert answers == [answer for question in asked for answer in alone([question])]
    assert len(set(answers)) > 1
    assert together([]) == []


@torch.inference_mode()
def test_features_are_those_of_open_clips_transform_and_of_one_text_at_a_time(clip_folder):
    """The original reads the same weights through open_clip."""
    colours, model = ClipColours(clip_folder, device="cpu"), CLIPModel.from_pretrained(clip_folder).eval()
    transform = open_clip.image_transform(48, is_train=False, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)
    crops = [picture(seed, *size) for seed, size in enumerate([(64, 64), (33, 90), (90, 33), (7, 40)])]
    theirs = model.get_image_features(torch.stack([transform(crop) for crop in crops])).pooler_output
    assert torch.allclose(colours.encode_images(crops), F.normalize(theirs, dim=-1), atol=1e-5)
    for row_, color in enumerate(COLORS):
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        ids = [torch.tensor([colours.tokenizer(text).input_ids]) for text in texts]
        units = torch.cat([F.normalize(model.get_text_features(one).pooler_output, dim=-1) for one in ids])
        mean = units.mean(dim=0)
        assert torch.allclose(colours.classifier("dog")[row_], mean / mean.norm(), atol=1e-5)


# ----- all of it


def test_the_benchmark_of_the_command_line_judges_by_its_two_models_in_batches(detector_folder, clip_folder):
    options = BenchmarkOptions(detector_path=str(detector_folder), clip_path=str(clip_folder))
    bench = BENCHMARKS["geneval"](options, RewardOptions(), "cpu")
    bench.detect.short_side, bench.detect.long_side = SMALL["short_side"], SMALL["long_side"]
    images, looks, crops = [picture(seed) for seed in range(16)], [], []
    names = [found[0].name for found in bench.detect(images)]
    items = [item(row("colors", thing(name, color=COLORS[n % 10])), n) for n, name in enumerate(names)]
    bench.detect.model.register_forward_hook(lambda *_: looks.append(1))
    bench.colours.model.vision_model.register_forward_hook(lambda *_: crops.append(1))
    verdicts = bench.judge(items, images)
    assert (len(looks), len(crops)) == (2, 1), "8 pictures and 64 crops at a time"
    for verdict, asked in zip(verdicts, items, strict=True):
        (colour,) = verdict.detail["colours"][0]["seen"]
        assert verdict.parts == {"colors": [float(colour == asked.meta["include"][0]["color"])]}
    assert bench.title == "GenEval-HF" and json.dumps(bench.settings)
