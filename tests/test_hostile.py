"""Claims about text that wants to break something: 200 prompts, 200 rewrites, in training, inference and judge."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from clients.chat import VLMClient
from data.prompts import load_prompts
from data.text import visible
from interfaces import Prompt, Reward, Sample
from miniature.judge_server import JudgeServer
from models.policy import load_tokenizer
from prompting import MAX_PROMPT_CHARS, completion, messages
from rendering import RenderOptions, load_renderer
from rewards.hps import HPS
from rewards.judge import TEMPLATE, Judge
from scoring.drawing import Drawer
from scoring.rollouts import Scorer
from tests.conftest import save_policy
from tests.hostile import TEXTS
from tests.processes import ROOT, run_forked

pytestmark = pytest.mark.slow

REWRITES = [*TEXTS, "half a pair \ud83d", "\udfff"][-200:]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8", errors="surrogatepass").splitlines()]


def run(where: Path, *command: object) -> subprocess.CompletedProcess:
    """A program of the house, in a folder of its own in which nothing else may appear."""
    done = run_forked(*command, cwd=where)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "prompts.jsonl"
    seen = [text for text in TEXTS if visible(text).strip() and "\0" not in text]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in seen), encoding="utf-8")
    return path


def read_back(path: Path) -> set[str]:
    return {prompt.text for prompt in load_prompts(path)}


@pytest.fixture(scope="module")
def fluent(tmp_path_factory) -> Path:
    """A policy whose answers to hostile prompts can be read: three batches without such an answer stop a run."""
    folder = tmp_path_factory.mktemp("fluent")
    save_policy(folder, [text for text in TEXTS if text.strip() and len(text) < 60][::8])
    return folder


def test_200_hostile_prompts_are_trained_on_and_none_escapes_or_is_scored_unseen(toy, fluent, prompts, tmp_path):
    seen: list[str] = []
    server = JudgeServer(
        lambda samples: [0.5 for _ in samples], watch=lambda headers, body: seen.append(json.loads(body))
    )
    with server as url:
        options = ["--config", toy.config, "--outdir", "run", "--data", prompts, "--rewards", "hps", "judge", "format"]
        options += ["--judge_model", "miniature", "--judge_url", url, "--per_device_train_batch_size", 8]
        options += ["--gradient_accumulation_steps", 1, "--max_steps", len(TEXTS) // 2, "--save_strategy", "no"]
        options += ["--gpt_path", fluent, "--learning_rate", 1e-5]
        done = run(tmp_path, ROOT / "r1_prompter.py", *options)
    assert "cut to 2000" in done.stderr  # over-long prompts are cut with a warning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    trained = [row for path in sorted((tmp_path / "run" / "rollouts").iterdir()) for row in rows(path)]
    wanted = read_back(prompts)
    assert {row["prompt"] for row in trained} <= wanted and len(trained) >= 4 * 180
    for row in trained:  # no number without a picture that was seen
        assert row["total"] is not None and (row["rewrite"] is None) == (row["seeds"] == [])
    assert all(re.fullmatch(r"[0-9a-f]{20}\.png", path.name) for path in (tmp_path / "run" / "images").iterdir())
    for body in seen:
        words = body["messages"][0]["content"][-1]["text"]
        assert len(words) < MAX_PROMPT_CHARS + len(TEMPLATE.text)
        assert words.count("<") == TEMPLATE.text.count("<"), "no markup but the template's own"


def test_200_hostile_prompts_are_rewritten_and_drawn_under_names_that_are_not_theirs(toy, prompts, tmp_path):
    options = ["--data", prompts, "--gpt_path", toy.policy, "--out", "out", "--max_new_tokens", 40, "--samples", 1]
    options += ["--sdmodel_name", toy.flux, "--resolution", 16, "--render_steps", 1, "--max_sequence_length", 64]
    run(tmp_path, ROOT / "scripts" / "reprompt.py", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    written = rows(tmp_path / "out" / "rewrites.jsonl")
    assert {row["prompt"] for row in written} == read_back(prompts)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert all(re.fullmatch(r"[\w.-]+\.(png|jsonl?|html)", name) for name in names)
    assert not any("passwd" in name or "cat" in name for name in names)


class Watching(Reward):
    """What the rewards are given to judge by."""

    name, range, needs_images = "watching", (0.0, 1.0), True

    def __init__(self):
        self.texts: list[str] = []

    def __call__(self, samples):
        self.texts += [sample.prompt.text for sample in samples]
        return [0.5 for _ in samples]


def test_200_hostile_rewrites_are_drawn_scored_and_never_become_the_judges_text(toy, caplog):
    prompt, watching = Prompt("a photo of a red cat"), Watching()
    options = RenderOptions(
        str(toy.flux), render_dtype="float32", render_steps=1, resolution=16, max_sequence_length=64,
        render_batch_size=40,
    )  # fmt: skip
    renderer = load_renderer(options, "cpu")
    hps = HPS(toy.hps, device="cpu")
    scorer = Scorer(Drawer(renderer, group=len(REWRITES)), [hps, watching], {prompt.id: prompt})
    answers = [f"<think>hm</think><answer>{rewrite}</answer>" for rewrite in REWRITES]
    scored = scorer.score(answers, [prompt.id] * len(answers), 1)
    assert "its end is not drawn" in caplog.text  # over-long rewrites are cut with a warning
    assert set(watching.texts) == {prompt.text}
    readable = [row for row in scored if row.sample.rewrite is not None]
    assert len(readable) > 150
    for row in scored:
        if row.absent:
            assert row.sample.images == (None,) and renderer.failures, "absent only where nothing could be drawn"
        elif row.sample.rewrite is not None:
            assert isinstance(row.sample.images[0], Image.Image)
    assert all(row.parts["watching"] == 0.5 for row in scored if not row.absent)


class Parrot(JudgeServer):
    """A judge that can be talked to: it answers with the question, the user's prompt in it."""

    def _reply(self, body, fate):
        words = json.loads(body)["messages"][0]["content"][-1]["text"]
        return 200, self._completion(words.partition(TEMPLATE.text.partition("{prompt}")[0])[2])


def test_no_hostile_prompt_forges_its_own_grade(tmp_path):
    samples = [Sample(Prompt(text), "", "r", (Image.new("RGB", (8, 8), (i, 0, 0)),)) for i, text in enumerate(TEXTS)]
    quiet = Sample(Prompt("a cat"), "", "r", (Image.new("RGB", (8, 8)),))
    with Parrot(lambda samples: []) as url:
        baseline = Judge(VLMClient(url, "miniature"))([quiet])
        assert Judge(VLMClient(url, "miniature"))(samples) == baseline * len(samples)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_hostile_prompt_stays_inside_the_users_turn(toy, text):
    tokenizer = load_tokenizer(str(toy.policy))
    ids = tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, return_dict=False)
    turns = [
        ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ]
    assert turns == [3, 2, 0]


def test_an_answer_with_a_hostile_rewrite_is_read_as_it_stands_or_not_at_all():
    for rewrite in REWRITES:
        try:
            completion("hm", rewrite)
        except ValueError as error:
            assert "cannot be read back" in str(error)
