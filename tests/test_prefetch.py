"""Claims about scoring ahead and about pictures that are kept: both save time, neither changes a score."""

from __future__ import annotations

import threading

import pytest
from PIL import Image

from clients.chat import VLMClient
from interfaces import Sample
from rewards.judge import Judge
from run.files import png_bytes
from scoring.cache import PictureCache
from scoring.prefetch import Prefetcher
from tests.test_judges import MODEL, JudgeServer, grades, group, questions
from tests.test_judges import score as brightness
from tests.test_scoring import CAT, DOG, Grey, Painter, score, scorer

TWO_GROUPS = [(CAT, "one cat"), (CAT, "a big cat"), (DOG, "one dog"), (DOG, None)]


class InTurn(Painter):
    """Draws one picture after another and tells of each; waits before the picture of `gate` until it is open."""

    def __init__(self, gate: str = "", **options):
        super().__init__(**options)
        self.gate, self.open, self.waited = gate, threading.Event(), True

    def __call__(self, texts, seeds, on_image=None):
        pictures = []
        for i, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
            if text == self.gate:
                self.waited = self.open.wait(10)
            pictures += super().__call__([text], [seed])
            if on_image:
                on_image(i, pictures[-1])
        return pictures


class Asking(Grey):
    """A judge that can begin; `heard` is what it was told, in order."""

    can_prefetch = True

    def __init__(self, name="asking", opens: threading.Event | None = None):
        super().__init__(name)
        self.heard, self.opens = [], opens

    def prefetch(self, samples):
        self.heard.append([sample.rewrite for sample in samples])
        if self.opens:
            self.opens.set()


def test_a_judge_is_asked_about_a_group_while_the_next_is_being_drawn():
    renderer = InTurn(gate="one dog")
    asking = Asking(opens=renderer.open)
    rows = score(scorer(asking, renderer=renderer), TWO_GROUPS)
    assert renderer.waited, "the drawing of the second group waited for the judge to hear of the first"
    assert asking.heard[0] == ["one cat", "a big cat"]
    assert [row.parts["asking"] for row in rows] == [7 / 255, 9 / 255, 7 / 255, 7 / 255]


def test_an_error_beside_the_drawing_is_raised_and_one_of_the_drawing_comes_first():
    class Failing(Asking):
        def prefetch(self, samples):
            raise RuntimeError("no such judge")

    with pytest.raises(RuntimeError, match="no such judge"), Prefetcher([Failing()]) as ahead:
        ahead.ready([])
    with pytest.raises(ValueError, match="the renderer"), Prefetcher([Failing()]) as ahead:
        ahead.ready([])
        raise ValueError("the renderer")


# ----- a judge that was begun


def test_what_was_begun_is_not_asked_again_and_counted_once():
    server = JudgeServer(brightness)
    with server as url:
        client = VLMClient(url, MODEL)
        client.prefetch(questions(0, 51))
        assert server.requests == 2
        client.prefetch(questions(51, 102))
        assert server.requests == 3
        assert client.ask(questions(0, 51, 102, 153)) == grades(0, 51, 102, 153)
        assert server.requests == 4
        assert client.metrics == {"asked": 4, "cached": 0, "failed": 0, "unparsable": 0}
        assert client.ask(questions(0)) == grades(0)
        assert server.requests == 5, "without a cache a later batch asks anew"


def test_a_call_that_failed_when_begun_is_absent_and_not_tried_twice():
    server = JudgeServer(brightness, fail_share=1, fail_status=400)
    with server as url:
        client = VLMClient(url, MODEL)
        client.prefetch(questions(51))
        assert client.ask(questions(51)) == [None]
        assert server.requests == 1 and client.metrics["failed"] == 1 and client.reasons[0]


def test_a_verdict_from_the_cache_is_counted_as_such_whether_begun_or_not(tmp_path):
    with JudgeServer(brightness) as url:
        VLMClient(url, MODEL, cache=tmp_path / "v.sqlite").ask(questions(0, 51))
        client = VLMClient(url, MODEL, cache=tmp_path / "v.sqlite")
        client.prefetch(questions(0))
        assert client.ask(questions(0, 51, 102)) == grades(0, 51, 102)
        assert client.metrics == {"asked": 1, "cached": 2, "failed": 0, "unparsable": 0}


def test_a_judge_begun_by_the_scorer_gives_the_scores_and_counts_of_one_that_was_not():
    def graded(samples: list[Sample], prefetch: bool):
        server = JudgeServer(brightness)
        with server as url:
            it = Judge(VLMClient(url, MODEL))
            if prefetch:
                it.prefetch(samples[:2])
            return it(samples), it.metrics, server.requests

    samples = group("a cat", 10, 20, 30)
    assert graded(samples, prefetch=True) == graded(samples, prefetch=False)


# ----- pictures that are kept


def test_no_rewrite_is_kept(tmp_path):
    it = scorer(Grey(), cache=PictureCache(tmp_path / "cache", 1e6))
    score(it, [(CAT, "one cat"), (CAT, "a cat")])
    assert not (tmp_path / "cache").exists() and "images/cached" not in it.metrics


def noise(seed: int) -> Image.Image:
    return Image.effect_noise((32, 32), 90 + seed).convert("RGB")


def test_a_kept_picture_is_the_one_that_was_drawn_and_no_name_comes_from_a_text(tmp_path):
    cache, picture = PictureCache(tmp_path, 1e6), noise(0)
    for text in ("../../etc/passwd", "🦊\ud83d", "a" * 100_000):
        cache.put(text, 1, picture)
        assert cache.get(text, 1).tobytes() == picture.tobytes()
        assert cache.get(text, 2) is None
    assert all(len(path.name) == 68 for path in tmp_path.rglob("*")) and len(list(tmp_path.iterdir())) == 3


def test_at_the_limit_no_more_pictures_are_kept_and_all_processes_read_those_that_are(tmp_path):
    noise = [Image.effect_noise((32, 32), 50).convert("RGB") for _ in range(3)]
    size = len(png_bytes(noise[0], compress_level=1))
    cache, other = PictureCache(tmp_path, 2.5 * size), PictureCache(tmp_path, 0)
    for seed, picture in enumerate(noise):
        cache.put("a cat", seed, picture)
        other.put("a dog", seed, picture)
    assert [other.get("a cat", seed) is not None for seed in range(3)] == [True, True, False]
    assert other.get("a dog", 0) is None


def test_a_damaged_picture_is_drawn_again(tmp_path, caplog):
    cache, picture = PictureCache(tmp_path, 1e6), noise(1)
    cache.put("x", 1, picture)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:200])
    assert cache.get("x", 1) is None and "drawn again" in caplog.text
    cache.put("x", 1, picture)
    assert cache.get("x", 1).tobytes() == picture.tobytes()


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = PictureCache(tmp_path / "file" / "cache", 1e6)
    cache.put("x", 1, noise(1))
    cache.put("x", 2, noise(2))
    assert caplog.text.count("no more pictures are kept") == 1
