"""Claims about what is measured of a batch of rollouts, against hand-worked answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scoring.diagnostics import correlation, diagnose, distinct, edit_distance, mean_of_processes


def row(rewrite, parts, *, prompt="a red cat", held_out=None, tokens=None):
    known = None not in parts.values()
    total = sum(parts.values()) if known else None
    tokens = tokens if tokens is not None or rewrite is None else len(rewrite.split())
    return {
        "prompt": prompt, "rewrite": rewrite, "parts": parts, "total": total, "held_out": held_out or {},
        "tokens": tokens,
    }  # fmt: skip


def test_edit_distance_counts_words_over_the_longer_text():
    assert edit_distance("a red cat".split(), "a red cat".split()) == 0
    assert edit_distance("a big red cat".split(), "a red cat".split()) == 1 / 4
    assert edit_distance("a dog".split(), "a red cat".split()) == 2 / 3
    assert edit_distance([], "a cat".split()) == 1 and edit_distance([], []) == 0


def test_distinct_n_falls_when_the_policy_repeats_itself():
    varied, same = [["a", "cat"], ["one", "dog"]], [["a", "cat"], ["a", "cat"]]
    assert distinct(varied, 1) == 1 and distinct(same, 1) == 0.5
    assert distinct(varied, 2) == 1 and distinct(same, 2) == 0.5 and distinct([["a"]], 2) == 0


def test_rewrites_are_measured_among_the_readable_ones_only():
    rows = [row("A  RED cat", {"x": 1.0}), row(None, {"x": 0.0}), row("one two three four", {"x": 0.5}, tokens=9)]
    found = diagnose([*rows, row(None, {"x": None})], 2, max_tokens=4)
    assert found["samples/absent"] == 0  # what could not be read was not asked about
    assert found["rewrites/copied"] == 0.5 and found["rewrites/overflow"] == 0.5 and found["rewrites/tokens"] == 6
    assert found["rewrites/edit_distance"] == 0.5 and found["rewrites/unreadable"] == 0.5
    dead = [row("a", {"x": None}), row(None, {"x": 0.0})]
    assert diagnose(dead, 2, max_tokens=4)["samples/absent"] == 1  # nor does it hide a reward that is dead
    assert diagnose([row(None, {"x": None}), row(None, {"x": 0.0})], 2, max_tokens=4)["samples/absent"] == 0.5


def test_spread_is_within_groups_and_an_absent_score_is_left_out_not_zero():
    rows = [row("a", {"x": 0.0}), row("b", {"x": 2.0}), row("c", {"x": 10.0}), row("d", {"x": None})]
    rows += [row("e", {"x": 5.0}), row("f", {"x": 5.0})]
    found = diagnose(rows, 2, 77)
    assert found["rewards/x/spread"] == pytest.approx(math.sqrt(2) / 2)  # of the two groups with two known scores
    assert found["rewards/x/zero_spread"] == 0.5


def test_correlation_is_of_what_rewards_say_within_a_group_not_of_how_easy_its_prompt_is():
    easy = [row("a", {"x": 10.0, "y": 11.0}), row("b", {"x": 11.0, "y": 10.0})]
    hard = [row("c", {"x": 0.0, "y": 1.0}), row("d", {"x": 1.0, "y": 0.0})]
    assert diagnose(easy + hard, 2, 77)["correlation/x~y"] == pytest.approx(-1)
    three = [row(str(i), dict(zip("xyz", values, strict=True))) for i, values in enumerate([(0, 0, 1), (1, 1, 0)] * 2)]
    found = diagnose(three, 2, 77)
    assert [found[f"agreement/{name}"] for name in "xyz"] == pytest.approx([0, 0, -1])  # z is the odd one out
    constant = [row("a", {"x": 1.0, "y": 1.0}), row("b", {"x": 1.0, "y": 2.0})] * 2
    assert "correlation/x~y" not in diagnose(constant, 2, 77)
    assert correlation(np.array([1.0, math.nan, 2.0]), np.array([1.0, 5.0, 2.0])) is None


def test_a_held_out_scorer_reports_its_mean_its_absences_and_whether_it_agrees_with_the_total():
    values = [0.1, None, 0.3, 0.9]
    parts = [1.0, 2.0, 3.0, 9.0]
    rows = [row("a", {"x": part}, held_out={"w": value}) for part, value in zip(parts, values, strict=True)]
    found = diagnose(rows, 4, 77)
    assert found["held_out/w/mean"] == pytest.approx(1.3 / 3) and found["held_out/w/absent"] == 0.25
    assert found["held_out/w/correlation"] == pytest.approx(1)
    gone = diagnose([row("a", {"x": 1.0}, held_out={"w": None})] * 2, 2, 77)
    assert gone["held_out/w/absent"] == 1 and "held_out/w/mean" not in gone
    undrawn = [row("a", {"x": 1.0}, held_out={"w": 0.5}), row(None, {"x": 0.0}, held_out={"w": None})]
    assert diagnose(undrawn, 2, 77)["held_out/w/absent"] == 0  # the scorer did not fail: there was nothing to score


def test_a_batch_in_which_everything_is_absent_still_has_its_counts():
    found = diagnose([row(None, {"x": None, "y": None})] * 4, 2, 77)
    assert found == {"samples/absent": 1.0, "rewrites/unreadable": 1.0}


def test_a_metric_that_one_process_lacks_is_the_mean_of_the_others():
    assert mean_of_processes([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}
