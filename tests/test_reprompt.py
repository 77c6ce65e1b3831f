"""scripts/reprompt.py on a tiny Qwen2 with a byte-level tokenizer: a random one, and one that learnt one answer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from errors import UserError
from inference import Reprompter
from interfaces import Prompt
from models.policy import load_policy, load_tokenizer, policy_contents
from prompting import completion, messages
from run.seeds import render_seed
from scripts import reprompt
from scripts.reprompt import main

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["a cat", "two dogs", "a red cup", "a cup", "a blue bird on a box", "one cow", "a", "a hat"]
ODD = ["x" * 100_000, "a cat 😀🎨", "قطة حمراء", "\x00 \x07 \x1b[31m", "\ud800 half", "", "<|im_end|>", "<think>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>", "<answer>", "</answer>")])
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_policy(folder: Path, answer: str | None) -> str:
    """A random policy, or one trained to say `answer` to each of TEXTS."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    policy = Qwen2ForCausalLM(config)
    if answer is not None:
        teach(policy, tokenizer, answer)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def teach(policy: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    target = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(160):
        text = TEXTS[step % len(TEXTS)]
        prompt = tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        policy(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def random_policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("random"), None)


@pytest.fixture(scope="module")
def trained_policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("trained"), completion("red it is", "a red cat"))


@pytest.fixture
def job(tmp_path, random_policy):
    """Arguments of a run, less its --out."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*TEXTS, "a cat", "a cat 😀"]) + "\n", encoding="utf-8")
    return ["--data", str(prompts), "--gpt_path", random_policy, "--max_new_tokens", "12", "--device", "cpu"]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rewrites.jsonl").read_text(encoding="utf-8").splitlines()]


# --- rewriting ---------------------------------------------------------------------------------------------------


def test_a_trained_policy_is_read(trained_policy):
    rewrite = Reprompter(trained_policy, max_new_tokens=40, device="cpu")(["two dogs"])[0]
    assert (rewrite.readable, rewrite.prompt) == (True, "two dogs")
    assert (rewrite.reasoning, rewrite.rewrite) == ("red it is", "a red cat")
    assert rewrite.completion_tokens == len("red it is\na red cat") + 4 + 1  # four tags, end token
    assert "im_end" not in rewrite.completion


def test_an_unreadable_answer_falls_back_to_the_users_prompt_and_is_counted(job, tmp_path, capsys):
    assert main([*job, "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert all(not row["readable"] and row["rewrite"] == row["prompt"] and row["reasoning"] == "" for row in rows)
    assert f"{len(rows)} of {len(rows)} fell back" in capsys.readouterr().out


def test_odd_prompts_come_through_and_keep_their_order(random_policy):
    rewrites = Reprompter(random_policy, max_new_tokens=2, device="cpu")(ODD)
    assert [rewrite.prompt for rewrite in rewrites] == ODD
    for rewrite in rewrites:
        rewrite.rewrite.encode("utf-8")


def test_greedy_output_is_the_same_for_every_batch_size(random_policy):
    one, three, eight = (
        Reprompter(random_policy, batch_size=size, max_new_tokens=40, device="cpu", dtype="float32")(TEXTS)
        for size in (1, 3, 8)
    )
    assert one == three == eight
    assert len({rewrite.completion for rewrite in one}) > 1  # the policy does read the prompt


def test_batches_of_mixed_lengths_are_full_and_rewrite_as_prompts_alone_do(random_policy):
    texts = [f"{'very ' * (number % 7)}red cat {number}" for number in range(23)]
    alone, full, exact = (
        Reprompter(random_policy, size, max_new_tokens=12, device="cpu", dtype="float32", exact=is_exact)
        for size, is_exact in ((1, False), (8, False), (8, True))
    )
    assert alone(texts) == full(texts) == exact(texts)
    inputs = [full.policy.encode(messages(text)) for text in texts]
    assert [len(batch) for batch in full.policy.batches(inputs)] == [8, 8, 7]
    assert all(len({len(inputs[i]) for i in batch}) == 1 for batch in exact.policy.batches(inputs))


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(random_policy):
    def sample(seed: int) -> list:
        return Reprompter(random_policy, max_new_tokens=12, temperature=1.0, seed=seed, device="cpu")(TEXTS)

    before = torch.get_rng_state()
    first, again, other = sample(0), sample(0), sample(1)
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


# --- the run folder ----------------------------------------------------------------------------------------------


def test_duplicates_are_rewritten_once_and_rows_keep_the_order_of_the_file(job, tmp_path):
    assert main([*job, "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["prompt"] for row in rows] == [*TEXTS, "a cat 😀"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert [row["id"] for row in rows] == [Prompt(row["prompt"]).id for row in rows]


@pytest.mark.parametrize("temperature", ["0", "1.0"])
def test_continuing_after_a_kill_gives_the_uninterrupted_file(job, tmp_path, temperature):
    out = tmp_path / "out"
    job = [*job, "--out", str(out), "--temperature", temperature, "--rewrite_batch_size", "3"]
    assert main(job) == 0
    whole = (out / "rewrites.jsonl").read_bytes()
    for cut in (0, 1, len(whole) // 3, len(whole) // 2, whole.index(b"\n") + 1, len(whole) - 1):
        (out / "rewrites.jsonl").write_bytes(whole[:cut])
        assert main(job) == 0
        assert (out / "rewrites.jsonl").read_bytes() == whole, cut


def test_rows_already_there_are_not_redone(job, tmp_path, monkeypatch, capsys):
    assert main([*job, "--out", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(reprompt, "Reprompter", None)  # a finished run does not even load the policy
    assert main([*job, "--out", str(tmp_path / "out")]) == 0
    assert "0 prompts rewritten, 9 were there" in capsys.readouterr().out


def test_continuing_with_other_options_or_prompts_is_refused_and_names_them(job, tmp_path, capsys):
    job = [*job, "--out", str(tmp_path / "out")]
    assert main(job) == 0
    assert main([*job, "--rewrite_batch_size", "2"]) == 0  # greedy rows do not depend on it
    assert main([*job, "--seed", "7"]) == 2
    assert "seed" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("something else\n")
    assert main(job) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "chat_template.jinja", "config.json", "base", "no record"])
def test_another_model_behind_the_same_path_is_refused_with_both_fingerprints(job, tmp_path, capsys, file):
    folder = base = Path(shutil.copytree(job[3], tmp_path / "policy"))
    if file == "base":
        folder, adapted = tmp_path / "adapter", get_peft_model(load_policy(str(base)), LoraConfig(r=2))
        adapted.save_pretrained(folder)
    job = [*job, "--gpt_path", str(folder), "--out", str(tmp_path / "out")]
    record = tmp_path / "out" / "settings.json"
    assert main(job) == 0
    for path in base.iterdir():
        path.touch()  # as a copy does
    (folder / "README.md").write_text("changes nothing")
    assert main(job) == 0
    Path(shutil.copytree(folder, tmp_path / "moved"))
    (tmp_path / "link").symlink_to("moved")
    assert main([*job, "--gpt_path", str(tmp_path / "link")]) == 0
    was = json.loads(record.read_text())["contents"]
    if file == "no record":
        record.write_text(json.dumps({**json.loads(record.read_text()), "contents": {}}))
    else:
        changed = base / {"base": "model.safetensors"}.get(file, file)
        states = os.stat(changed)
        changed.write_bytes(changed.read_bytes()[:-1] + b" ")
        os.utime(changed, ns=(states.st_atime_ns, states.st_mtime_ns))  # as rsync does
    rows = (tmp_path / "out" / "rewrites.jsonl").read_bytes()
    capsys.readouterr()
    assert main(job) == 2
    now, said = policy_contents(str(folder)), capsys.readouterr().err
    name = "base of gpt_path" if file == "base" else "gpt_path"
    assert said.count("\n") == 1 and now[name][0] in said and now[name][1] in said
    assert file == "no record" or (was[name][1] in said and was[name][1] != now[name][1])
    assert (tmp_path / "out" / "rewrites.jsonl").read_bytes() == rows


def test_rows_without_a_record_of_their_options_are_not_mixed_with_new_ones(job, tmp_path):
    (tmp_path / "rewrites.jsonl").write_text('{"id": "1"}\n')
    assert main([*job, "--out", str(tmp_path)]) == 2


# --- pictures ----------------------------------------------------------------------------------------------------


def test_a_wrong_renderer_path_keeps_the_rewrites_and_says_what_is_missing(job, tmp_path, capsys):
    job = [*job, "--out", str(tmp_path / "out")]
    assert main([*job, "--sdmodel_name", str(tmp_path / "nothing")]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out")) == 9
    assert main(job) == 0


class ColourRenderer:
    """A flat colour from text and seed; cannot draw a text with "two" in it while `broken`."""

    broken = True

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []

    def __call__(self, texts, seeds):
        self.rows += zip(texts, seeds, strict=True)
        return [
            None if self.broken and "two" in text else Image.new("RGB", (4, 4), (len(text), seed % 256, 0))
            for text, seed in zip(texts, seeds, strict=True)
        ]


@pytest.fixture
def renderer(monkeypatch):
    renderer = ColourRenderer()
    monkeypatch.setattr(reprompt, "load_renderer", lambda options, device: renderer)
    return renderer


def test_pictures_share_seeds_with_the_baseline_and_failures_are_null(job, tmp_path, renderer, capsys):
    out = tmp_path / "out"
    job = [*job, "--out", str(out), "--sdmodel_name", "miniature/weights/flux", "--samples", "2", "--baseline"]
    assert main(job) == 0
    rows = rows_of(out)
    cat, dogs = rows[0], rows[1]
    assert cat["images"] == [f"000000_{cat['id'][:8]}_{i}.png" for i in (0, 1)]
    assert cat["baseline_images"] == [f"000000_{cat['id'][:8]}_{i}_raw.png" for i in (0, 1)]
    assert dogs["images"] == dogs["baseline_images"] == [None, None]
    assert "32 pictures drawn, 4 could not be drawn" in capsys.readouterr().out
    for names in (cat["images"], cat["baseline_images"]):
        greens = [Image.open(out / name).getpixel((0, 0))[1] for name in names]
        assert greens == [render_seed(0, cat["id"], 0, image) % 256 for image in (0, 1)]
    assert len(list(out.glob("*.png"))) == 32 and not list(out.glob(".*"))


def test_continuing_draws_only_what_is_missing(job, tmp_path, renderer):
    out = tmp_path / "out"
    assert main([*job, "--out", str(out)]) == 0
    job = [*job, "--out", str(out), "--sdmodel_name", "miniature/weights/flux"]  # pictures may be added to rewrites
    assert main(job) == 0
    lost = out / rows_of(out)[3]["images"][0]
    lost.unlink()
    renderer.rows.clear()
    renderer.broken = False
    assert main(job) == 0
    assert [text for text, _ in renderer.rows] == ["two dogs", "a cup"]
    assert lost.exists() and None not in [name for row in rows_of(out) for name in row["images"]]
    assert main([*job, "--samples", "2"]) == 2


# --- loading


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-3B-Instruct", "/no/such/folder"])
def test_a_wrong_model_path_is_exit_code_2_and_leaves_nothing_that_blocks_the_next_run(
    job, tmp_path, monkeypatch, capsys, path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty cache"))
    assert main([*job, "--out", str(tmp_path / "out"), "--gpt_path", path]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and path in error
    assert main([*job, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("file, content", [("config.json", b"{}"), ("model.safetensors", b"\x10\x00")])
def test_a_damaged_model_folder_is_a_one_line_error(random_policy, tmp_path, file, content):
    shutil.copytree(random_policy, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_policy(str(tmp_path), device="cpu")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_chat_template_is_refused(random_policy, tmp_path):
    tokenizer = load_tokenizer(random_policy)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(Path(random_policy, "config.json").read_bytes())
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(tmp_path))


def test_an_adapter_folder_loads_with_its_base_and_changes_the_policy(random_policy, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(load_policy(random_policy, device="cpu"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0)
    adapted.save_pretrained(tmp_path)
    base, other = (Reprompter(path, max_new_tokens=8, device="cpu")(TEXTS) for path in (random_policy, str(tmp_path)))
    assert base != other
