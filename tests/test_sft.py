"""Claims about the cold start: what is learnt, that rollout sees the same tokens, and that nothing is lost."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import sft
from errors import UserError
from inference import Reprompter
from models.policy import ChatTemplate, load_policy, load_tokenizer
from prompting import completion, parse
from tests.conftest import PROMPTS
from tests.processes import kill_when, launch, run_forked

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"prompt": text, "reasoning": f"wanted: {text}", "rewrite": f"a sharp {text[len('a photo of a ') :]}"}
    for text in PROMPTS
]


@pytest.fixture
def cold(toy, tmp_path) -> list[str]:
    """Options of a small cold start of the toy policy, four prompts with eight equal examples each."""
    write(tmp_path / "examples.jsonl", ROWS * 8)
    options = {
        "data": tmp_path / "examples.jsonl", "gpt_path": toy.policy, "outdir": tmp_path / "run", "dtype": "float32",
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 20, "validation_share": 0.25,
        "save_steps": 20,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def write(path: Path, examples: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    return path


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_cold_start_teaches_the_answers_and_reports_what_it_did(cold, tmp_path, capfd):
    assert sft.main([*cold, "--num_train_epochs", "40"]) == 0
    run, measured = tmp_path / "run", rows(tmp_path / "run")
    losses = [row["loss"] for row in measured if "loss" in row]
    watched = [row["eval_loss"] for row in measured if "eval_loss" in row]
    assert losses[-1] < losses[0] / 4 and len(watched) == 40
    said = capfd.readouterr().out
    assert "24 examples of " in said and "8 to validate on" in said and "ETA" in said
    assert (run / "report.html").read_text().count("Loss") and (run / "run.json").exists()

    learnt = [row for row in ROWS if row["prompt"] not in held_out(ROWS)]
    answers = Reprompter(str(run), dtype="float32", max_new_tokens=120)([row["prompt"] for row in learnt])
    assert [answer.rewrite for answer in answers] == [row["rewrite"] for row in learnt]


def held_out(examples: list[dict]) -> set[str]:
    _, watched = sft.split([sft.Example(row["prompt"], "") for row in examples], 0.25)
    return {example.prompt for example in watched}


def test_the_tokens_that_are_learnt_are_those_that_rollout_sees(toy, tmp_path, monkeypatch):
    """What TRL's own GRPO rollout was given and wrote, against the same prompt and text as a training example."""
    import r1_prompter

    seen, original = [], r1_prompter.RewriteTrainer._generate_and_score_completions

    def recording(trainer, inputs):
        batch = original(trainer, inputs)
        ids = [batch[f"{part}_ids"].masked_select(batch[f"{part}_mask"].bool()) for part in ("prompt", "completion")]
        sizes = [batch[f"{part}_mask"].sum(1).tolist() for part in ("prompt", "completion")]
        texts = [(s.sample.prompt.text, s.sample.completion, s.sample.rewrite) for s in trainer.columns.rollouts]
        seen.extend(zip(texts, *(part.split(size) for part, size in zip(ids, sizes, strict=True)), strict=True))
        return batch

    monkeypatch.setattr(r1_prompter.RewriteTrainer, "_generate_and_score_completions", recording)
    options = ["--max_steps", "1", "--save_strategy", "no", "--rewards", "format", "--max_completion_length", "60"]
    assert r1_prompter.main(["--config", str(toy.config), "--outdir", str(tmp_path / "rl"), *options]) == 0

    template, equal = ChatTemplate(load_tokenizer(str(toy.policy))), 0
    for (text, written, rewrite), asked, answered in seen:
        if rewrite is None or completion(parse(written).reasoning, rewrite) != written:
            continue
        ids = sft.tokens(sft.Example(text, written), template)["input_ids"]
        assert ids[: len(asked)] == asked.tolist()
        equal += ids[len(asked) :] == answered.tolist()  # a policy may also spell a word in other tokens
    assert equal >= 3


@pytest.mark.parametrize("reasoning", [True, False])
def test_only_the_answer_and_its_end_token_are_learnt(toy, reasoning):
    tokenizer = load_tokenizer(str(toy.policy))
    example = sft.Example(PROMPTS[0], completion("a cat" if reasoning else None, "a red cat"))
    row = sft.tokens(example, ChatTemplate(tokenizer, reasoning))
    learnt = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learnt) == example.answer + tokenizer.eos_token
    assert row["input_ids"][-len(learnt) :] == learnt
    asked = tokenizer.decode(row["input_ids"][: -len(learnt)])
    assert asked.endswith("<|im_start|>assistant\n") and PROMPTS[0] in asked and ("<think>" in asked) == reasoning


def test_the_logged_loss_is_that_of_the_answers_tokens(cold, toy, tmp_path):
    options = ["--learning_rate", "0", "--max_steps", "1", "--validation_share", "0", "--save_strategy", "no"]
    write(tmp_path / "examples.jsonl", ROWS * 2)
    assert sft.main([*cold, *options]) == 0
    tokenizer, policy = load_tokenizer(str(toy.policy)), load_policy(str(toy.policy), "float32", "cpu")
    nll, count = 0.0, 0
    for row in ROWS:
        example = sft.Example(row["prompt"], completion(row["reasoning"], row["rewrite"]))
        ids, labels = (torch.tensor([v]) for v in sft.tokens(example, ChatTemplate(tokenizer)).values())
        learnt = int((labels != -100).sum())
        with torch.inference_mode():
            nll, count = nll + policy(input_ids=ids, labels=labels).loss.item() * learnt, count + learnt
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(nll / count, abs=1e-4)


def test_bfloat16_weights_that_would_lose_their_steps_are_warned_of(cold, capfd):
    for options, warned in ([], False), (["--dtype", "bfloat16"], True):
        outdir = ["--outdir", f"{cold[cold.index('--outdir') + 1]}_{warned}"]
        assert sft.main([*cold, *outdir, "--max_steps", "1", "--save_strategy", "no", *options]) == 0
        assert ("updates below 0.4 %" in capfd.readouterr().out) == warned


def test_a_prompts_examples_are_all_on_one_side_whatever_the_order():
    examples = [sft.Example(f"prompt {i % 10}", f"answer {i}") for i in range(40)]
    learnt, watched = sft.split(examples, 0.2)
    assert len({e.prompt for e in watched}) == 2 and len(learnt) + len(watched) == 40
    assert not {e.prompt for e in learnt} & {e.prompt for e in watched}
    assert {e.prompt for e in sft.split(examples[::-1], 0.2)[1]} == {e.prompt for e in watched}
    assert sft.split(examples, 0)[1] == []


def test_examples_that_are_too_long_are_left_out_and_counted(cold, tmp_path, capfd):
    write(tmp_path / "examples.jsonl", [*ROWS * 4, *({**row, "reasoning": "long " * 900} for row in ROWS)])
    assert sft.main([*cold, "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert "4 left out as too long" in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["derived"]["examples_too_long"] == 4


def test_lora_trains_an_adapter_that_grpo_goes_on_from(cold, toy, tmp_path, capfd):
    import r1_prompter

    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0"]
    assert sft.main([*cold, *lora, "--max_steps", "9", "--save_strategy", "no"]) == 0
    assert (tmp_path / "run" / "adapter_config.json").exists()
    assert "9 of 9 optimiser steps (trl, sft)" in (tmp_path / "run" / "README.md").read_text().replace("\n", " ")
    adapter = ["--gpt_path", str(tmp_path / "run"), "--outdir", str(tmp_path / "rl"), "--save_strategy", "no"]
    assert (
        r1_prompter.main(
            ["--config", str(toy.config), "--max_steps", "4", "--warmup_steps", "0", "--beta", "0.1", *adapter]
        )
        == 0
    )
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "rl"))
    assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)
    assert rows(tmp_path / "rl")[0]["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the adapter, not the base
    again = [*adapter[:2], "--outdir", str(tmp_path / "no"), "--use_peft", "true"]
    assert r1_prompter.main(["--config", str(toy.config), *again]) == 2
    assert "leave --use_peft out" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_cold_start_resumes_and_logs_each_step_once(cold, tmp_path):
    run, program = tmp_path / "run", [str(ROOT / "sft.py"), *cold, "--num_train_epochs", "40"]
    kill_when(lambda: bool(list(run.glob("checkpoint-*/manifest.json"))), [sys.executable, *program])
    done = run_forked(*program, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / "run.json").read_text())["resumed_from_step"]
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 121))
    again = run_forked(*program)
    assert again.returncode == 2 and "--resume" in again.stderr.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_under_zero_2_share_a_step_and_leave_one_policy(cold, tmp_path):
    options = [*cold, "--max_steps", "3", "--per_device_train_batch_size", "4", "--save_strategy", "no"]
    done = launch(ROOT / "sft.py", *options)
    derived = json.loads((tmp_path / "run" / "run.json").read_text())["derived"]
    assert (derived["processes"], derived["examples_per_step"]) == (2, 8)
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3]
    assert done.stdout.count("report:") == 1
    load_policy(str(tmp_path / "run"), "float32", "cpu")


BAD = {
    "no file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "packing without flash attention": (["--packing", "true"], "flash_attention_2"),
    "padding free without flash attention": (["--padding_free", "true"], "flash_attention_2"),
    "validation share": (["--validation_share", "1"], "--validation_share '1'"),
    "all too long": (["--max_length", "10"], "max_length 10"),
    "unknown flag": (["--learning_rat", "1"], "did you mean '--learning_rate'"),
    "renamed option": (["--output_dir", "elsewhere"], "--outdir"),
    "no such policy": (["--gpt_path", "/nowhere/policy"], "/nowhere/policy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_with_the_value_and_code_2(case, cold, tmp_path, capfd):
    options, named = BAD[case]
    assert sft.main([*cold, *options]) == 2
    assert named in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "bad.jsonl"),
        ('{"prompt": "x", "reasoning": "y", "rewrite": "z"}\n{"prompt": "x"}', "line 2: .*rewrite"),
        ('{"prompt": "x", "reasoning": "", "rewrite": "z"}', "line 1: .*reasoning"),
        ('{"prompt": "x", "reasoning": "<think>", "rewrite": "z"}', "line 1: .*<think>"),
    ],
)
def test_a_bad_file_names_the_line_and_what_is_wrong(tmp_path, content, named):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=named):
        sft.load_examples(tmp_path / "bad.jsonl", reasoning=True)


def test_without_reasoning_no_reasoning_is_needed(tmp_path):
    path = write(tmp_path / "direct.jsonl", [{"prompt": "x 🦊", "rewrite": "a fox 🦊"}])
    assert sft.load_examples(path, reasoning=False) == [sft.Example("x 🦊", "<answer>a fox 🦊</answer>")]


def test_the_recipe_holds_and_packing_goes_with_flash_attention(monkeypatch):
    monkeypatch.setattr("run.options.need", lambda package, asker: None)
    script, training, model = sft.parse_options(["--data", "x", "--outdir", "y"])
    recipe = yaml.safe_load((ROOT / "configs" / "cold_start.yaml").read_text())
    known = {**vars(script), **vars(training), **vars(model)}
    for key, value in recipe.items():
        assert known[key] == ([value] if key == "report_to" else value), key
    flash = ["--packing", "true", "--attn_implementation", "flash_attention_2"]
    assert sft.parse_options(["--data", "x", "--outdir", "y", *flash])[1].packing
    with pytest.raises(UserError):
        sft.parse_options(["--data", "x", "--outdir", "y", "--packing", "true"])
