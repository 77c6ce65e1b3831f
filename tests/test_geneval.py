"""Claims about GenEval: its rules by hand, its rows, and its models as tiny random ones of the real classes."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from errors import UserError
from evaluation import clip_colours, mask2former
from evaluation.benchmark import Item
from evaluation.clip_colours import ClipColours, crop_of
from evaluation.geneval import (
    CLASS_NAMES,
    COLORS,
    Detection,
    GenEval,
    Rules,
    colour_questions,
    found_objects,
    relations,
    shortcomings,
)
from evaluation.mask2former import Mask2Former, box_of, detections_of, network_input, padded, resized
from interfaces import Prompt

BOX = (10.0, 10.0, 30.0, 30.0)


def seen(name: str, score: float = 0.95, box=BOX, mask=None) -> Detection:
    return Detection(CLASS_NAMES.index(name), score, box, mask)


def thing(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def row(tag: str, *include: dict, exclude=(), prompt: str = "a prompt") -> dict:
    return {"tag": tag, "include": list(include), **({"exclude": list(exclude)} if exclude else {}), "prompt": prompt}


def number_of(name: str, count: int) -> dict:
    return row("counting", thing(name, count), exclude=[thing(name, count + 1)])


def reasons(meta: dict, detections: list[Detection], colours: dict[int, list[str]] | None = None) -> list[str]:
    return shortcomings(meta, found_objects(detections, meta["tag"]), colours or {})


# ----- presence, number, exclusion


def test_a_single_object_is_right_if_it_is_found_whatever_else_is():
    meta = row("single_object", thing("dog"))
    assert reasons(meta, [seen("dog")]) == []
    assert reasons(meta, [seen("dog"), seen("dog"), seen("cat")]) == []
    assert reasons(meta, [seen("cat")]) == ["expected dog>=1, found 0"]
    assert reasons(meta, []) == ["expected dog>=1, found 0"]


def test_two_objects_are_right_only_together_and_each_missing_one_is_named():
    meta = row("two_object", thing("dog"), thing("wine glass"))
    assert reasons(meta, [seen("wine glass"), seen("dog")]) == []
    assert reasons(meta, [seen("dog"), seen("dog")]) == ["expected wine glass>=1, found 0"]
    assert reasons(meta, []) == ["expected dog>=1, found 0", "expected wine glass>=1, found 0"]


@pytest.mark.parametrize(("number", "lacks"), [(2, "expected dog>=3, found 2"), (4, "expected dog<4, found 4")])
def test_counting_wants_the_exact_number(number, lacks):
    assert reasons(number_of("dog", 3), [seen("dog")] * 3) == []
    assert reasons(number_of("dog", 3), [seen("dog")] * number) == [lacks]
    assert reasons(number_of("dog", 3), [seen("dog")] * 3 + [seen("cat")] * 5) == []


def test_exclusion_alone_makes_a_picture_wrong_at_its_count_and_not_below():
    meta = row("two_object", thing("dog"), exclude=[thing("cat", 2)])
    assert reasons(meta, [seen("dog"), seen("cat")]) == []
    assert reasons(meta, [seen("dog"), seen("cat"), seen("cat")]) == ["expected cat<2, found 2"]


@pytest.mark.parametrize(("tag", "edge"), [("single_object", 0.3), ("position", 0.3), ("counting", 0.9)])
def test_a_score_on_the_threshold_does_not_count_and_the_next_number_does(tag, edge):
    assert found_objects([seen("dog", edge)], tag) == {}
    above = seen("dog", float(np.nextafter(edge, 1)))
    assert found_objects([above], tag) == {"dog": [above]}


def test_counting_overlooks_what_the_other_tags_see():
    detections = [seen("dog", 0.95), seen("dog", 0.9), seen("dog", 0.5)]
    assert reasons(number_of("dog", 1), detections) == []
    assert len(found_objects(detections, "colors")["dog"]) == 3


def test_two_detections_of_one_thing_are_two_because_nothing_is_suppressed():
    assert reasons(number_of("dog", 2), [seen("dog", 0.99), seen("dog", 0.99)]) == []
    assert reasons(number_of("dog", 1), [seen("dog", 0.99), seen("dog", 0.99)]) == ["expected dog<2, found 2"]


def test_of_more_than_sixteen_of_a_class_the_best_sixteen_are_kept_and_ties_keep_their_order():
    detections = [seen("dog", 0.5 + place / 100) for place in range(20)] + [seen("cat", 0.4)]
    found = found_objects(detections, "colors")
    assert [one.score for one in found["dog"]] == [0.5 + place / 100 for place in range(19, 3, -1)]
    assert len(found["cat"]) == 1
    ties = [seen("dog", 0.5, (float(place), 0.0, 9.0, 9.0)) for place in range(3)]
    assert found_objects(ties, "colors")["dog"] == ties
    assert reasons(row("single_object", thing("dog", 17)), [seen("dog")] * 20) == ["expected dog>=17, found 16"]


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


def test_all_counted_things_must_have_the_colour():
    meta, cars = row("colors", thing("car", 2, color="red")), [seen("car"), seen("car")]
    assert reasons(meta, cars, {0: ["red", "red"]}) == []
    assert reasons(meta, cars, {0: ["blue", "red"]}) == ["expected red car>=2, found 1 red, 1 blue"]


def test_attribution_wants_each_colour_on_its_own_thing():
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
        (square(46, 50), ()),
        (square(50, 54), ()),
        (square(53, 53), ()),  # r is 1 on both axes of an offset of 4.24: neither is half of it
        (square(52, 50), ()),  # r is 0
        (square(52.0009, 50), ()),  # r is 0.0009
        (square(50, 50), ()),
    ],
)
def test_relations_are_those_worked_out_by_hand(subject, expected):
    assert relations(subject, square(50, 50)) == expected


def test_sizes_shorten_the_offset_each_along_its_own_axis():
    wide, target = (20.0, 48.0, 60.0, 52.0), (60.0, 40.0, 100.0, 60.0)  # o = (-40, 0), sizes 40 + 40, so r = -32
    assert relations(wide, target) == ("left of",)
    assert relations(wide, target, position_threshold=0.5) == ()  # r = 0
    assert relations(target, wide) == ("right of",)


def test_empty_boxes_have_a_place_but_no_relation_to_themselves():
    point = (50.0, 50.0, 50.0, 50.0)
    assert relations(point, point) == ()
    assert relations((40.0, 50.0, 40.0, 50.0), point) == ("left of",)
    # 1/1024 is below 0.001, 2/1024 is above: then r is the whole offset
    assert relations((50 + 2**-10, 50.0, 50 + 2**-10, 50.0), point) == ()
    assert relations((50 + 2**-9, 50.0, 50 + 2**-9, 50.0), point) == ("right of",)


def place(relation: str = "left of", **target) -> dict:
    return row("position", thing("cup", **target), thing("dog", position=[relation, 0]))


def test_a_position_is_the_subjects_and_the_subject_comes_last():
    cup, dog = seen("cup", box=square(70, 50)), seen("dog", box=square(30, 50))
    assert reasons(place("left of"), [cup, dog]) == []
    assert reasons(place("right of"), [cup, dog]) == ["expected dog right of target, found left of"]
    near = seen("dog", box=square(70, 50))
    assert reasons(place("above"), [cup, near]) == ["expected dog above target, found no relation"]


def test_two_relations_that_hold_together_are_both_right():
    cup, dog = seen("cup", box=square(70, 70)), seen("dog", box=square(30, 30))
    assert reasons(place("left of"), [cup, dog]) == reasons(place("above"), [cup, dog]) == []
    assert reasons(place("below"), [cup, dog]) == ["expected dog below target, found left of and above"]


def test_only_the_best_detections_are_placed():
    cup = seen("cup", box=square(50, 50))
    left, right = square(20, 50), square(80, 50)
    assert reasons(place(), [cup, seen("dog", 0.9, left), seen("dog", 0.8, right)]) == []
    assert reasons(place(), [cup, seen("dog", 0.8, left), seen("dog", 0.9, right)]) != []


def test_every_subject_is_held_against_every_target():
    meta = row("position", thing("cup", 2), thing("dog", 2, position=["left of", 0]))
    cups = [seen("cup", box=square(60, 50)), seen("cup", box=square(90, 50))]
    assert reasons(meta, [*cups, seen("dog", box=square(10, 50)), seen("dog", box=square(30, 50))]) == []
    between = [seen("dog", box=square(10, 50)), seen("dog", box=square(75, 50))]
    assert reasons(meta, cups + between) == ["expected dog left of target, found right of"]


def test_a_target_that_fails_fails_its_subject():
    dog = seen("dog", box=square(10, 50))
    assert reasons(place(), [dog]) == ["expected cup>=1, found 0", "no target for dog to be left of"]
    colored, pair = place(color="red"), [dog, seen("cup", box=square(80, 50))]
    assert reasons(colored, pair, {0: ["red"]}) == []
    assert reasons(colored, pair, {0: ["blue"]}) == [
        "expected red cup>=1, found 1 blue",
        "no target for dog to be left of",
    ]


# ----- the headline number


def bare(**more) -> GenEval:
    """GenEval over detectors that see nothing, or what is given."""
    parts = {"detect": lambda images: [[] for _ in images], "colours": lambda questions: []}
    return GenEval(**{**parts, "title": "GenEval by nobody", "settings": {}, **more})


PUBLISHED_ROWS = """
    SD1.5 0.97 0.38 0.35 0.76 0.04 0.06 0.43 | SDXL 0.98 0.74 0.39 0.85 0.15 0.23 0.55
    SD3-Medium 0.98 0.74 0.63 0.67 0.34 0.36 0.62 | SD3.5-Large 0.98 0.89 0.73 0.83 0.34 0.47 0.71
    FLUX.1-dev 0.98 0.81 0.74 0.79 0.22 0.45 0.66 | Qwen-Image 0.99 0.92 0.89 0.88 0.76 0.77 0.87
    FlowGRPO 1.00 0.99 0.91 0.89 0.95 0.80 0.92 | PromptRL 1.00 0.99 0.99 0.96 0.99 0.90 0.97
    FLUX 0.99 0.79 0.75 0.78 0.18 0.45 0.66 | FLUX+GPT-4 0.99 0.79 0.68 0.84 0.51 0.52 0.72
    FLUX+R1 1.00 0.81 0.56 0.78 0.47 0.43 0.67 | FLUX+RePrompt 0.98 0.87 0.77 0.85 0.62 0.49 0.76
    SD3 1.00 0.85 0.62 0.88 0.22 0.58 0.69 | SD3+RePrompt 0.99 0.86 0.60 0.86 0.59 0.60 0.75
    PixArt 0.99 0.60 0.47 0.81 0.10 0.26 0.54 | PixArt+RePrompt 0.98 0.64 0.56 0.81 0.40 0.35 0.62
"""


@pytest.mark.parametrize(
    "line", [line.strip() for line in PUBLISHED_ROWS.replace("\n", "|").split("|") if line.strip()]
)
def test_the_unweighted_mean_of_tags_is_the_published_number(line):
    *means, published = map(float, line.split()[1:])
    bench = bare()
    overall = bench.overall(dict(zip(bench.categories, means, strict=True)), dict.fromkeys(bench.categories, 320))
    assert abs(overall - published) < 0.01  # both sides are rounded to two digits
    if line.startswith("FLUX.1-dev"):
        assert overall == pytest.approx(0.665)


def test_a_tag_without_pictures_is_not_in_the_headline():
    assert bare().overall({"position": 0.2, "colors": 0.6}, {"position": 400, "colors": 4}) == pytest.approx(0.4)


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
    items = bare().load(write(tmp_path / "metadata.jsonl", *GOOD[:2], "", *GOOD[2:]))
    assert [item.id for item in items] == ["00000", "00001", "00002", "00003"]
    assert [item.category for item in items] == ["single_object", "counting", "position", "colors"]
    assert [item.meta for item in items] == GOOD
    assert items[1].prompt == Prompt("a photo of two clocks", "counting", ("clock",), counts=(("clock", 2),))
    assert items[2].prompt.spatial == ("dog", "left of", "cup")


BAD = [
    ('{"tag": "colors", ', "not JSON"),
    ("[1]", "a list, not an object"),
    ({"tag": "two_object", "include": [thing("dog")]}, "prompt is None"),
    ({"include": [thing("dog")], "prompt": "p3"}, "tag is None"),
    ({"tag": "two_object", "prompt": "p4"}, "include is None"),
    (row("two_object", prompt="p5"), "include is []"),
    ({"tag": "two_object", "include": ["dog"], "prompt": "p6"}, "include is ['dog'], not a list of things"),
    (row("shape", thing("dog"), prompt="p7"), "tag is 'shape', known are single_object"),
    (row("two_object", thing("dog"), thing("mouse"), prompt="p8"), "include[1]: class is 'mouse', did you mean"),
    (row("two_object", {"class": "dog"}, prompt="p9"), "include[0]: count is None"),
    (row("two_object", thing("dog", 0), prompt="p10"), "include[0]: count is 0"),
    (row("two_object", thing("dog", True), prompt="p11"), "include[0]: count is True"),
    (row("colors", thing("dog", color="grey"), prompt="p12"), "include[0]: color is 'grey', known are red"),
    (row("colors", thing("dog"), prompt="p13"), "include[0]: color is missing"),
    (row("colors", thing("dog", colour="red"), prompt="p14"), "include[0]: unknown field 'colour'"),
    (row("position", thing("dog", position=["left of", 0]), prompt="p15"), "include[0]: position is ['left of', 0]"),
    (
        row("position", thing("cup"), thing("dog", position=["near", 0]), prompt="p16"),
        "include[1]: position is ['near', 0]",
    ),
    (row("position", thing("cup"), thing("dog"), prompt="p17"), "position is missing"),
    (row("counting", thing("dog", 2), prompt="p18"), "counting without exclude"),
    (row("counting", thing("dog", 2), exclude=[thing("doge", 3)], prompt="p19"), "exclude[0]: class is 'doge', did"),
    ({**GOOD[0], "prompt": " a photo of a bench"}, "the prompt ' a photo of a bench' of line 1 again"),
]


def test_malformed_rows_are_all_named_with_their_lines_in_one_message(tmp_path):
    path = write(tmp_path / "metadata.jsonl", GOOD[0], *(bad for bad, _ in BAD), GOOD[1])
    with pytest.raises(UserError) as error:
        bare().load(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{path}: line 2: ")
    for number, (_, problem) in enumerate(BAD, 2):
        assert f"line {number}: {problem}" in message
    assert "line 1:" not in message and f"line {len(BAD) + 2}:" not in message


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xfd"])
def test_a_file_without_readable_rows_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "metadata.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: .*; give GenEval's metadata"):
        bare().load(path)


def test_other_class_names_have_other_rows(tmp_path):
    path = write(tmp_path / "metadata.jsonl", row("single_object", thing("circle"), prompt="a circle"))
    assert len(bare(class_names=("circle", "square")).load(path)) == 1
    with pytest.raises(UserError, match="line 1: include.0.: class is 'circle'"):
        bare().load(path)


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
        self.asked.append([name for _, _, name in questions])
        palette = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        return [palette[image.getpixel((0, 0))] for image, _, _ in questions]


RED_CAR = row("colors", thing("car", color="red"))


def test_pictures_are_judged_in_order_and_in_batches():
    readers = Readers()
    bench = bare(detect=readers.detect, colours=readers.colours, batch_size=2)
    items = [item(RED_CAR), item(row("single_object", thing("dog"))), item(RED_CAR)]
    verdicts = bench.judge(items, [plain("red"), plain("red"), plain("blue")])
    assert [verdict.parts for verdict in verdicts] == [{"colors": [1.0]}, {"single_object": [0.0]}, {"colors": [0.0]}]
    assert [len(images) for images in readers.detected] == [2, 1]
    assert readers.asked == [["car"], ["car"]]
    assert verdicts[1].detail["reasons"] == ["expected dog>=1, found 0"]
    assert json.loads(json.dumps(verdicts[2].detail)) == {
        "found": {"car": [[0.0, 0.0, 64.0, 48.0, 0.5]]},
        "colours": [{"include": 0, "seen": ["blue"]}],
        "reasons": ["expected red car>=1, found 1 blue"],
    }


def test_pictures_come_to_the_detector_upright_and_in_rgb():
    readers, exif = Readers(), Image.Exif()
    exif[0x0112] = 6  # lies on its side
    lying = plain("red")
    lying.info["exif"] = exif.tobytes()
    bench = bare(detect=readers.detect, colours=readers.colours)
    bench.judge([item(RED_CAR)] * 2, [lying, Image.new("RGBA", (64, 48), "red")])
    assert [(image.mode, image.size) for image in readers.detected[0]] == [("RGB", (48, 64)), ("RGB", (64, 48))]


def test_what_could_not_be_judged_is_none_with_a_reason():
    blind = bare(detect=lambda images: [None for _ in images])
    verdict = blind.judge([item(RED_CAR)], [plain("red")])[0]
    assert verdict.parts == {"colors": [None]} and "detector" in verdict.detail["reasons"][0]
    colourless = bare(detect=Readers().detect, colours=lambda questions: [None for _ in questions])
    verdict = colourless.judge([item(RED_CAR)], [plain("red")])[0]
    assert verdict.parts == {"colors": [None]} and "colour" in verdict.detail["reasons"][0]


def test_no_pictures_no_verdicts_and_a_picture_too_few_is_an_error():
    assert bare().judge([], []) == []
    with pytest.raises(ValueError):
        bare().judge([item(RED_CAR)], [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        bare(batch_size=0)


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


def levels(values: list[int], width: int) -> list[int]:
    """One row of grey levels resized to `width`, read back from the network's input."""
    image = Image.fromarray(np.array([values], dtype=np.uint8)).convert("RGB")
    red = network_input(image, (1, width))[0, 0, :width]
    return (red * 58.395 + 123.675).round().int().tolist()


def test_resizing_is_pillows_bilinear_to_the_level():
    """A golden test: should another version of Pillow resize otherwise, counts at 0.9 would move."""
    assert levels([0, 100], 4) == [0, 25, 75, 100]
    assert levels([0, 80, 160, 240], 2) == [57, 183]  # averaged over neighbours; OpenCV's would be [40, 200]


def test_enlarged_pictures_are_as_without_antialiasing_but_for_one_level():
    """So where pictures of 512 are read at 800, this is what OpenCV gives mmdet."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ours = network_input(Image.fromarray(noise), (100, 100))[:, :100, :100]
    ours = ours * torch.tensor(mask2former.STD)[:, None, None] + torch.tensor(mask2former.MEAN)[:, None, None]
    plainly = F.interpolate(torch.tensor(noise).permute(2, 0, 1)[None].float(), (100, 100), mode="bilinear")[0]
    assert (ours - plainly).abs().max() <= 1.01


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
        assert (one.class_number, one.box, int(one.mask.sum())) == (number, box, area)
        assert one.score == pytest.approx(score, abs=1e-5)


def confident(*classes: int) -> torch.Tensor:
    """(1, 81) class logits of a query that is evenly sure of `classes`."""
    logits = torch.full((1, 81), -20.0)
    logits[0, list(classes)] = 20.0
    return logits


def test_a_mask_is_cut_at_logit_0_and_its_box_is_tight():
    masks = torch.full((1, 8, 8), -4.0)
    masks[0, 2:4, 1:7] = 4.0
    (one,) = detections_of(confident(16), masks, (32, 32), (8, 8), 0.1)
    rows, columns = np.flatnonzero(one.mask.any(1)), np.flatnonzero(one.mask.any(0))
    assert one.class_number == 16 and one.mask.shape == (8, 8)
    assert one.box == (1.0, 2.0, 7.0, 4.0) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert not detections_of(confident(16), torch.zeros(1, 8, 8), (32, 32), (8, 8), 0.1)  # logit 0 is outside


def test_the_score_is_class_probability_times_the_masks_mean_sigmoid():
    (one,) = detections_of(confident(5), torch.full((1, 8, 8), 2.0), (32, 32), (10, 20), 0.1)
    assert one.score == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    first, second = detections_of(confident(5, 7), torch.full((1, 8, 8), 2.0), (32, 32), (10, 20), 0.1)
    assert {first.class_number, second.class_number} == {5, 7}  # one query, two classes, one mask
    assert first.score == second.score == pytest.approx(0.5 / (1 + np.exp(-2)), abs=1e-6)
    assert first.box == (0.0, 0.0, 20.0, 10.0)


def test_a_score_on_the_detectors_threshold_is_no_detection():
    logits = torch.full((1, 8, 8), 50.0)  # sigmoid 1: the score is the class probability
    assert not detections_of(confident(5, 7), logits, (32, 32), (8, 8), 0.5)
    assert len(detections_of(confident(5, 7), logits, (32, 32), (8, 8), 0.499)) == 2


def test_padding_is_cut_off_before_a_mask_is_enlarged():
    masks = torch.full((1, 8, 8), -4.0)
    masks[0, :, 4:] = 4.0  # only in the padding of an input that is 12 of 32 pixels wide
    assert not detections_of(confident(16), masks, (32, 12), (64, 24), 0.1)


def test_a_kept_mask_does_not_keep_the_others_in_memory():
    logits = torch.full((2, 81), -20.0)
    logits[0, 5] = logits[1, 7] = 20.0
    masks = torch.stack([torch.full((8, 8), 4.0), torch.full((8, 8), -4.0)])  # the second is empty and goes
    (one,) = detections_of(logits, masks, (32, 32), (8, 8), 0.3)
    assert one.mask.base is None and one.mask.flags.owndata


def test_an_empty_mask_has_an_empty_box():
    assert box_of(np.zeros((4, 5), bool)) == (0.0, 0.0, 0.0, 0.0)


# ----- Mask2Former: the network

NAMES = dict(enumerate([*CLASS_NAMES[:64], "mouse", "remote", "keyboard", *CLASS_NAMES[67:]]))  # as COCO calls them


def write_mask2former(folder: Path, id2label: dict[int, str] = NAMES) -> Path:
    """A random Mask2Former over a tiny Swin as transformers saves it, loud enough that it is sure of some classes."""
    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=20,
        id2label=id2label,
        label2id={name: number for number, name in id2label.items()},
    )
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


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def same(one: list[Detection], other: list[Detection]) -> bool:
    """Equal to 1e-5 in scores; masks may differ in pixels whose logit is within rounding of 0."""
    return len(one) == len(other) and all(
        a.class_number == b.class_number
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


def test_the_network_is_what_transformers_makes_of_the_same_input(detector_folder):
    image = picture(1, 24, 20)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    with torch.inference_mode():
        output = model(pixel_values=network_input(image, (64, 77))[None])
    expected = slow(
        output.class_queries_logits[0].double().numpy(),
        output.masks_queries_logits[0].double().numpy(),
        (64, 77),
        (20, 24),
        SMALL["threshold"],
    )
    found = Mask2Former(detector_folder, **SMALL)([image])[0]
    assert len(found) == len(expected) > 0
    for one, (number, score, _, _) in zip(found, expected, strict=True):
        assert one.class_number == number and one.score == pytest.approx(score, abs=1e-5)


def test_tf32_is_off_inside_the_network_and_as_before_after_it(detector_folder):
    detector, inside = Mask2Former(detector_folder, **SMALL), []
    detector.model.register_forward_pre_hook(
        lambda *_: inside.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        detector([picture(0)])
        assert inside == [("highest", False)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_output_that_is_not_finite_is_no_answer(detector_folder):
    detector = Mask2Former(detector_folder, **SMALL)
    with torch.no_grad():
        detector.model.class_predictor.bias[3] = torch.nan
    assert detector([picture(0), picture(1)]) == [None, None]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: "person", 1: "bicycle"}, "detects 2 classes, GenEval needs COCO's 80"),
        ({**NAMES, 3: NAMES[4], 4: NAMES[3]}, "class 3 of .* is 'airplane', COCO's is 'motorcycle'"),
        ({number: f"LABEL_{number}" for number in NAMES}, "class 0 of .* is 'LABEL_0', COCO's is 'person'"),
    ],
)
def test_a_detector_of_other_classes_is_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        Mask2Former(write_mask2former(tmp_path, names), **SMALL)


def test_other_spellings_of_cocos_classes_are_accepted(tmp_path):
    names = {**NAMES, 3: "motorbike", 4: "aeroplane", 57: "sofa", 58: "pottedplant", 62: "tvmonitor"}
    assert Mask2Former(write_mask2former(tmp_path, names), **SMALL)([picture(0)])[0]


def test_weights_that_are_missing_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(write_mask2former(tmp_path) / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights of a Mask2Former .class_predictor.weight"):
        Mask2Former(tmp_path, **SMALL)


# ----- CLIP: the colour of a thing

WORDS = sorted({*" ".join([*COLORS, *CLASS_NAMES, "a photo of object - colored circle"]).split()})


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """CLIP's kind of tokenizer, <s> text </s>, with whole words, its end the highest id."""
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", *WORDS, "</s>"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    brackets = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=brackets)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_clip(folder: Path, hidden_act: str = "quick_gelu") -> Path:
    end = write_tokenizer(folder).eos_token_id
    size = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": hidden_act,
        "projection_dim": 16,
    }
    config = CLIPConfig(
        text_config={**size, "vocab_size": end + 1, "eos_token_id": end, "bos_token_id": 1, "pad_token_id": end},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(1)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # louder than at birth, so that colours differ
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_a_crop_is_the_thing_on_grey():
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:15] = True
    mask[10, 5] = False
    crop = crop_of(plain("red"), seen("car", box=(5.0, 10.0, 15.0, 20.0), mask=mask))
    assert crop.size == (10, 10)
    assert crop.getpixel((0, 0)) == (0x99, 0x99, 0x99) and crop.getpixel((1, 0)) == (255, 0, 0)
    wider = crop_of(plain("red"), seen("car", box=(4.0, 10.0, 15.0, 20.0), mask=mask))
    assert wider.getpixel((0, 5)) == (0x99, 0x99, 0x99) and wider.getpixel((1, 5)) == (255, 0, 0)


def test_corners_are_rounded_as_pillow_does():
    image = picture(3)
    for box in [(4.4, 4.6, 20.5, 21.5), (0.5, 1.5, 2.5, 3.5)]:
        assert crop_of(image, seen("car", box=box)).tobytes() == image.crop(box).tobytes()


def test_an_empty_box_has_no_colour(clip_folder):
    boxes = [(5.0, 5.0, 5.0, 9.0), (0.0, 0.0, 0.0, 0.0), (4.6, 5.0, 5.4, 9.0), (9.0, 5.0, 5.0, 9.0)]
    answers = ClipColours(clip_folder, device="cpu")([(plain("red"), seen("car", box=box), "car") for box in boxes])
    assert answers == [None] * 4


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="a mask of .5, 5. for a picture of .48, 64."):
        crop_of(plain("red"), seen("car", mask=np.ones((5, 5), bool)))


def questions(number: int) -> list:
    names = ["car", "wine glass", "dog"]
    masks = [np.asarray(picture(100 + i).convert("L")) > 60 for i in range(number)]
    return [
        (picture(i), seen(names[i % 3], box=(3.0, 5.0, 40.0 + i % 20, 64.0), mask=mask), names[i % 3])
        for i, mask in enumerate(masks)
    ]


def test_colours_batched_are_as_one_by_one(clip_folder):
    asked = questions(12)
    together, alone = ClipColours(clip_folder, device="cpu"), ClipColours(clip_folder, device="cpu", batch_size=1)
    answers = together(asked)
    assert answers == [answer for question in asked for answer in alone([question])]
    assert len(set(answers)) > 1
    crops = [crop_of(image, detection) for image, detection, _ in asked]
    assert torch.allclose(
        together.encode_images(crops), torch.cat([alone.encode_images([crop]) for crop in crops]), atol=1e-5
    )
    assert torch.allclose(together.classifier("car"), alone.classifier("car"), atol=1e-5)
    assert together([]) == []


def test_texts_are_read_once_per_class(clip_folder):
    colours, reads = ClipColours(clip_folder, device="cpu"), []
    colours.model.text_model.register_forward_hook(lambda *_: reads.append(1))
    colours(questions(9))
    colours(questions(9))
    assert len(reads) == 3  # classes; their 30 texts fit one batch


def test_features_that_are_not_finite_give_no_colour(clip_folder):
    colours = ClipColours(clip_folder, device="cpu")
    with torch.no_grad():
        colours.model.visual_projection.weight[0, 0] = torch.nan
    assert colours(questions(2)) == [None, None]


def test_a_clip_without_quickgelu_is_refused(tmp_path):
    with pytest.raises(UserError, match="computes with gelu, GenEval's CLIP with quick_gelu"):
        ClipColours(write_clip(tmp_path, "gelu"), device="cpu")


def open_clip_twin(folder: Path) -> open_clip.CLIP:
    """open_clip's own CLIP with the weights of the folder's."""
    theirs = CLIPModel.from_pretrained(folder).state_dict()
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={
            "context_length": 77,
            "vocab_size": theirs["text_model.embeddings.token_embedding.weight"].shape[0],
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
        quick_gelu=True,
    )
    state = {
        "logit_scale": theirs["logit_scale"],
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T,
    }
    modules = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for ours, other in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for layer in range(2):
            block, source = f"{ours}.resblocks.{layer}", f"{other}.encoder.layers.{layer}"
            parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
            parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            modules |= {f"{block}.{part}": f"{source}.{name}" for part, name in parts.items()}
            for kind in ("weight", "bias"):
                pieces = [theirs[f"{source}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(pieces)
    for module, source in modules.items():
        state |= {f"{module}.{kind}": theirs[f"{source}.{kind}"] for kind in ("weight", "bias")}
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys in ([], ["attn_mask"]) and not missing.unexpected_keys
    return model.eval()


@torch.inference_mode()
def test_features_are_those_of_open_clip_with_its_own_transform(clip_folder):
    """The original reads the same weights through open_clip."""
    colours, twin = ClipColours(clip_folder, device="cpu"), open_clip_twin(clip_folder)
    transform = open_clip.image_transform(32, is_train=False, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)
    crops = [picture(seed, *size) for seed, size in enumerate([(64, 64), (33, 90), (90, 33), (7, 40)])]
    theirs = twin.encode_image(torch.stack([transform(crop) for crop in crops]), normalize=True)
    assert torch.allclose(colours.encode_images(crops), theirs, atol=1e-5)
    for row_, color in enumerate(COLORS):
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        ids = torch.zeros(3, 77, dtype=torch.long)
        for place_, text in enumerate(texts):
            tokens = colours.tokenizer(text).input_ids
            ids[place_, : len(tokens)] = torch.tensor(tokens)
        mean = twin.encode_text(ids, normalize=True).mean(dim=0)
        assert torch.allclose(colours.classifier("dog")[row_], mean / mean.norm(), atol=1e-5)


# ----- all of it


def test_checkpoints_that_are_not_there_are_named_with_the_command_that_fetches_them(
    tmp_path, monkeypatch, detector_folder
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"hf download {mask2former.PUBLISHED.repo}"):
        GenEval.from_models(device="cpu")
    with pytest.raises(UserError, match=f"hf download {clip_colours.PUBLISHED.repo}"):
        GenEval.from_models(device="cpu", detector=detector_folder)


def real(detector: Path, clip: Path, **more) -> GenEval:
    """GenEval-HF on the tiny models, which see one to nine things a picture, but none at 0.9."""
    small = {"device": "cpu", "short_side": 64, "long_side": 107, "rules": Rules(counting_threshold=0.35)}
    return GenEval.from_models(detector=detector, clip=clip, **small, **more)


def crowd(bench: GenEval, number: int) -> tuple[list[Item], list[Image.Image]]:
    """Pictures, and prompts of every tag about what the detector sees in the first ones, so that answers vary."""
    images = [picture(seed) for seed in range(number)]
    names = [CLASS_NAMES[found[0].class_number] for found in bench.detect(images)]
    metas = []
    for place_, name in enumerate(names):
        other = names[(place_ + 1) % number]
        metas.append(
            [
                row("single_object", thing(name)),
                row("two_object", thing(name), thing(other)),
                number_of(name, 1 + place_ % 3),
                row("colors", thing(name, color=COLORS[place_ % 10])),
                row("position", thing(name), thing(other, position=["left of", 0])),
                row("color_attr", thing(name, color=COLORS[place_ % 10]), thing(other, color="red")),
            ][place_ % 6]
        )
    return [item(meta, place_) for place_, meta in enumerate(metas)], images


def test_tiny_random_models_run_the_whole_path_in_batches_the_same_as_one_by_one(detector_folder, clip_folder):
    batched, single = (
        real(detector_folder, clip_folder),
        real(detector_folder, clip_folder, batch_size=1, clip_batch_size=1),
    )
    items, images = crowd(batched, 24)
    looks, crops = [], []
    batched.detect.model.register_forward_hook(lambda *_: looks.append(1))
    batched.colours.model.vision_model.register_forward_hook(lambda *_: crops.append(1))
    together = batched.judge(items, images)
    assert (len(looks), len(crops)) == (3, 1), "8 pictures and 64 crops at a time"
    alone = [single.judge([one], [image])[0] for one, image in zip(items, images, strict=True)]
    assert [verdict.parts for verdict in together] == [verdict.parts for verdict in alone]
    assert [verdict.detail["reasons"] for verdict in together] == [verdict.detail["reasons"] for verdict in alone]
    scores = [score for verdict in together for part in verdict.parts.values() for score in part]
    assert {0.0, 1.0} == set(scores)
    assert any(verdict.detail["colours"] for verdict in together)
    assert (
        batched.title == "GenEval-HF"
        and json.loads(json.dumps(batched.settings))["rules"]["counting_threshold"] == 0.35
    )
