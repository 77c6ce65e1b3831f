"""Claims about scripts/fetch.py, in front of a real HTTP server that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

import r1_prompter
from errors import UserError
from models import weights
from models.policy import load_policy
from scripts import fetch
from tests.hub_server import COMMIT, Hub, Repo

WEIGHTS = bytes(range(256)) * 800  # 204,800 bytes
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"a pickle", "README.md": b"read me"}
RUN = ["--gpt_path", "tiny/policy", "--sdmodel_name", "miniature/weights/flux", "--rewards", "format"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model, an empty cache, and a lock of which the commit and a hash are not known."""
    served = Hub({"tiny/policy": Repo(dict(FILES))})
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is kept of a download that is cut off
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "LOCK", tmp_path / "checkpoints.lock")
    entry = {"licence": "MIT", "size": "0.2 MB", "include": ["*.json", "*.safetensors", "*.bin"], "exclude": []}
    nulls = {"revision": None, "files": {"model.safetensors": {"size": None, "sha256": None}}}
    (tmp_path / "checkpoints.lock").write_text("# a comment\n" + yaml.safe_dump({"tiny/policy": {**entry, **nulls}}))
    weights.lock.cache_clear()
    yield served
    served.shutdown()
    served.server_close()
    weights.lock.cache_clear()


def kept(tmp_path: Path) -> dict[str, bytes]:
    snapshot = tmp_path / "hub" / "models--tiny--policy" / "snapshots" / COMMIT
    return {path.name: path.read_bytes() for path in snapshot.iterdir()} if snapshot.exists() else {}


def test_what_a_run_reads_is_fetched_and_nothing_else_and_once(hub, tmp_path, capsys):
    assert fetch.main(RUN) == 0
    assert kept(tmp_path) == {name: FILES[name] for name in ("config.json", "model.safetensors")}
    said = capsys.readouterr().out
    assert "miniature/weights/flux" in said and "tiny/policy, 0.2 MB, 0.2 MB to fetch, licence: MIT" in said
    hub.fetched.clear()
    assert fetch.main(RUN) == 0
    assert not hub.fetched and "0.0 MB to fetch" in capsys.readouterr().out


def test_a_dry_run_says_what_is_missing_and_fetches_nothing(hub, tmp_path, capsys):
    assert fetch.main([*RUN, "--dry_run"]) == 0
    assert "to fetch: 0.2 MB" in capsys.readouterr().out
    assert not hub.fetched and not kept(tmp_path)


def test_a_download_that_was_cut_off_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut = 50_000
    assert fetch.main(RUN) == 1
    assert "model.safetensors" not in kept(tmp_path)
    hub.cut, hub.ranges[:] = None, []
    assert fetch.main(RUN) == 0
    assert kept(tmp_path)["model.safetensors"] == WEIGHTS
    assert hub.ranges and set(hub.ranges) <= set(range(49_000, 50_001)), "from where it had stopped"


def test_wrong_bytes_are_refused_by_name_and_kept(hub, tmp_path, capsys):
    wrong = WEIGHTS[::-1]
    hub.repos["tiny/policy"].sent["model.safetensors"] = wrong
    assert fetch.main(RUN) == 2
    said = capsys.readouterr().err
    assert all(hashlib.sha256(content).hexdigest() in said for content in (wrong, WEIGHTS))
    assert kept(tmp_path)["model.safetensors"] == wrong


def test_the_lock_is_filled_with_what_the_hub_publishes(hub, capsys):
    assert fetch.main([*RUN, "--update_lock"]) == 0
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints.lock: ")]
    assert [line.split()[-1] for line in said] == [COMMIT, "204800", digest]
    assert weights.LOCK.read_text().startswith("# a comment\n")
    known = weights.locked("tiny/policy")
    assert known.revision == COMMIT and known.files == {"model.safetensors": {"size": 204800, "sha256": digest}}


def test_a_gated_repository_is_fetched_only_with_a_token_that_has_access(hub, capsys, monkeypatch):
    hub.repos["tiny/policy"].gated = True
    assert fetch.main(RUN) == 2
    assert f"{hub.url}/tiny/policy" in capsys.readouterr().err and not hub.fetched
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_who_has_accepted")
    assert fetch.main(RUN) == 0


def test_what_cannot_fit_on_the_disk_is_refused_before_anything_is_written(hub, tmp_path, capsys):
    hub.repos["tiny/policy"].sizes["model.safetensors"] = 10**15
    assert fetch.main(RUN) == 1
    assert "1000000.0 GB" in capsys.readouterr().err
    assert not hub.fetched and not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "options",
    [["--gpt_path", "no/such"], ["--sdmodel_name", "/nowhere"], ["--rewards", "hps", "--hps_path", "/no.pt"]],
)
def test_a_checkpoint_that_is_nowhere_is_named_with_exit_code_2(hub, capsys, options):
    assert fetch.main([*RUN, *options]) == 2
    assert options[-1] in capsys.readouterr().err


def repositories(*argv: str) -> dict[str, str]:
    """What would be fetched: use -> repository."""
    return {use: known.repo for use, known in fetch.named(fetch.parse_options(argv))}


def test_the_bare_command_names_all_that_the_trainers_recipe_reads():
    trainer = r1_prompter.parse_options(["--data", "x", "--outdir", "y"])
    assert repositories() == {
        "policy": trainer.script.gpt_path,
        "renderer": trainer.render.sdmodel_name,
        "hps": "xswu/HPSv2",
        "gdino": "IDEA-Research/grounding-dino-tiny",
        "git": "microsoft/git-large-vqav2",
    }
    assert repositories("--config", "configs/miniature.yaml") == {}


def test_an_adapters_base_model_is_what_is_fetched(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-3B-Instruct"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert repositories(*RUN, "--gpt_path", str(tmp_path)) == {"policy": "Qwen/Qwen2.5-3B-Instruct"}


def test_a_run_that_downloads_loads_nothing_that_the_lock_does_not_know(hub):
    folder = Path("miniature/weights/policy")
    hub.repos["tiny/policy"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
    load_policy("tiny/policy", device="cpu")
    rows = {"revision": COMMIT, "files": {"model.safetensors": {"size": None, "sha256": "0" * 64}}}
    weights.LOCK.write_text(yaml.safe_dump({"tiny/policy": {"licence": "MIT", **rows}}))
    weights.lock.cache_clear()
    with pytest.raises(UserError, match="0" * 64):
        load_policy("tiny/policy", device="cpu")
