"""Chat templates as they are published: everybody shows the policy one conversation, and reads all of its answer."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

import r1_prompter
import sft
from errors import UserError
from inference import Reprompter
from models.policy import ChatTemplate, load_policy, load_tokenizer, sample_as_asked
from prompting import DIRECT_PROMPT, SYSTEM_PROMPT, completion, messages, parse, unreadable_because
from scoring.judge import PATIENCE
from tests.conftest import CHATML

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENS = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"  # Qwen3-Thinking
ALWAYS_OPENS = TURNS + "<|im_start|>assistant\n<think>\n"  # without asking for the generation prompt
R1 = (  # DeepSeek-R1 distills; they drop the thoughts of earlier turns
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "<|Assistant|>{{ m['content'].split('</think>')[-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SWITCHED = (  # Qwen3
    TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CLOSES = TURNS + "<|im_start|>assistant\n{{ '<think>' if thinking else '</think>' }}"  # DeepSeek-V3.1
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # 0.1: there is no generation prompt
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
DEAF = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
WRITTEN = "a red cat</think>\n<answer>a red cat on a mat</answer>"


@pytest.fixture
def templated(toy, tmp_path):
    """Makes a copy of the toy policy with another chat template."""

    def make(template: str) -> str:
        folder = shutil.copytree(toy.policy, tmp_path / "templated", dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("template", "variables", "opening"),
    [
        (CHATML, None, ""), (OPENS, None, "<think>\n"), (ALWAYS_OPENS, None, "<think>"), (R1, None, "<think>\n"),
        (SWITCHED, None, ""), (SWITCHED, {"enable_thinking": False}, ""), (SWITCHED, '{"enable_thinking": false}', ""),
        (CLOSES, {"thinking": True}, "<think>"), (CLOSES, {"thinking": False}, ""), (GEMMA, None, ""),
        (MISTRAL, None, ""), (DEAF, None, ""),
    ],
)  # fmt: skip
def test_both_texts_are_shown_and_what_the_template_writes_belongs_to_the_answer(
    templated, template, variables, opening
):
    it = ChatTemplate(load_tokenizer(templated(template), template_kwargs=variables))
    shown = it.tokenizer.decode(it.encode(messages("two dogs")))
    assert it.opening == opening and shown.index(SYSTEM_PROMPT) < shown.index("two dogs")
    answer = completion("a red cat", "a red cat on a mat")
    learnt = it.tokenizer.decode(it.encode_answer(answer), skip_special_tokens=True)
    assert parse(it.opening + learnt) == parse(answer) and shown.endswith(opening)


@pytest.mark.parametrize("template", [GEMMA, MISTRAL, DEAF])
def test_without_a_system_turn_the_instructions_stand_before_the_users_words(templated, template):
    it = ChatTemplate(load_tokenizer(templated(template)), reasoning=False)
    (turn,) = it.fit(messages("two dogs", reasoning=False))
    assert turn == {"role": "user", "content": f"{DIRECT_PROMPT}\n\ntwo dogs"}


@pytest.mark.parametrize(
    ("template", "reasoning", "named"),
    [
        ("{{ messages[0]['content'] }}", True, "request"),
        ("{{ messages[-1]['content'][:9] }}", True, "instructions|request"),
        ("{{ raise_exception('no chat') }}", True, "no chat"),
        ("{% for", True, "chat template"),
        (OPENS, False, "--reasoning"),
        (CHATML + "<answer>", True, "--reasoning"),
        (CHATML + "<think>a cat</think>", True, "--reasoning"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_it_is_loaded(templated, template, reasoning, named):
    with pytest.raises(UserError, match=named):
        ChatTemplate(load_tokenizer(templated(template)), reasoning)


@pytest.mark.parametrize("variables", ["enable_thinking", "[1]", '{"a b": 1}', "true", "{enable_thinking: false}"])
def test_variables_that_are_no_object_are_refused(toy, variables):
    with pytest.raises(UserError, match="--chat_template_kwargs"):
        load_tokenizer(str(toy.policy), template_kwargs=variables)


def test_a_tokenizer_that_drops_the_tags_is_refused(templated):
    tokenizer = load_tokenizer(templated(CHATML))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with pytest.raises(UserError, match="<think>"):
        ChatTemplate(tokenizer)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>"])
def test_a_policy_may_open_the_block_once_more(templated, opening):
    it = ChatTemplate(load_tokenizer(templated(CHATML.replace("assistant\n", f"assistant\n{opening}"))))
    for written in ("<think>\n" + WRITTEN, *([WRITTEN] if opening else [])):
        assert parse(it.whole(written)).reasoning == "a red cat"


@pytest.mark.parametrize("opens", [True, False])
def test_answers_are_read_in_rollouts_inference_and_cold_start_alike(toy, templated, tmp_path, monkeypatch, opens):
    """A policy that writes WRITTEN is always right behind a template that opens the block, and never without one."""
    path = templated(OPENS if opens else CHATML)
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy = load_policy(path, "float32", "cpu")
    ids = tokenizer.encode(WRITTEN, add_special_tokens=False) + [tokenizer.eos_token_id]
    monkeypatch.setattr(type(policy), "generate", lambda self, input_ids, **_: _followed_by(input_ids, ids))
    assert Reprompter(path, device="cpu")(["two dogs"])[0].readable == opens
    options = ["--config", str(toy.config), "--gpt_path", path, "--outdir", str(tmp_path / "run"), "--save_strategy"]
    assert r1_prompter.main([*options, "no", "--max_steps", "1", "--max_completion_length", "99"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert {row["rewrite"] is not None for row in rows} == {opens}
    template = ChatTemplate(load_tokenizer(path))
    row = sft.tokens(sft.Example("two dogs", completion("a red cat", "a red cat on a mat")), template)
    learnt = tokenizer.decode([label for label in row["labels"] if label != -100], skip_special_tokens=True)
    assert (learnt == WRITTEN) == opens
    assert tokenizer.decode(row["input_ids"]).count("<think>\n" if opens else "<think>a") == 1


def _followed_by(input_ids, ids):
    return input_ids.new_tensor([[*row, *ids] for row in input_ids.tolist()])


def test_the_variables_of_a_run_are_in_its_saved_template(toy, templated, tmp_path):
    path, run = templated(SWITCHED), tmp_path / "run"
    given = ["--chat_template_kwargs", '{"enable_thinking": false}']
    options = ["--config", str(toy.config), "--gpt_path", path, "--outdir", str(run), "--max_steps", "1", *given]
    assert r1_prompter.main(options) == 0
    shown = [
        tokenizer.apply_chat_template(messages("two dogs"), tokenize=False, add_generation_prompt=True)
        for tokenizer in (load_tokenizer(str(run)), load_tokenizer(path, template_kwargs=given[1]))
    ]
    assert shown[0] == shown[1] and shown[0].endswith("<think>\n\n</think>\n\n")


def test_generation_fields_of_a_checkpoint_do_not_reach_the_rollouts(toy, templated, tmp_path):
    path = templated(CHATML)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.update(min_new_tokens=40, no_repeat_ngram_size=2, bad_words_ids=[[5]], eos_token_id=[1, 2])
    sample_as_asked(model, GRPOConfig(output_dir=str(tmp_path), temperature=0.7, use_cpu=True, bf16=False))
    kept = model.generation_config
    assert (kept.min_new_tokens, kept.no_repeat_ngram_size, kept.bad_words_ids) == (None, None, None)
    assert (kept.eos_token_id, kept.temperature, kept.do_sample) == ([1, 2], 0.7, True)


@pytest.mark.parametrize("config", [{}, {"use_peft": True}])
def test_rollouts_may_be_shorter_than_the_checkpoints_least_length(toy, templated, tmp_path, config):
    path = templated(CHATML)
    fields = json.loads((tmp_path / "templated/generation_config.json").read_text()) | {"min_new_tokens": 40}
    (tmp_path / "templated/generation_config.json").write_text(json.dumps(fields))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(toy.config.read_text()) | config))
    run = ["--config", str(tmp_path / "run.yaml"), "--gpt_path", path, "--outdir", str(tmp_path / "run")]
    assert r1_prompter.main([*run, "--max_steps", "1", "--save_strategy", "no"]) == 0
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert row["completions/min_length"] < 40


def test_a_run_in_which_nothing_can_be_read_stops_and_says_why(toy, templated, tmp_path, capsys):
    options = ["--config", str(toy.config), "--outdir", str(tmp_path / "run"), "--max_completion_length", "3"]
    assert r1_prompter.main([*options, "--max_steps", "9"]) == 1
    assert "no </think>" in capsys.readouterr().err
    assert len(list((tmp_path / "run/rollouts").iterdir())) == PATIENCE


@pytest.mark.parametrize(
    ("text", "reasoning", "why"),
    [
        ("a cat", True, "no <think>"),
        ("<think>x</think><answer>y", True, "no </answer>"),
        ("<think>x</think><answer>y</answer>", False, "more tags"),
        ("<think>x</think><answer>y</answer> done", True, "outside"),
        ("<answer> </answer>", False, "blank"),
    ],
)
def test_an_unreadable_answer_is_explained(text, reasoning, why):
    assert parse(text, reasoning) is None and why in unreadable_because(text, reasoning)
