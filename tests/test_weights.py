"""Claims about foreign weights: nothing in them runs, nothing is loaded that the lock does not know, and the lock."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import r1_prompter
import sft
from errors import UserError
from models import weights
from models.policy import load_policy, load_tokenizer, prepare_policy, record_base_model
from models.weights import lock, locked, read_weights, verify
from rendering import RenderOptions, load_renderer
from rewards import CHECKPOINTS, RewardOptions, hps

MINIATURE = Path("miniature/weights")
COMMIT = "0123456789abcdef" * 2 + "01234567"
TENSORS = {"a": torch.arange(6.0).view(2, 3)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """What was verified is remembered for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "r1-prompter" / "verified.json"


# ----- A pickle that would run code


class Intruder:
    """Unpickled freely, this makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def prepare(path: Path) -> object:
    training = SimpleNamespace(model_init_kwargs={"revision": "main"}, trust_remote_code=False)
    return prepare_policy(str(path.parent), training, use_peft=False)


PLACES = {  # reader -> place of the pickle in a copy of the miniature's weights, the file it replaces, how it is read
    "hps": ("hps.pt", None, lambda path: hps.HPS(path, device="cpu")),
    "renderer": ("flux/transformer/diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors",
                 lambda path: load_renderer(RenderOptions(sdmodel_name=str(path.parents[1])), "cpu")),
    "policy": ("policy/pytorch_model.bin", "model.safetensors", lambda path: load_policy(str(path.parent))),
    "policy to train": ("policy/pytorch_model.bin", "model.safetensors", prepare),
    "any": ("any.pth", None, read_weights),
}  # fmt: skip


@pytest.mark.parametrize("protocol", ["zip", "raw"])
@pytest.mark.parametrize("reader", PLACES)
def test_a_pickle_that_would_run_code_is_refused_in_one_line_before_it_runs(tmp_path, reader, protocol):
    (place, replaced, load), target = PLACES[reader], tmp_path / "intruded"
    file = tmp_path / place
    if replaced is not None:
        top = place.split("/")[0]
        shutil.copytree(MINIATURE / top, tmp_path / top)
        (file.parent / replaced).unlink()
    if protocol == "zip":
        torch.save({"state_dict": Intruder(target)}, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": Intruder(target)}, protocol=2))
    with pytest.raises(UserError) as caught:
        load(file)
    assert not target.exists()
    assert "\n" not in str(caught.value) and str(file.parent) in str(caught.value)
    pickle.loads(pickle.dumps(Intruder(target)))
    assert target.exists(), "the intruder is harmless, so refusing it proves nothing"


# ----- Reading


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "old.pt"])
def test_tensors_are_read_from_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.pt")
    assert torch.equal(read_weights(path)["a"], TENSORS["a"])


def test_a_file_that_holds_anything_but_tensors_is_refused_in_one_line(tmp_path):
    save_file(TENSORS, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    torch.save({"a": "text"}, tmp_path / "text.pt")
    torch.save({"a": TENSORS}, tmp_path / "nested.pt")
    torch.save(TENSORS, tmp_path / "torn.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "torn.pt").read_bytes()[:-200])
    (tmp_path / "weights.ckpt").write_bytes(b"")
    for name in ("cut.safetensors", "absent.safetensors", "text.pt", "nested.pt", "torn.pt", "weights.ckpt"):
        with pytest.raises(UserError, match=name) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="state_dict"):
        read_weights(tmp_path / "nested.pt", under="state_dict")
    assert torch.equal(read_weights(tmp_path / "nested.pt", under="a")["a"], TENSORS["a"])


def test_a_policy_without_one_of_its_shards_is_refused_before_the_trainer_has_it(tmp_path):
    folder = Path(shutil.copytree(MINIATURE / "policy", tmp_path / "policy"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002"):
        load_tokenizer(str(folder))


# ----- The lock and hashes


@pytest.fixture
def cached(monkeypatch, tmp_path) -> Path:
    """A locked repository's file where the hub's cache keeps it: a link to a blob."""
    torch.save(TENSORS, tmp_path / "blob")
    content = (tmp_path / "blob").read_bytes()
    files = {"w.pt": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    entry = {"licence": "MIT", "size": "1 kB", "include": [], "exclude": [], "revision": COMMIT, "files": files}
    monkeypatch.setattr(weights, "LOCK", tmp_path / "lock.yaml")
    (tmp_path / "lock.yaml").write_text(yaml.safe_dump({"some/model": entry}))
    lock.cache_clear()
    path = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT / "w.pt"
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "blob")
    yield path
    lock.cache_clear()


@pytest.mark.parametrize("change", ["longer", "other bytes"])
def test_a_locked_file_that_differs_is_refused_with_what_is_found_and_expected(cached, change):
    assert torch.equal(read_weights(cached)["a"], TENSORS["a"])
    expected, content = locked("some/model").files["w.pt"], bytearray(cached.read_bytes())
    content += b"\0" if change == "longer" else b""
    content[-30] ^= 1
    cached.resolve().write_bytes(content)
    for read in (read_weights, verify, lambda path: verify(path.parent)):
        with pytest.raises(UserError, match="w.pt") as caught:
            read(cached)
        said = str(caught.value)
        assert str(expected["size" if change == "longer" else "sha256"]) in said and "\n" not in said
        assert (f"{len(content)} bytes" if change == "longer" else hashlib.sha256(content).hexdigest()) in said
    assert cached.exists()


def test_another_commit_of_a_locked_repository_is_not_compared_with_the_lock(cached):
    other = cached.parent.with_name("f" * 40)
    cached.parent.rename(other)
    (other / "w.pt").resolve().write_bytes(b"something else")
    verify(other)
    other.rename(cached.parent)
    with pytest.raises(UserError):  # while the locked one is
        verify(cached.parent)


def test_a_file_is_hashed_once_until_it_changes(cached, cache, monkeypatch):
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    for _ in range(3):
        verify(cached)
    assert len(read) == 1 and list(json.loads(cache.read_text())) == [str(cached.resolve())]
    os.utime(cached.resolve(), ns=(1, 1))
    verify(cached)
    assert len(read) == 2
    cache.write_text("torn {")
    verify(cached)
    assert len(read) == 3


DECIDES = ["config.json", "chat_template.jinja", "model.safetensors", "model-2.safetensors", "tokenizer.json"]
DECIDES += ["flux/model_index.json", "flux/scheduler/scheduler_config.json", "flux/vae/config.json"]
BESIDE = ["run.json", "summary.json", "training_args.bin", "README.md", "checkpoint-2/model.safetensors"]
BESIDE += ["flux/flux1-dev.safetensors", "flux/vae/LICENSE.txt", "flux/images/0.png"]


@pytest.mark.parametrize("place", DECIDES + BESIDE)
def test_a_fingerprint_is_of_all_that_decides_what_is_computed_and_of_nothing_else(tmp_path, place):
    folder = tmp_path / ("flux" if place.startswith("flux") else "policy")
    shutil.copytree(MINIATURE / folder.name, folder)
    assert weights.fingerprint(folder) == weights.fingerprint(MINIATURE / folder.name)
    changed = folder / place.removeprefix("flux/")
    changed.parent.mkdir(exist_ok=True)
    with changed.open("ab") as file:
        file.write(b" ")
    assert (weights.fingerprint(folder) != weights.fingerprint(MINIATURE / folder.name)) == (place in DECIDES)


def test_a_sum_beside_a_file_of_the_users_own_is_honoured(tmp_path):
    torch.save(TENSORS, tmp_path / "mine.pt")
    digest, beside = hashlib.sha256((tmp_path / "mine.pt").read_bytes()).hexdigest(), tmp_path / "mine.pt.sha256"
    beside.write_text(f"{digest}  mine.pt\n")
    assert read_weights(tmp_path / "mine.pt")
    beside.write_text(f"{'0' * 64}  mine.pt\n")
    for checked in (tmp_path / "mine.pt", tmp_path):
        with pytest.raises(UserError, match=f"SHA-256 {digest}, mine.pt.sha256 says {'0' * 64}"):
            verify(checked)
    beside.write_text("mine.pt\n")
    with pytest.raises(UserError, match="no line of sha256sum"):
        read_weights(tmp_path / "mine.pt")


def test_every_entry_of_the_lock_is_well_formed():
    for repo, known in lock().items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", repo) and known.licence and known.size and known.include
        assert known.revision is None or re.fullmatch(r"[0-9a-f]{40}", known.revision)
        for name, file in known.files.items():
            assert set(file) == {"size", "sha256"} and not name.startswith("/")
            assert file["size"] is None or file["size"] > 0
            assert file["sha256"] is None or re.fullmatch(r"[0-9a-f]{64}", file["sha256"])
            assert known.revision is not None, "a hash is of a file at a commit"


def test_every_checkpoint_that_options_and_configs_default_to_is_locked():
    named = {RenderOptions.sdmodel_name}
    named |= {
        kind.__dataclass_fields__["gpt_path"].default for kind in (r1_prompter.ScriptArguments, sft.ScriptArguments)
    }
    for config in Path("configs").glob("*.yaml"):
        options = yaml.safe_load(config.read_text())
        paths = [
            value for key, value in options.items() if key in ("gpt_path", "sdmodel_name") or key.endswith("_path")
        ]
        made = ("runs/",)  # by the commands of the file's first lines
        flat = [path for value in paths for path in (value if isinstance(value, list) else [value])]
        named |= {path for path in flat if not Path(path).exists() and not path.startswith(made)}
    assert named | {repo for repos in CHECKPOINTS.values() for repo in repos} <= set(lock())
    with_paths = {field.name.removesuffix("_path") for field in fields(RewardOptions) if field.name.endswith("_path")}
    assert with_paths == set(CHECKPOINTS)


# ----- Foreign code

PARSERS = {
    "r1_prompter": lambda *flags: r1_prompter.parse_options(flags).training,
    "sft": lambda *flags: sft.parse_options(flags)[1],
}


@pytest.mark.parametrize("program", PARSERS)
def test_foreign_code_is_trusted_at_a_full_commit_only(program):
    parse = lambda *more: PARSERS[program]("--data", "x", "--outdir", "y", *more)  # noqa: E731
    assert not parse().trust_remote_code
    for revision in ([], ["--model_revision", "v1.0"], ["--model_revision", "0123abc"]):
        with pytest.raises(UserError, match="--trust_remote_code .* full commit"):
            parse("--trust_remote_code", "true", *revision)
    training = parse("--trust_remote_code", "true", "--model_revision", COMMIT)
    assert training.trust_remote_code and training.model_init_kwargs["revision"] == COMMIT
    assert prepare_policy(str(MINIATURE / "policy"), training, use_peft=False) == str(MINIATURE / "policy")
    assert training.model_init_kwargs["trust_remote_code"] is True


def test_foreign_code_of_a_tokenizer_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    folder, ran = tmp_path / "policy", tmp_path / "ran"
    shutil.copytree(MINIATURE / "policy", folder)
    (folder / "own.py").write_text(
        f"import os\nfrom transformers import PreTrainedTokenizerFast\nos.makedirs({str(ran)!r}, exist_ok=True)\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    try:
        load_tokenizer(str(folder))
    except UserError as error:
        assert "\n" not in str(error)
    assert not ran.exists()
    load_tokenizer(str(folder), COMMIT, trust_remote_code=True)
    assert ran.exists()


# ----- By hub name


def test_a_policy_by_hub_name_is_its_folder_in_the_cache_at_the_locked_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--Qwen--Qwen2.5-3B-Instruct" / "snapshots"
    for commit in (COMMIT, locked("Qwen/Qwen2.5-3B-Instruct").revision):
        shutil.copytree(MINIATURE / "policy", repo / commit)
    training = SimpleNamespace(model_init_kwargs={"revision": COMMIT}, trust_remote_code=False)
    assert prepare_policy("Qwen/Qwen2.5-3B-Instruct", training, use_peft=False) == str(repo / COMMIT)
    training.model_init_kwargs["revision"] = "main"
    with pytest.raises(UserError, match="tokenizer.*json has .* bytes, checkpoints.lock says"):
        prepare_policy("Qwen/Qwen2.5-3B-Instruct", training, use_peft=False)


def test_an_adapter_of_a_hub_model_names_it_and_its_commit_and_not_this_machines_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--policy" / "snapshots" / COMMIT
    shutil.copytree(MINIATURE / "policy", snapshot)
    adapted = get_peft_model(load_policy(str(snapshot), device="cpu"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    record_base_model(adapted, "some/policy", COMMIT)
    adapted.save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert isinstance(load_policy(str(tmp_path / "adapter"), device="cpu"), PeftModel)
    load_tokenizer(str(tmp_path / "adapter"))
