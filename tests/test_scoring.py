"""Claims about the seam between completions, pictures and rewards; its renderer and rewards only count and compare."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from PIL import Image

from errors import ScoringError
from interfaces import Prompt, Reward
from prompting import completion
from r1_prompter import RewardColumns
from run.seeds import render_seed
from scoring.cache import PictureCache
from scoring.drawing import Drawer
from scoring.judge import PATIENCE, Watchdog
from scoring.rollouts import Scorer

CAT, DOG = Prompt("a cat"), Prompt("a dog")
PROMPTS = {prompt.id: prompt for prompt in (CAT, DOG)}
UNREADABLE = "<think>no answer</think>"


class Painter:
    """A renderer whose picture is its text's length in grey; `broken` texts cannot be drawn."""

    max_tokens = 6

    def __init__(self, broken: str = ""):
        self.broken, self.calls = broken, []

    def __call__(self, texts, seeds):
        self.calls += list(zip(texts, seeds, strict=True))
        return [None if t == self.broken else Image.new("RGB", (1, 1), (len(t),) * 3) for t in texts]

    def count_tokens(self, text):
        return len(text.split())


class Grey(Reward):
    """An image reward in [0, 1]: how light the picture is; `table` replaces scores by prompt and rewrite."""

    needs_images, range = True, (0.0, 1.0)

    def __init__(self, name="grey", table=None):
        self.name, self.table, self.seen = name, table or {}, 0

    def __call__(self, samples):
        self.seen += len(samples)
        return [self.table.get(s.rewrite, s.images[0].getpixel((0, 0))[0] / 255) for s in samples]


class Readable(Reward):
    name, needs_images, range = "readable", False, (0.0, 1.0)

    def __call__(self, samples):
        return [float(s.rewrite is not None) for s in samples]


def scorer(*rewards, renderer=None, group=2, images=1, held_out=(), reasoning=True, **options):
    drawer = Drawer(renderer or Painter(), group=group, images_per_rewrite=images, run_seed=7, **options)
    return Scorer(drawer, rewards, PROMPTS, held_out=held_out, reasoning=reasoning)


def score(it, answers, step=1):
    """Score (prompt, rewrite or None) pairs."""
    texts = [UNREADABLE if rewrite is None else completion("hm", rewrite) for _, rewrite in answers]
    return it.score(texts, [prompt.id for prompt, _ in answers], step)


def test_each_distinct_rewrite_and_seed_is_drawn_once_whatever_the_number_of_rewards():
    renderer = Painter()
    it = scorer(Grey("a"), Grey("b"), Grey("c"), renderer=renderer, group=4, images=2)
    score(it, [(CAT, "one cat"), (CAT, "one cat"), (CAT, "a cat"), (CAT, None)])
    assert len(renderer.calls) == len(set(renderer.calls)) == 4
    assert it.metrics["images/drawn"] == 4 and it.metrics["images/distinct"] == 4 / 6


def test_trl_calls_share_one_drawing_and_the_next_batch_is_drawn_anew():
    renderer = Painter()
    it = scorer(Grey("a"), Grey("b"), renderer=renderer)
    columns = RewardColumns(it)
    for step in (0, 1):
        completions = [[{"role": "assistant", "content": completion("hm", "one cat")}] for _ in range(2)]
        for function in columns.functions():
            function(completions=completions, prompt_id=[CAT.id] * 2, trainer_state=SimpleNamespace(global_step=step))
    assert [seed for _, seed in renderer.calls] == [render_seed(7, CAT.id, step, 0) for step in (1, 2)]
    assert [f.__name__ for f in columns.functions()] == ["a", "b"] and it.metrics["images/drawn"] == 1


def test_seeds_are_shared_in_a_group_and_know_nothing_of_batch_position():
    together = score(scorer(Grey(), images=2), [(CAT, "x"), (CAT, "y"), (DOG, "x"), (DOG, "y")])
    swapped = score(scorer(Grey(), images=2), [(DOG, "x"), (DOG, "y"), (CAT, "x"), (CAT, "y")])
    assert together[0].seeds == together[1].seeds == swapped[2].seeds != together[2].seeds
    seeds = {render_seed(s, p, t, k) for s in (0, 1) for p in ("a", "b") for t in (1, 2) for k in (0, 1)}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_absent_in_one_reward_makes_all_parts_none(nothing):
    it = scorer(Grey("a"), Grey("b", {"one cat": nothing}), Readable())
    rows = score(it, [(CAT, "one cat"), (CAT, "two")])
    assert rows[0].parts == {"a": None, "b": None, "readable": None} and rows[0].absent
    assert None not in rows[1].parts.values()


def test_a_picture_that_could_not_be_drawn_is_absent_and_not_scored():
    reward = Grey()
    rows = score(scorer(reward, Readable(), renderer=Painter(broken="one cat")), [(CAT, "one cat"), (CAT, "two")])
    assert rows[0].absent and rows[0].sample.images == (None,) and not rows[1].absent and reward.seen == 1


def test_an_unreadable_answer_gets_the_lowest_score_of_its_own_group_and_is_not_drawn():
    renderer = Painter()
    it = scorer(Grey(table={"low": 0.2, "high": 0.9, "other": 0.1}), Readable(), renderer=renderer, group=3)
    rows = score(it, [(CAT, "low"), (CAT, None), (CAT, "high"), (DOG, "other"), (DOG, "other"), (DOG, "other")])
    assert rows[1].parts == {"grey": 0.2, "readable": 0.0} and not rows[1].absent
    assert rows[1].seeds == () and len(renderer.calls) == 3


def test_where_no_answer_of_a_group_was_scored_the_unreadable_get_the_lower_bound():
    it = scorer(Grey(table={"lost": None}))
    assert [row.parts["grey"] for row in score(it, [(CAT, None), (CAT, None), (DOG, "lost"), (DOG, None)])] == [
        0.0, 0.0, None, 0.0,
    ]  # fmt: skip


def test_nothing_is_drawn_for_rewards_that_need_no_pictures():
    renderer = Painter()
    rows = score(scorer(Readable(), renderer=renderer), [(CAT, "one"), (CAT, None)])
    assert renderer.calls == [] and [row.parts["readable"] for row in rows] == [1.0, 0.0]


def test_rewrites_are_measured_in_the_renderers_tokens():
    rows = score(scorer(Grey()), [(CAT, "A  CAT"), (CAT, None), (DOG, "one two three"), (DOG, "x")])
    assert [row.tokens for row in rows] == [2, None, 3, 1]


def test_a_held_out_scorer_is_asked_but_makes_no_sample_absent():
    it = scorer(Grey("a"), held_out=[Grey("watch", {"one cat": None})])
    rows = score(it, [(CAT, "one cat"), (CAT, "two")])
    assert [row.held_out["watch"] for row in rows] == [None, 3 / 255]
    assert not any(row.absent for row in rows) and all(list(row.parts) == ["a"] for row in rows)


class AgainstRaw(Grey):
    """Lighter than the picture of the raw prompt?"""

    needs_baseline_images = True

    def __call__(self, samples):
        self.metrics = {"grey/asked": float(len(samples))}
        return [float(s.images[0].getpixel((0, 0)) > s.baseline_images[0].getpixel((0, 0))) for s in samples]


def test_the_raw_prompt_is_drawn_once_in_a_run_where_a_reward_needs_it(tmp_path):
    renderer = Painter()
    it = scorer(AgainstRaw(), renderer=renderer, group=3, cache=PictureCache(tmp_path / "cache", 1e6))
    rows = score(it, [(CAT, "a"), (CAT, "a big cat"), (CAT, CAT.text)])
    assert [row.parts["grey"] for row in rows] == [0.0, 1.0, 0.0]
    seed, own = render_seed(7, CAT.id, 1, 0), render_seed(7, CAT.id, 0, 0)
    assert sorted(renderer.calls) == sorted([("a", seed), ("a big cat", seed), (CAT.text, seed), (CAT.text, own)])
    assert it.metrics["grey/asked"] == 3 and it.metrics["images/cached"] == 0
    renderer.calls.clear()
    again = scorer(AgainstRaw(), renderer=renderer, group=3, cache=PictureCache(tmp_path / "cache", 1e6))
    rows = score(again, [(CAT, "a"), (CAT, "a big cat"), (CAT, "a")])  # a continued run, the same step
    assert [row.parts["grey"] for row in rows] == [0.0, 1.0, 0.0]
    assert sorted(renderer.calls) == sorted([("a", seed), ("a big cat", seed)])
    assert again.metrics["images/cached"] == 1 / 3
    score(scorer(Grey(), renderer=(plain := Painter())), [(CAT, "a"), (CAT, "b")])
    assert CAT.text not in dict(plain.calls)


def test_a_group_that_mixes_prompts_is_refused():
    with pytest.raises(ScoringError, match="mix prompts"):
        score(scorer(Grey()), [(CAT, "x"), (DOG, "y")])
    with pytest.raises(ScoringError, match="3 rollouts"):
        score(scorer(Grey()), [(CAT, "x"), (CAT, "y"), (DOG, "y")])


def test_a_reward_out_of_range_or_of_wrong_length_is_named():
    with pytest.raises(ScoringError, match=r"'grey' gave 3.0 for 'a cat'"):
        score(scorer(Grey(table={"x": 3.0})), [(CAT, "x"), (CAT, "y")])
    short = Grey("short")
    short.__class__ = type("Short", (Grey,), {"__call__": lambda self, samples: [0.5]})
    with pytest.raises(ScoringError, match="'short' returned 1 scores for 2"):
        score(scorer(short), [(CAT, "x"), (CAT, "y")])


def test_too_many_absent_samples_stop_the_run_only_when_it_goes_on():
    it = Watchdog(max_absent_share=0.5)
    for _ in range(PATIENCE - 1):
        it.check({"samples/absent": 0.9}, [])
    it.check({"samples/absent": 0.1}, [])
    for _ in range(PATIENCE - 1):
        it.check({"samples/absent": 0.9}, [])
    with pytest.raises(ScoringError, match="90%"):
        it.check({"samples/absent": 0.9}, [])


@pytest.mark.parametrize("unreadable, advised", [(0.9, False), (0.5, False), (0.0, True), (0.1, True)])
def test_a_higher_temperature_is_advised_only_where_answers_can_be_read(caplog, unreadable, advised):
    it = Watchdog(max_absent_share=0.5)
    for _ in range(PATIENCE):
        it.check({"samples/absent": 0.0, "groups/equal": 1.0, "rewrites/unreadable": unreadable}, [])
    (said,) = caplog.messages
    assert ("--temperature" in said, "--max_completion_length" in said) == (advised, not advised)


def test_own_noise_gives_every_picture_of_a_group_another_seed_that_a_resumed_run_repeats():
    it = scorer(Grey(), group=3, images=2, common_seeds=False)
    rows = [(CAT, "a cat"), (CAT, "a cat"), (CAT, "one cat"), (DOG, "a dog"), (DOG, "dog"), (DOG, "one dog")]
    seeds = [scored.seeds for scored in score(it, rows)]
    assert len({seed for row in seeds for seed in row}) == 12
    assert seeds[0] == tuple(render_seed(7, CAT.id, 1, k) for k in (0, 1))
    assert [scored.seeds for scored in score(it, rows)] == seeds


def test_without_reasoning_an_answer_is_the_rewrite_alone_and_a_think_block_is_unreadable():
    it = scorer(Readable(), reasoning=False)
    texts = [completion(None, "one cat"), completion("hm", "one cat")]
    plain, thinking = it.score(texts, [CAT.id] * 2, 1)
    assert (plain.sample.rewrite, plain.reasoning, thinking.sample.rewrite) == ("one cat", None, None)
    assert [row.parts["readable"] for row in (plain, thinking)] == [1.0, 0.0]
