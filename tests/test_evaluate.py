"""Claims about evaluation as a whole: rewrite, draw, judge, interval, table; interrupted, shared, and on bad input.

The miniature's own policy, renderer and rewards; its oracle judges. pytest tests/test_evaluate.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from evaluation.benchmark import Item, Verdict
from evaluation.geneval import GenEval
from evaluation.layouts import There
from evaluation.leak import leaks, training_files
from evaluation.pipeline import Evaluation
from evaluation.run import parse_options
from evaluation.statistics import OVERALL, measure
from evaluation.systems import BestOf, Chooser, Fixed, Revise
from evaluation.table import NOTHING, difference, text_table
from inference import Rewrite
from interfaces import Prompt, Reward
from miniature import evaluate as mini
from miniature import world
from miniature.fit import WEIGHTS
from models.hub import contents_of
from models.janus import load_janus
from rendering import load_renderer
from tests.processes import ENVIRONMENT, ROOT, kill_when, launcher, run_forked

POLICY = ["--benchmark", "miniature", "--gpt_path", str(WEIGHTS / "policy")]
ALL = ["--n", "2", "--revise", "1", "--select", "git"]
SMALL = ["--limit", "2", "--unit", "3", "--samples", "2", "--render_batch_size", "6"]


def evaluated(out: Path, processes: int = 1) -> Path:
    """OUT, with an evaluation of raw prompts, rewrites, best of two and one revision."""
    words = ["miniature.evaluate", *POLICY, *SMALL, *ALL, "--out", out]
    if processes == 1:
        done = run_forked("-m", *words)
    else:
        line = launcher(*words, module=True)
        done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def rows(out: Path) -> list[dict]:
    found = [json.loads(line) for path in out.glob("rows_*.jsonl") for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: (row["system"], row["id"], row["sample"]))


def facts(out: Path) -> list[dict]:
    """Rows without what may differ between two runs of the same: the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(out)]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return evaluated(tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.slow
def test_every_system_is_drawn_from_the_same_noise_and_judged_by_the_original_prompt(whole):
    found, asked = rows(whole), {prompt.text: prompt for prompt in world.splits()[1]}
    assert {row["system"] for row in found} == {"raw", "rewrite", "best_of_2", "revise_1"}
    assert len(found) == 4 * 12 * 2
    for row in found:
        same = [other for other in found if (other["id"], other["sample"]) == (row["id"], row["sample"])]
        assert len({other["seed"] for other in same}) == 1 and len({other["prompt"] for other in same}) == 1
        picture = Image.open(whole / row["image"])
        prompt = asked[row["prompt"]]
        assert row["parts"] == {prompt.task: [float(world.holds(prompt, world.see(picture)))]}
        assert re.fullmatch(r"images/\w+/\d{5}_\d\.png", row["image"])
    assert all(row["final_prompt"] == row["prompt"] for row in found if row["system"] == "raw")
    assert {row["pictures"] for row in found if row["system"] == "best_of_2"} == {2}
    assert {row["pictures"] for row in found if row["system"] == "revise_1"} <= {1, 2}


def test_the_table_is_that_of_the_rows_and_says_all_that_it_depends_on(whole):
    found = results(whole)
    for system in ("raw", "rewrite", "best_of_2", "revise_1"):
        for category in found["points"]:
            scores = [s for r in rows(whole) if r["system"] == system for s in r["parts"].get(category, [])]
            assert found["scores"][system][category]["value"] == pytest.approx(np.mean(scores))
        of_tags = [found["scores"][system][category]["value"] for category in found["points"]]
        assert found["scores"][system]["overall"]["value"] == pytest.approx(np.mean(of_tags))
    assert found["scores"]["rewrite"]["overall"]["value"] > found["scores"]["raw"]["overall"]["value"]
    for name in ("seed", "render_steps", "resolution", "samples", "select", "temperature", "benchmark_settings"):
        assert name in found["settings"]
    assert found["leak"] is None and "commit" in found and found["not_judged"]["raw"] == []
    assert found["cost"]["best_of_2"]["pictures"] == 4 and found["cost"]["raw"]["unreadable"] == 0
    shown = (whole / "results.txt").read_text()
    assert "cost per prompt" in shown and "rewrite minus raw" in shown


@pytest.mark.slow
def test_an_evaluation_killed_and_run_again_has_the_same_rows_and_table(whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "miniature.evaluate", *POLICY, *SMALL, *ALL, "--out", str(out)]
    kill_when(lambda: out.exists() and len(list((out / "images").glob("*/*.png"))) >= 9, command)
    with open(next(out.glob("rewrites_0.jsonl")), "a") as file:
        file.write('{"prompt": "a torn li')
    evaluated(out)
    assert facts(out) == facts(whole) and results(out)["scores"] == results(whole)["scores"]


@pytest.mark.slow
def test_two_processes_give_the_rows_and_table_of_one(whole, tmp_path):
    out = evaluated(tmp_path / "out", processes=2)
    assert len(list(out.glob("rows_*.jsonl"))) == 2
    assert facts(out) == facts(whole) and results(out)["scores"] == results(whole)["scores"]
    assert results(out)["differences"] == results(whole)["differences"]


def test_pictures_that_are_there_are_judged_as_the_run_that_drew_them(whole, tmp_path):
    out = tmp_path / "again"
    line = ["--benchmark", "miniature", "--out", str(out), "--limit", "2", "--samples", "2"]
    folders = [str(whole / "images" / name) for name in ("raw", "rewrite")]
    assert mini.run([*line, "--images", *folders]) == 0
    for system in ("raw", "rewrite"):
        assert results(out)["scores"][system] == results(whole)["scores"][system]


def test_the_oracle_and_the_rules_of_geneval_agree_on_its_pictures(whole, tmp_path):
    """They differ where a thing comes twice: GenEval looks at the colour of one, the oracle at both."""
    pictures = rows(whole)
    metadata = mini.prompts(tmp_path / "out")
    judge = mini.MINIATURE["miniature-geneval"](None, None, "cpu")
    items = {item.id: item for item in judge.load(metadata)}
    verdicts = judge.judge([items[r["id"]] for r in pictures], [Image.open(whole / r["image"]) for r in pictures])
    differing = [row for row, verdict in zip(pictures, verdicts, strict=True) if verdict.parts != row["parts"]]
    assert len(differing) <= 0.03 * len(pictures), [row["detail"] for row in differing]


# The parts ---------------------------------------------------------------------------------------------------------


def items(*categories: str) -> list[Item]:
    return [Item(f"{i:05d}", Prompt(f"prompt {i}"), category) for i, category in enumerate(categories)]


def verdicts(of: list[Item], scores: list[list[float | None]]) -> dict[str, list[Verdict]]:
    return {i.id: [Verdict({i.category: [s]}) for s in row] for i, row in zip(of, scores, strict=True)}


def mean(means):
    return sum(means.values()) / len(means)


def test_means_and_overall_are_those_worked_by_hand_without_what_was_not_judged():
    of = items("a", "a", "b", "c")
    scores = {"raw": [[1, 0], [1, 1], [None, 0], [None, None]], "new": [[1, None], [None, 0], [1, 1], [1, 1]]}
    table = measure(of, {n: verdicts(of, some) for n, some in scores.items()}, ["a", "b", "unused", "c"], mean)
    assert table.points == {"a": 4, "b": 1, "c": 0}
    raw, new, differ = table.scores["raw"], table.scores["new"], table.differences["new"]
    assert [raw[name].value for name in raw] == [0.75, 0, 0.375] and raw["b"].n == 1
    assert new["a"].value == 0.5 and new["a"].n == 2
    assert {n: one.value for n, one in differ.items()} == {"a": -0.5, "b": 1, OVERALL: 0.25}, "of what both have"
    shown = text_table("T", table)
    assert "4/2" in shown and "1/2" in shown and "0/2" in shown


def test_intervals_are_those_of_a_table_without_the_prompts_that_were_not_judged():
    of, scores = items(*["a"] * 60), [[float(i % 3 == 0)] for i in range(30)]
    torn = measure(of, {"raw": verdicts(of, scores + [[None]] * 30)}, ["a"], mean)
    assert torn == measure(of[:30], {"raw": verdicts(of[:30], scores)}, ["a"], mean)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(1), 0
    of = items(*["a"] * 60)
    for _ in range(60):
        drawn = rng.random((60, 1)) < 0.4
        found = measure(of, {"raw": verdicts(of, drawn.astype(float).tolist())}, ["a"], mean)
        estimate = found.scores["raw"][OVERALL]
        hits += estimate.low <= 0.4 <= estimate.high
    assert 51 <= hits <= 60  # 57 expected


def test_a_difference_is_paired_so_it_is_seen_where_the_scores_overlap_and_only_there():
    of = items(*["a"] * 40)
    easy = [[float(i % 2)] for i in range(40)]
    better = [[1.0] if i % 10 == 0 else row for i, row in enumerate(easy)]
    systems = {"raw": easy, "new": better, "other": easy[::-1]}
    table = measure(of, {name: verdicts(of, scores) for name, scores in systems.items()}, ["a"], mean)
    assert table.scores["new"]["a"].low < table.scores["raw"]["a"].high, "their own intervals overlap"
    found = table.differences["new"]["a"]
    assert NOTHING not in difference(found)
    assert NOTHING in difference(table.differences["other"]["a"]) and NOTHING in text_table("T", table)


def test_a_leak_is_found_in_other_words_and_in_another_case():
    left_of = Prompt("a photo of a dog left of a cat", "position", ("dog", "cat"), (), ("dog", "left of", "cat"))
    zebra = Prompt("A  Photo of a zebra", "single_object", ("zebra",))
    of = [Item(f"{i:05d}", prompt, "x") for i, prompt in enumerate((left_of, zebra, Prompt("a kiwi")))]
    relation = ("cat", "right of", "dog")
    right_of = Prompt("an image of a cat to the right of a dog", "position", ("cat", "dog"), (), relation)
    found = leaks(of, [right_of, Prompt("a photo of a zebra")])
    assert found.exact == ("00001",) and found.same_request == ("00000",) and found.training_prompts == 2


def test_the_leak_check_reads_what_a_run_was_trained_on(tmp_path):
    (tmp_path / "policy").mkdir()
    data = tmp_path / "data.txt"
    data.write_text(world.splits()[1][0].text + "\n")
    (tmp_path / "policy" / "run.json").write_text(json.dumps({"config": {"data": str(data)}}))
    assert training_files(str(tmp_path / "policy")) == [data]
    assert training_files(str(tmp_path)) == training_files(None) == []


class Shade(Reward):
    """How light the picture is; `unscored` shades have no score."""

    name, range, needs_images, unscored = "shade", (0.0, 1.0), True, ()

    def __call__(self, samples):
        shades = [s.images[0].getpixel((0, 0))[0] for s in samples]
        return [None if shade in self.unscored else shade / 255 for shade in shades]


class Grey:
    """Draws the number in a text; "none" cannot be drawn."""

    max_tokens = 9

    def __init__(self):
        self.drawn = 0

    def __call__(self, texts, seeds):
        self.drawn += len(texts)
        return [None if t == "none" else Image.new("RGB", (1, 1), (int(t),) * 3) for t in texts]

    def count_tokens(self, text):
        return 1


def said(rewrite: str) -> Rewrite:
    return Rewrite("", "", rewrite, True, f"<{rewrite}>", 0, 0)


class Policy:
    """Answers a conversation with the rewrites that `answer(conversation)` gives."""

    reasoning = True

    def __init__(self, answer):
        self.answer, self.conversations = answer, []

    def sample(self, text, conversation, count, temperature):
        turns = [turn["content"] for turn in conversation]
        self.conversations.append(turns)
        return [said(words) for words in self.answer(turns)][:count]


def no_seed(item, sample):
    return 0


def test_best_of_n_keeps_the_picture_that_the_reward_likes_best():
    policy = Policy(lambda turns: ("10", "none", "200", "30"))
    drawn = BestOf(Grey(), policy, Chooser(Shade()), 4, 1.0)(items("a", "a"), [0, 1], no_seed)
    assert [one.text for one in drawn] == ["200"] * 4 and all(one.pictures == 4 for one in drawn)


@pytest.mark.parametrize(
    "unscored, best, revised", [((), "200", "30"), ((10, 200), None, "30"), ((30, 200), "10", "10")]
)
def test_what_the_choosing_reward_could_not_score_is_not_chosen_and_lacks_nothing(unscored, best, revised):
    reward, policy = Shade(), Policy(lambda turns: ("10", "30") if len(turns) == 2 else ("30",))
    reward.unscored = unscored
    several = Policy(lambda turns: ("10", "none", "200"))
    (drawn,) = BestOf(Grey(), several, Chooser(reward), 3, 1.0)(items("a"), [0], no_seed)
    assert (drawn.text if drawn.image else None, drawn.pictures) == (best, 3)
    of = [Item("0", Prompt("a cup", "", ("cup",)), "a")]
    (drawn,) = Revise(Grey(), policy, Chooser(reward), 1, {"0": said("10")}, 1.0)(of, [0], no_seed)
    assert drawn.image and drawn.text == revised
    assert (len(policy.conversations[0]) == 2) == (10 in unscored), (
        "of what is not known nothing is said to be missing"
    )


def test_revising_stops_once_the_picture_is_right_and_keeps_the_best_of_the_way_or_the_first():
    policy, renderer = Policy(lambda turns: [{"<10>": "90", "<90>": "220"}[turns[-2]]]), Grey()
    of = [Item("0", Prompt("a cup", "single_object", ("cup",)), "a"), Item("1", Prompt("a hat", "", ("hat",)), "a")]
    system = Revise(renderer, policy, Chooser(Shade()), 3, {"0": said("10"), "1": said("255")}, 1.0)
    first, second = system(of, [0], no_seed)
    assert (first.text, first.pictures) == ("220", 3) and (second.text, second.pictures) == ("255", 1)
    assert renderer.drawn == 4 and "does not show a cup" in policy.conversations[0][-1]
    system = Revise(Grey(), Policy(lambda turns: ["5"]), Chooser(Shade()), 2, {"00000": said("60")}, 1.0)
    (drawn,) = system(items("a"), [0], no_seed)
    assert (drawn.text, drawn.pictures) == ("60", 3)


class Constant(GenEval):
    def judge(self, of, images):
        self.asked += len(of)
        return [Verdict({"single_object": [1.0]}) for _ in of]


@pytest.mark.parametrize("category", ["single_object", "", "no category of the table"])
def test_a_picture_that_could_not_be_drawn_is_in_no_mean_and_is_drawn_and_judged_on_resume(tmp_path, category):
    of = items(category, category, category)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"a": 1}')
    old = {"system": "raw", "unit": 0, "id": "00001", "sample": 0, "image": None, "final_prompt": "", "detail": {}}
    (tmp_path / "out" / "rows_1.jsonl").write_text(json.dumps(old | {"parts": {category: [None]}}) + "\n")
    texts = {"00000": ("7", True), "00001": ("none", True), "00002": ("8", True)}
    judge, values = Constant(None, None, title="t", settings={}), []
    for text, asked in [("none", 2), ("9", 1), ("10", 0)]:
        judge.asked, texts["00001"] = 0, (text, True)
        run = Evaluation(tmp_path / "out", {"a": 1}, of, 1, 0, 8)
        run.open()
        run.run("raw", Fixed(Grey(), texts, {}), judge)
        table = measure(of, {"raw": run.verdicts("raw")}, judge.categories, judge.overall)
        values.append((table.scores["raw"][OVERALL].value, table.scores["raw"]["single_object"].n))
        assert judge.asked == asked and [row["final_prompt"] for row in run.rows("raw")][::2] == ["7", "8"]
    assert values == [(1, 2), (1, 3), (1, 3)] and run.rows("raw")[1]["final_prompt"] == "9"


DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}


@pytest.mark.parametrize(
    "benchmark, item, names",
    [
        ("geneval", Item("00003", Prompt("x"), "x"), "00003/samples/0000.png 00003/samples/0001.png"),
        ("geneval", Item("00003", Prompt("x"), "x"), "3/samples/0.jpg 3/samples/2.jpg 3/samples/10.jpg"),
        ("geneval", Item("00003", Prompt("x"), "x", DOG), "7/samples/00000.png 7/samples/00001.png"),
        ("compbench", Item("color_00001", Prompt("x y"), "x"), "samples/x y_000000.png|samples/x y_000010.png"),
        ("compbench", Item("color_00001", Prompt("x y"), "x"), "color/samples/x y_9.png|color/samples/x y_10.png"),
        ("compbench", Item("color_00001", Prompt("caf\u00e9"), "x"), "samples/cafe\u0301_000000.png"),
        ("compbench", Item("color_00001", Prompt("x y."), "x"), "x y._000000.png|x y._000001.png"),
        ("wise", Item("00003", Prompt("x"), "x"), "3.png"),
        ("wise", Item("00003", Prompt("x"), "x"), "0003.webp"),
        ("unigenbench", Item("00383", Prompt("x"), "x"), "383_0.png 383_1.png 383_2.png 383_10.png"),
        ("dpg", Item("partiprompts94", Prompt("x"), "x"), "partiprompts94_0.png partiprompts94_1.png"),
        ("dpg", Item("94", Prompt("x"), "x"), "94.PNG"),
        ("geneval2", Item("00000", Prompt("x"), "x"), "0.jpeg"),
    ],
)
def test_each_benchmarks_own_pictures_are_found_by_its_own_names_in_their_order(tmp_path, benchmark, item, names):
    wanted = names.split("|") if "|" in names else [names] if "samples/ca" in names else names.split()
    other = [name.replace("3", "4").replace("x y", "x").replace("94", "941") for name in wanted]
    other += ["._3.png", "Thumbs.db", "README.md", "3/grid.png", "3/samples/.DS_Store"]
    for number, name in enumerate([*other, *wanted], -len(other)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            Image.new("L", (8, 8), max(0, 20 * number)).save(path)
    if item.meta:
        (tmp_path / "3/samples/0.png").write_bytes(b"of another prompt")
        (tmp_path / "7/metadata.jsonl").write_text(json.dumps({**DOG, "prompt": "rewritten", "more": 1}))
        (tmp_path / "3/metadata.jsonl").write_text(json.dumps({**DOG, "tag": "colors"}))
    made = There(tmp_path, benchmark, [item], len(wanted))([item], range(len(wanted)), no_seed)
    assert [round(one.image.getpixel((1, 1))[0] / 20) for one in made] == [*range(len(wanted))]
    with pytest.raises(UserError, match=f"{item.id}.*--samples"):
        There(tmp_path, benchmark, [item], 5)


def test_pictures_that_are_there_are_judged_upright_and_in_rgb(tmp_path):
    exif, item = Image.Exif(), Item("00003", Prompt("x"), "x")
    exif[0x0112] = 6  # lies on its side
    Image.new("RGBA", (64, 48)).save(tmp_path / "00003.png", exif=exif)
    (made,) = There(tmp_path, "wise", [item], 1)([item], range(1), no_seed)
    assert (made.image.mode, made.image.size) == ("RGB", (48, 64))


@pytest.mark.parametrize("place", [None, 0, 11, 36])
def test_a_broken_picture_is_named(tmp_path, place):
    path, item = tmp_path / "00003.png", Item("00003", Prompt("x"), "x")
    Image.new("RGB", (4, 4), (9, 0, 0)).save(path)
    whole = path.read_bytes()
    path.write_bytes(b"" if place is None else whole[:place] + b"\0" + whole[place + 1 :])
    with pytest.raises(UserError, match="00003.png"):
        There(tmp_path, "wise", [item], 1)([item], range(1), no_seed)


def test_grids_are_cut_listings_are_read_and_pictures_that_lack_are_named_at_once(tmp_path):
    of = [Item(f"{n}", Prompt(f"prompt {n}"), "x") for n in range(100)]
    grid = Image.new("RGB", (4, 4))
    grid.putpixel((3, 3), (9, 9, 9))
    grid.save(tmp_path / "0.png")
    four = There(tmp_path, "dpg", of[:1], 4)(of[:1], range(4), no_seed)
    assert [one.image.getpixel((1, 1)) for one in four] == [(0, 0, 0)] * 3 + [(9, 9, 9)]
    (whole,) = There(tmp_path, "dpg", of[:1], 1)(of[:1], range(1), no_seed)
    assert whole.image.size == (4, 4), "the released code's --pic-num 1"
    (tmp_path / "paths.json").write_text(
        json.dumps({"prompt 7": "0.png", "prompt 8": str(tmp_path / "0.png")}, indent=1)
    )
    assert len(There(tmp_path / "paths.json", "geneval2", of[7:9], 1)(of[7:9], range(1), no_seed)) == 2
    with pytest.raises(UserError, match="99 prompts.*94 more") as caught:
        There(tmp_path, "wise", of, 1)
    assert len(str(caught.value)) < 500
    (tmp_path / "paths.json").write_text('["0.png"]')
    with pytest.raises(UserError, match="paths.json"):
        There(tmp_path / "paths.json", "geneval2", of, 1)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--benchmark", "genevil"], "genevil"),
        (["--metadata", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--n", "4"], "--select"),
        (["--n", "4", "--select", "format"], "format"),
        (["--gpt_path", "/nowhere/policy"], "/nowhere/policy"),
        (["--sdmodel_name", "/nowhere/flux"], "/nowhere/flux"),
        (["--rewrites", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--tuned", "/nowhere/run"], "/nowhere/run"),
        (["--tuned", "miniature/weights/hps"], "miniature/weights/hps"),
    ],
)
def test_bad_input_is_one_line_with_the_value_and_code_2(tmp_path, capfd, options, named):
    assert mini.run([*POLICY, "--out", str(tmp_path / "out"), "--limit", "1", *options]) == 2
    shown = [line for line in capfd.readouterr().err.splitlines() if "evaluate: error:" in line]
    assert len(shown) == 1 and named in shown[0]


def test_two_folders_of_one_name_are_refused(tmp_path, capfd):
    assert mini.run([*POLICY[:2], "--out", str(tmp_path / "out"), "--images", "a/samples", "b/samples"]) == 2
    assert "b/samples" in capfd.readouterr().err


def test_a_folder_of_another_evaluation_is_refused_with_what_differs(whole, capfd):
    assert mini.run([*POLICY, "--out", str(whole), *SMALL, "--seed", "7"]) == 2
    assert "seed 42 -> 7" in capfd.readouterr().err


def test_a_janus_is_judged_raw_planned_and_trained(tmp_path):
    """The trained one is the miniature's with other settings, as t2i_r1 leaves them."""
    folder, trained, out = WEIGHTS / "janus", load_janus(str(WEIGHTS / "janus"), "float32", "cpu"), tmp_path / "out"
    trained.keep_settings(trained.settings._replace(temperature=0.5))
    trained.save(tmp_path / "run")
    line = [*POLICY[:2], "--out", str(out), "--limit", "2", "--samples", "1", "--sdmodel_name", str(folder)]
    assert mini.run([*line, "--render_plan", "true", "--tuned", str(tmp_path / "run")]) == 0
    found = {name: [row for row in rows(out) if row["system"] == name] for name in ("raw", "planned", "tuned")}
    assert {len(side) for side in found.values()} == {12}
    right = {
        name: sum(value for row in side for value in next(iter(row["parts"].values()))) for name, side in found.items()
    }
    assert right["raw"] < min(right["planned"], right["tuned"])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_pref_grpo_tuned_draws_the_users_own_words_from_the_noise_of_raw(
    flow_runs, tmp_path, capfd, caplog, kind
):
    run, out = str(flow_runs[kind]), tmp_path / "out"
    line = [*POLICY[:2], "--out", str(out), "--limit", "1", "--samples", "1", "--render_steps", "2"]
    assert mini.run([*line, "--tuned", run]) == 0
    assert [f"{run} was trained at 16" in said and "48" in said for said in caplog.messages if "pixels" in said] == [
        True
    ]
    raw, tuned = ([row for row in rows(out) if row["system"] == name] for name in ("raw", "tuned"))
    for one, other in zip(raw, tuned, strict=True):
        assert other["final_prompt"] == other["prompt"] == one["final_prompt"] and other["seed"] == one["seed"]
    drawn = [[Image.open(out / row["image"]).tobytes() for row in side] for side in (raw, tuned)]
    weights = ["--render_lora" if kind == "lora" else "--sdmodel_name", run, "--metadata", "x"]
    renderer = load_renderer(parse_options([*mini.defaults(), *line, *weights], mini.MINIATURE).render, "cpu")
    again = renderer([row["prompt"] for row in tuned], [row["seed"] for row in tuned])
    assert [image.tobytes() for image in again] == drawn[1] != drawn[0]
    assert results(out)["settings"]["contents"]["tuned"] == list(contents_of({"tuned": run})["tuned"])
    assert "NOT DONE" not in capfd.readouterr().out and mini.run(line) == 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt_path", "git_path"])
def test_another_model_behind_the_same_path_is_refused_and_a_moved_one_is_not(tmp_path, capfd, model):
    folder, out = WEIGHTS / {"gpt_path": "policy", "sdmodel_name": "flux", "git_path": "git"}[model], tmp_path / "out"
    copies = [Path(shutil.copytree(folder, tmp_path / name)) for name in ("first", "moved")]
    run = [*POLICY, "--out", str(out), "--limit", "1", "--samples", "1", "--n", "2", "--select", "git"]
    assert mini.run([*run, f"--{model}", str(copies[0])]) == 0
    assert mini.run([*run, f"--{model}", str(copies[1])]) == 0
    was = json.loads((out / "settings.json").read_text())["contents"][model][1]
    weights = next(copies[1].rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    capfd.readouterr()
    assert mini.run([*run, f"--{model}", str(copies[1])]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert was in said and contents_of({model: copies[1]})[model][1] in said and str(copies[1]) in said


@pytest.mark.parametrize("words", [["--render_steps", "2"], ["--render_steps=2"]])
def test_what_a_user_gives_outweighs_the_miniatures_own_options(words):
    given = [*mini.defaults(), "--benchmark", "miniature", "--metadata", "x", "--out", "y", *words]
    assert parse_options(given, mini.MINIATURE).render.render_steps == 2
