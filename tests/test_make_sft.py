"""Claims about scripts/make_sft.py: the real script against a real HTTP server with faults, the miniature's writer,
and best-of-N with the miniature's real renderer and rewards. Takes one minute."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from openai._models import construct_type
from openai.types.chat import ChatCompletion
from PIL import Image

from clients import http
from data.intent import lost
from data.prompts import load_prompts
from interfaces import Reward
from miniature import world
from prompting import completion, messages, parse
from scoring.drawing import Drawer
from scoring.rollouts import Scorer
from scripts import make_sft
from scripts.make_sft import main, read
from tests.processes import ROOT, run_forked
from tests.teacher_server import MODEL, TeacherServer

COLORS = ("red", "blue", "green", "white", "black", "pink")
NOUNS = ("cat", "dog", "cup", "book", "bird", "boat", "chair", "clock")
TEXTS = [f"a photo of a {color} {noun}" for color in COLORS for noun in NOUNS]
USELESS = dict.fromkeys(("refusal", "refusal field", "filter", "blocked", "truncated", "malformed", "lost"), 0.07)
REASON = {
    "refusal": "refused", "refusal field": "refused", "filter": "refused", "blocked": "refused",
    "truncated": "truncated", "malformed": "malformed", "lost": "intent lost",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    for name in ("TEACHER_API_KEY", "TEACHER_ALLOW_HTTP", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def job(data: Path, out: Path, url: str, *more: object) -> list[str]:
    arguments = ["--data", data, "--out", out, "--teacher_url", url, "--teacher_model", MODEL, *more]
    return list(map(str, arguments))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(capsys) -> str:
    """The one line on stderr that is an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "make_sft: error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


# --- a teacher with faults -----------------------------------------------------------------------------------------


def test_a_faulty_teacher_gives_a_complete_file_and_every_useless_answer_is_counted(data, tmp_path, capsys):
    out = tmp_path / "examples.jsonl"
    server = TeacherServer(USELESS, fail_share=0.1, fail_status=500, drop_share=0.1, delay=0.01)
    with server as url:
        assert main(job(data, out, url, "--attempts", 12)) == 0
    rows = rows_of(out)
    assert [row["prompt"] for row in rows] == TEXTS, "complete, in order, nothing twice"
    for row in rows:
        assert parse(completion(row["reasoning"], row["rewrite"])).rewrite == row["rewrite"]
        assert row["prompt"] in row["rewrite"] and row["teacher"] == MODEL
    kinds = Counter(kind for _, _, kind in server.answered)
    assert set(kinds) == {"", *USELESS}, "each fault has happened"
    report = capsys.readouterr().out
    for reason in set(REASON.values()):
        assert f"{reason} {sum(n for kind, n in kinds.items() if REASON.get(kind) == reason)}" in report
    assert server.requests > len(server.answered), "errors and drops were asked again"
    assert len(set(server.answered)) == len(server.answered), "each attempt has a seed of its own"
    assert 2 <= server.most_in_flight <= 16


def test_a_prompt_that_is_never_answered_well_is_given_up_and_listed(data, tmp_path, capsys):
    out = tmp_path / "examples.jsonl"
    server = TeacherServer({"lost": 0.6})
    with server as url:
        assert main(job(data, out, url, "--attempts", 2)) == 0
        listed = rows_of(tmp_path / "examples.jsonl.dropped")
        assert 0 < len(listed) < len(TEXTS)
        assert sorted(TEXTS) == sorted(row["prompt"] for row in [*rows_of(out), *listed])
        for row in listed:
            assert row["why"] == "given up" and len(row["answers"]) == 2
            assert row["answers"][0]["lost"] == [f"object {row['prompt'].split()[-1]}"]
        assert f"given up {len(listed)}" in capsys.readouterr().out
        before = server.requests
        assert main(job(data, out, url, "--attempts", 2)) == 0
        assert server.requests == before, "what is given up is not asked again"


def test_without_the_intent_check_what_was_lost_is_kept_and_said(data, tmp_path):
    out = tmp_path / "examples.jsonl"
    server = TeacherServer({"lost": 0.5})
    with server as url:
        assert main(job(data, out, url, "--intent", "false")) == 0
    rows = rows_of(out)
    assert [row["prompt"] for row in rows] == TEXTS
    assert sum("lost" in row for row in rows) == sum(kind == "lost" for _, _, kind in server.answered) > 0


SEEN = "a birthday cake with “Happy 40th Birthday” on top"


@pytest.mark.parametrize(
    "text, unchecked", [(SEEN, False), ("a dog chases a ball along the beach", False), ("一只狗", True)]
)
def test_an_answer_to_another_prompt_is_dropped_or_its_row_says_that_it_was_not_checked(
    text, unchecked, tmp_path, capsys
):
    data, out = tmp_path / "prompts.txt", tmp_path / "examples.jsonl"
    data.write_text(f"{text}\na photo of a red cat\n", encoding="utf-8")
    with TeacherServer({"lost": 1.0}) as url:
        assert main(job(data, out, url)) == (0 if unchecked else 1)
    assert [(row["prompt"], row["unchecked"]) for row in rows_of(out)] == [(text, True)] * unchecked
    assert ("not checked for intent: 1" in capsys.readouterr().out) == unchecked
    with TeacherServer() as url:
        assert main(job(data, tmp_path / "good.jsonl", url)) == 0
    assert ["unchecked" in row for row in rows_of(tmp_path / "good.jsonl")] == [unchecked, False]


def test_tokens_and_cost_are_those_of_all_answers_useless_ones_too(data, tmp_path, capsys):
    server = TeacherServer({"malformed": 0.3})
    with server as url:
        prices = ("--price_in", 1000, "--price_out", 10_000)
        for _ in range(2):  # the second time nothing is asked, and the summary is the same
            assert main(job(data, tmp_path / "examples.jsonl", url, *prices)) == 0
            asked = len(server.answered)
            cost = asked * (200 * 1000 + 50 * 10_000) / 1e6
            assert f"{200 * asked:,} + {50 * asked:,} tokens, cost {cost:.2f}" in capsys.readouterr().out
    assert asked > len(TEXTS)


# --- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_after_ctrl_c_and_after_kill_a_prompt_that_is_done_is_not_asked_again(how, code, data, tmp_path):
    server = TeacherServer(USELESS, delay=0.15, fail_share=0.05)
    out = tmp_path / "examples.jsonl"
    with server as url:
        command = [sys.executable, str(ROOT / "scripts" / "make_sft.py"), *job(data, out, url, "--attempts", 12)]
        run = subprocess.Popen(
            [*command, "--teacher_concurrency", "4"],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit it ignored
        )
        while len(server.answered) < 30 and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(how)
        _, err = run.communicate(timeout=60)
        assert run.returncode == code, err
        assert "Traceback" not in err
        done = {row["prompt"] for row in rows_of(out)}
        assert 15 <= len(done) < len(TEXTS)
        with open(out, "ab") as file:
            file.write(b'{"prompt": "a line that a kill tore')
        server.delay, before = 0.0, len(server.answered)
        again = run_forked(*command[1:])
        assert again.returncode == 0, again.stderr
        asked = {text for text, _, _ in server.answered[before:]}
        undisturbed = tmp_path / "undisturbed.jsonl"
        assert main(job(data, undisturbed, url, "--attempts", 12)) == 0
    assert out.read_bytes() == undisturbed.read_bytes()
    assert asked == set(TEXTS) - done


def test_a_server_that_dies_stops_the_run_and_the_next_one_goes_on(data, tmp_path, capsys):
    out = tmp_path / "examples.jsonl"

    class Dying(TeacherServer):
        """Answers 20 times, then only with HTTP 503."""

        def _reply(self, body, fate):
            return super()._reply(body, fate) if len(self.answered) < 20 else (503, {"error": {"message": "gone"}})

    server = Dying()
    with server as url:
        assert main(job(data, out, url, "--teacher_concurrency", 2)) == 1
        assert url in said(capsys)
    assert len(rows_of(out)) == 20 and server.requests < 60
    healthy = TeacherServer()
    with healthy as url:
        assert main(job(data, out, url)) == 0, "at another address too"
    assert [row["prompt"] for row in rows_of(out)] == TEXTS
    assert len(healthy.answered) == len(TEXTS) - 20


def test_calls_that_fail_for_good_leave_their_prompts_to_the_next_run(data, tmp_path, capsys):
    out = tmp_path / "examples.jsonl"

    class Picky(TeacherServer):
        """Cannot bear clocks."""

        def _reply(self, body, fate):
            return (422, {"error": {"message": "no clocks"}}) if b"clock" in body else super()._reply(body, fate)

    with Picky() as url:
        assert main(job(data, out, url)) == 1
    rows = rows_of(out)
    clocks = [text for text in TEXTS if "clock" in text]
    assert [row["prompt"] for row in rows] == [text for text in TEXTS if text not in clocks]
    printed = capsys.readouterr()
    assert f"not done {len(clocks)}" in printed.out and "no clocks" in printed.err
    with TeacherServer() as url:
        assert main(job(data, out, url)) == 0
    assert [row["prompt"] for row in rows_of(out)] == TEXTS


def test_a_teacher_that_refuses_options_by_name_is_asked_without_them(data, tmp_path):
    asked, names = [], {"max_tokens": "Use 'max_completion_tokens' instead", "temperature": "only 1 is supported"}

    class Newer(TeacherServer):
        """Knows neither max_tokens nor a temperature."""

        def _reply(self, body, fate):
            asked.append(json.loads(body))
            for name in names.keys() & asked[-1].keys():
                return 400, {"error": {"message": f"Unsupported: '{name}'. {names[name]}.", "param": name}}
            return super()._reply(body, fate)

    with Newer() as url:
        assert main(job(data, tmp_path / "examples.jsonl", url, "--max_new_tokens", 99, "--limit", 9)) == 0
    assert asked[-1]["max_completion_tokens"] == 99 and not names.keys() & asked[-1].keys()


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_wrong_key_ends_the_run_at_once(data, tmp_path, capsys):
    server = TeacherServer(fail_share=1, fail_status=401)
    with server as url:
        assert main(job(data, tmp_path / "examples.jsonl", url)) == 2
        assert "TEACHER_API_KEY" in said(capsys)
        assert server.requests <= 32
        server.shares["fail_share"] = 0
        assert main(job(data, tmp_path / "examples.jsonl", url, "--seed", 1)) == 0, "nothing was begun"


def test_the_teacher_is_told_what_the_policy_is_told_and_more_and_the_key_is_written_nowhere(
    data, tmp_path, monkeypatch
):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-secret-3141")
    seen = []
    with TeacherServer(watch=lambda headers, body: seen.append((headers, json.loads(body)))) as url:
        sampling = ("--temperature", 0.25, "--max_new_tokens", 99)
        assert main(job(data, tmp_path / "examples.jsonl", url, "--limit", 1, *sampling)) == 0
    ((headers, body),) = seen
    system, user = messages(TEXTS[0])
    assert body["messages"] == [{**system, "content": system["content"] + make_sft.FOR_A_TEACHER}, user]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.25, 99, MODEL)
    assert headers["Authorization"] == "Bearer sk-secret-3141"
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_file_of_somebody_else_is_not_overwritten(data, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine\n", encoding="utf-8")
    (tmp_path / "other.jsonl.settings").write_text("{}", encoding="utf-8")
    (tmp_path / "other.jsonl.dropped").write_text("a diary\n", encoding="utf-8")
    for out in (mine, tmp_path / "other.jsonl", mine / "examples.jsonl"):
        assert main(job(data, out, "http://127.0.0.1:1/v1")) == 2
        assert str(out) in said(capsys)
    assert mine.read_text(encoding="utf-8") == "mine\n"
    assert (tmp_path / "other.jsonl.dropped").read_text(encoding="utf-8") == "a diary\n"


def test_other_settings_on_the_same_out_are_refused_by_name(data, tmp_path, capsys):
    out = tmp_path / "examples.jsonl"
    server = TeacherServer()
    with server as url:
        assert main(job(data, out, url, "--limit", 3)) == 0
        for more in (("--seed", 1), ("--temperature", 0.1), ("--attempts", 5), ("--limit", 4)):
            assert main(job(data, out, url, "--limit", 3, *more)) == 2
            assert ("prompts" if "--limit" in more else more[0].strip("-")) in said(capsys)
        others = ("--teacher_concurrency", 1, "--teacher_timeout", 9, "--price_in", 1)
        assert main(job(data, out, url, "--limit", 3, *others)) == 0
    assert server.requests == 3


def test_two_runs_do_not_write_to_one_file(data, tmp_path, capsys):
    out = tmp_path / "examples.jsonl"
    server = TeacherServer(delay=0.3)
    with server as url:
        first = threading.Thread(target=lambda: main(job(data, out, url, "--limit", 1)))
        first.start()
        while not server.requests:
            time.sleep(0.01)
        assert main(job(data, out, url, "--limit", 1)) == 2
        assert str(out) in said(capsys)
        first.join()
    assert len(rows_of(out)) == 1


@pytest.mark.parametrize(
    "more, named",
    [
        (("--best_of", 4), "--rewards"),
        (("--rewards", "hps", "--reward_weights", 1, 2), "--reward_weights"),
        (("--rewards", "format", "--sdmodel_name", "nowhere"), "nowhere"),
        (("--teacher_url", "http://api.example.com/v1"), "TEACHER_ALLOW_HTTP"),
        (("--teacher_url", "https://me:secret@api.example.com/v1"), "TEACHER_API_KEY"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name_before_anything_is_asked(more, named, data, tmp_path, capsys):
    server = TeacherServer()
    with server as url:
        assert main(job(data, tmp_path / "examples.jsonl", url, *more)) == 2
    assert named in (error := said(capsys)) and "secret" not in error
    assert server.requests == 0


# --- answers -------- -------------------------------------------------------------------------------------------


GOOD = completion("one red cat", "a red cat")


@pytest.mark.parametrize(
    "text, more, drop",
    [
        (GOOD, {}, ""),
        (f"<think>my own long thoughts</think>\n{GOOD}", {}, ""),
        (GOOD, {"finish_reason": "length"}, "truncated"),
        (GOOD, {"finish_reason": "content_filter"}, "refused"),
        ("I’m sorry, I can’t draw that.", {}, "refused"),
        (completion("hm", "I cannot write this prompt."), {}, "refused"),
        ("A sorry cat looks at us.", {}, "malformed"),
        (GOOD + GOOD, {}, "malformed"),
        (None, {}, "malformed"),
        (None, {"message": {"content": None, "refusal": "no"}}, "refused"),
    ],
)
def test_an_answer_is_dropped_for_the_right_reason(text, more, drop):
    reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop", **more}]}
    answer = read(construct_type(type_=ChatCompletion, value=reply))
    assert answer["drop"] == drop
    assert ("rewrite" in answer) == (not drop)
    assert answer["tokens"] is None, "a server that does not count is not taken for one that counted 0"


# --- best of N -----------------------------------------------------------------------------------------------------


def test_the_best_of_n_scores_above_the_mean_of_all_and_has_lost_nothing(tmp_path, capsys):
    data, out = tmp_path / "world.txt", tmp_path / "examples.jsonl"
    texts = [prompt.text for prompt in world.splits()[0]]
    data.write_text("\n".join([*texts[:: len(texts) // 12][:12], "a photo of a cat"]), encoding="utf-8")
    weights = ROOT / "miniature/weights"
    arguments = ["--data", data, "--teacher", "miniature", "--out", out, "--best_of", 4]
    drawing = ["--sdmodel_name", weights / "flux", "--render_steps", 8, "--resolution", 48, "--render_batch_size", 16]
    scoring = ["--rewards", "hps", "git", "--reward_weights", 1, 0.5, "--max_sequence_length", 32]
    paths = ["--hps_path", weights / "hps", "--git_path", weights / "git", "--render_dtype", "float32"]
    assert main(list(map(str, [*arguments, *drawing, *scoring, *paths]))) == 0
    rows = rows_of(out)
    every = [total for row in rows for total in row["scores"]]
    assert len(rows) >= 11 and len(every) > 3 * len(rows) and None not in every
    assert sum(row["score"] for row in rows) / len(rows) > sum(every) / len(every) + 0.05
    prompts = {prompt.id: prompt for prompt in load_prompts(data)}
    for row in rows:
        assert row["score"] == max(row["scores"]) and row["candidates"] == len(row["scores"])
        assert row["score"] == pytest.approx(row["rewards"]["hps"] + 0.5 * row["rewards"]["git"])
        assert lost(prompts[row["id"]], row["rewrite"]) == ()
    assert any("intent lost" in row["drops"] for row in rows)
    assert "not of the miniature world" in capsys.readouterr().out, "of the cat"


class Canvas:
    """A renderer whose picture is as bright as the sampling seed at the end of the text is large."""

    max_tokens = 77

    def __call__(self, texts, seeds):
        return [Image.new("L", (1, 1), int(text.split()[-1]) % 256).convert("RGB") for text in texts]

    def count_tokens(self, text):
        return len(text.split())


class Brightness(Reward):
    """A reward that has no score for pictures for which `blind` is true."""

    name, range = "brightness", (0.0, 1.0)

    def __init__(self, blind):
        self.blind = blind

    def __call__(self, samples):
        values = [sample.images[0].getpixel((0, 0))[0] for sample in samples]
        return [None if self.blind(value) else value / 255 for value in values]


@pytest.fixture
def scored_by(monkeypatch):
    """Sets the reward that make_sft finds in place of models."""

    def put(blind) -> None:
        def load(options, render, reward, prompts):
            return Scorer(Drawer(Canvas(), group=1), [Brightness(blind)], {p.id: p for p in prompts})

        monkeypatch.setattr(make_sft, "load_scorer", load)

    return put


BEST = (
    "--best_of",
    4,
    "--rewards",
    "hps",
    "--sdmodel_name",
    "miniature/weights/flux",
    "--hps_path",
    "miniature/weights/hps",
)


def test_the_best_answer_is_kept_and_an_absent_score_is_no_number(data, tmp_path, scored_by):
    scored_by(lambda value: value > 180)
    out = tmp_path / "examples.jsonl"
    with TeacherServer() as url:
        assert main(job(data, out, url, *BEST)) in (0, 1)
    rows = rows_of(out)
    assert any(None in row["scores"] for row in rows)
    for row in rows:
        assert row["score"] == max(total for total in row["scores"] if total is not None) <= 180 / 255
        assert int(row["rewrite"].split()[-1]) % 256 / 255 == pytest.approx(row["score"])


def test_a_prompt_without_any_score_is_left_to_the_next_run(data, tmp_path, scored_by, capsys):
    out = tmp_path / "examples.jsonl"
    scored_by(lambda value: value > 60)
    with TeacherServer() as url:
        assert main(job(data, out, url, *BEST)) == 1
        first = rows_of(out)
        assert 0 < len(first) < len(TEXTS)
        assert f"not done {len(TEXTS) - len(first)}" in capsys.readouterr().out
        scored_by(lambda value: False)
        assert main(job(data, out, url, *BEST)) == 0
    assert [row["prompt"] for row in rows_of(out)] == TEXTS
    assert all(row in rows_of(out) for row in first), "what was scored stays"


def test_a_reward_that_never_answers_stops_the_run(data, tmp_path, scored_by):
    scored_by(lambda value: True)
    server = TeacherServer()
    with server as url:
        assert main(job(data, tmp_path / "examples.jsonl", url, *BEST, "--teacher_concurrency", 4)) == 1
    assert server.requests < 4 * (make_sft.PATIENCE + 8), "it does not pay for answers that nobody scores"
