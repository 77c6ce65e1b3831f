"""Claims about exported folders: others load them, a plain user message is enough, and nothing goes out unasked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from errors import Stopped, UserError
from inference import Reprompter, ServedPolicy
from models.policy import ChatTemplate, load_policy, load_tokenizer
from prompting import messages, parse
from scripts.export import ExportOptions, export, push, with_instructions
from scripts.reprompt import main as reprompt
from tests.processes import ENVIRONMENT, ROOT, closed_port
from tests.test_template import GEMMA, OPENS, SWITCHED

POLICY = ROOT / "miniature" / "weights" / "policy"
PROMPTS = ["a photo of three circles", "a sketch of a red square left of a cross", "a poster of a blue triangle"]


def as_run(folder: Path, outdir: Path) -> Path:
    """What a run leaves, with the weights of `folder`."""
    shutil.copytree(folder, outdir)
    config = {"gpt_path": "miniature/weights/policy", "reasoning": True, "data": "prompts.txt", "data_hash": "12"}
    record = {
        "config": {**config, "rewards": ["hps"], "sdmodel_name": "flux"}, "derived": {"optimizer_steps": 80},
        "command": "r1_prompter.py", "commit": "abc", "versions": {"torch": "2"},
    }  # fmt: skip
    (outdir / "run.json").write_text(json.dumps(record))
    rows = [{"step": step, "reward": reward, "rewards/hps/mean": reward} for step, reward in ((1, 0.5), (2, 0.75))]
    (outdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return outdir


def test_the_card_says_where_it_comes_from_what_was_measured_and_how_to_use_it(tmp_path):
    out = export(ExportOptions(str(as_run(POLICY, tmp_path / "run")), str(tmp_path / "out"), licence="mit"))
    card = (out / "README.md").read_text()
    assert 'license: "mit"' in card and "| reward | 0.5 | 0.75 |" in card and "commit: abc" in card
    assert 'pipeline("text-generation", "out")' in card and "vllm serve out" in card and "diffusers" in card
    assert not (out / "run.json").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("template", [None, OPENS, SWITCHED, GEMMA])
def test_a_plain_user_message_is_shown_as_in_training_and_a_whole_conversation_as_it_is(toy, template):
    tokenizer = load_tokenizer(str(toy.policy))
    tokenizer.chat_template = template or tokenizer.chat_template
    whole = ChatTemplate(tokenizer).encode(messages("a cat"))
    tokenizer.chat_template = with_instructions(tokenizer, True)
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "a cat"}], add_generation_prompt=True)
    assert plain["input_ids"] == whole == ChatTemplate(tokenizer).encode(messages("a cat"))


def test_a_lora_is_merged_or_kept(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load_policy(str(POLICY)), LoraConfig(r=2, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.peft_config["default"].base_model_name_or_path = str(POLICY)
    model.save_pretrained(tmp_path / "lora")
    load_tokenizer(str(POLICY)).save_pretrained(tmp_path / "lora")
    run = as_run(tmp_path / "lora", tmp_path / "run")
    merged = export(ExportOptions(str(run), str(tmp_path / "merged")))
    kept = export(ExportOptions(str(run), str(tmp_path / "kept"), adapter=True))
    ids = torch.arange(40)[None]
    want = model.eval()(ids).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, want, atol=1e-4)
    assert torch.allclose(load_policy(str(kept))(ids).logits, want, atol=1e-5)


def test_an_image_model_is_a_pipeline_or_a_lora_of_diffusers(flow_runs, tmp_path):
    whole = export(ExportOptions(str(flow_runs["full"]), str(tmp_path / "whole"), weights="ema"))
    pipe = FluxPipeline.from_pretrained(whole)
    before = next(pipe.transformer.parameters()).clone()
    lora = export(ExportOptions(str(flow_runs["lora"]), str(tmp_path / "lora")))
    pipe.load_lora_weights(str(lora))
    assert pipe.get_active_adapters() and before.isfinite().all()
    for folder in (whole, lora):
        assert (folder / "before_after.png").exists() and "text-to-image" in (folder / "README.md").read_text()


def test_what_is_no_complete_run_or_would_be_overwritten_is_refused(tmp_path):
    run = as_run(POLICY, tmp_path / "run")
    cut = as_run(POLICY, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((POLICY / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "out.partial").mkdir()
    there = sorted(tmp_path.iterdir())
    for options in (
        ExportOptions(str(tmp_path / "nothing"), str(tmp_path / "out")), ExportOptions(str(run), str(run)),
        ExportOptions(str(run), str(tmp_path / "out"), adapter=True), ExportOptions(str(cut), str(tmp_path / "out")),
        ExportOptions(str(run), str(tmp_path / "out"), weights="best"),
        ExportOptions(str(run), str(tmp_path / "out"), push_to_hub="no name"),
    ):  # fmt: skip
        with pytest.raises(UserError):
            export(options)
    assert sorted(tmp_path.iterdir()) == there


def test_nothing_is_uploaded_unasked_and_an_upload_that_breaks_off_is_said(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: calls.append(name))
    with pytest.raises(UserError, match="asks"):
        push(tmp_path, "me/mine", True)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(UserError, match="not uploaded"):
        push(tmp_path, "me/mine", True)
    assert calls == []

    def break_off(self, **_):
        raise httpx.ConnectError("gone")

    monkeypatch.setattr("builtins.input", lambda question: "y")
    monkeypatch.setattr(HfApi, "upload_folder", break_off)
    with pytest.raises(Stopped, match="not uploaded to me/mine"):
        push(tmp_path, "me/mine", True)
    assert calls == ["me/mine"]


@pytest.mark.slow
def test_a_server_of_others_serves_it_and_rewrites_by_url_are_the_local_ones(tmp_path):
    """`transformers serve` gets a plain user message; `reprompt.py --policy_url` gives the rows of the local run."""
    out, port = export(ExportOptions(str(as_run(POLICY, tmp_path / "run")), str(tmp_path / "out"))), closed_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [Path(sys.executable).with_name("transformers"), "serve", out, "--device", "cpu", "--dtype", "float32"]
    log = open(tmp_path / "log", "w")
    server = subprocess.Popen([*command, "--port", str(port)], env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        _wait_for(url)
        plain = [{"role": "user", "content": PROMPTS[0]}]
        answer = ServedPolicy(url, str(out), 1, 120).write([plain], 0, 0.0)[0].text
        local = Reprompter(str(out), max_new_tokens=120, dtype="float32", device="cpu")
        assert parse(answer).rewrite == local(PROMPTS)[0].rewrite
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        common = ["--data", str(tmp_path / "prompts.txt"), "--max_new_tokens", "120", "--dtype", "float32"]
        assert (
            reprompt([*common, "--policy_url", url, "--policy_model", str(out), "--out", str(tmp_path / "far")]) == 0
        )
        assert reprompt([*common, "--gpt_path", str(out), "--out", str(tmp_path / "near")]) == 0
        far, near = ((tmp_path / name / "rewrites.jsonl").read_text() for name in ("far", "near"))
        assert far == near
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            httpx.get(url, timeout=60)
            return
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
