"""Fetch the checkpoints that a run reads, and no more, at the locked commits, and verify them.

    python scripts/fetch.py                                       for the documented command, configs/flux_dev.yaml
    python scripts/fetch.py --config mine.yaml --rewards hps orm  for a trainer's YAML and flags that name checkpoints
    ... --dry_run                                                 only say what is missing, how large, which licence
    ... --update_lock                                             write into checkpoints.lock what is null there

Interrupted and run again, it goes on. What cannot fit on the disk is refused before anything is written. Each file is
compared with checkpoints.lock, and with the size and hash that the hub publishes; nothing is ever deleted. HF_TOKEN
gives access to repositories whose licence must be accepted; HF_HUB_CACHE or HF_HOME say where files go.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers, filter_repo_objects

from data.text import read_yaml
from errors import Stopped, UserError, one_line
from models import weights
from models.hub import READ, base_of, is_adapter
from models.weights import Checkpoint
from rewards import CHECKPOINTS, RewardOptions, check
from run.files import atomic_write, size_text
from run.options import config_path, option, parse_known, run_main

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "flux_dev.yaml"
DEFAULTS = {"gpt_path": "Qwen/Qwen2.5-3B-Instruct", "sdmodel_name": "black-forest-labs/FLUX.1-dev", "held_out": []}


@dataclass(frozen=True)
class Wanted:
    """A repository that a run reads, at the commit `sha`: what it is for, its entry in the lock, its files."""

    use: str
    known: Checkpoint
    licence: str
    sha: str
    files: tuple[RepoSibling, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        missing = 0
        for file in self.files:
            if not isinstance(try_to_load_from_cache(self.known.repo, file.rfilename, revision=self.sha), str):
                part = self.part(file) if file.lfs else None
                missing += file.size - (part.stat().st_size if part and part.exists() else 0)
        return missing

    def part(self, file: RepoSibling) -> Path:
        """Where a large file grows until it is complete: beside where the hub's cache keeps its content."""
        folder = repo_folder_name(repo_id=self.known.repo, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder, "blobs", f"{file.lfs.sha256}.part")


@dataclass
class FetchOptions:
    """What to do, and the trainer's options that name checkpoints; unset ones are as in its YAML."""

    dry_run: bool = option(False, "Fetch nothing.", changes="nothing")
    update_lock: bool = option(False, "Fill in checkpoints.lock what is null there.", changes="nothing")
    gpt_path: str | None = option(None, "As for the trainer.", changes="run")
    model_revision: str | None = option(None, "As for the trainer.", changes="run")
    sdmodel_name: str | None = option(None, "As for the trainer.", changes="run")
    rewards: list[str] = option([], "As for the trainer.", changes="run")
    held_out: list[str] = option([], "As for the trainer.", changes="run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("fetch", lambda: fetch_all(parse_options(sys.argv[1:] if argv is None else argv)))


def parse_options(argv: Sequence[str]) -> dict[str, Any]:
    """What the trainer would read of the same command: defaults < recipe < --config < flags."""
    own, reward, others = parse_known((FetchOptions, RewardOptions), argv)
    config = config_path(argv)
    if unknown := [word for word in others if word not in ("--config", config, f"--config={config}")]:
        raise UserError(f"unknown argument {unknown[0]!r}: give --config and the flags that name checkpoints")
    given = {name: value for name, value in vars(own).items() if value not in (None, [])}
    given |= {name: path for name, path in vars(reward).items() if name.endswith("_path") and path is not None}
    options = dict(DEFAULTS)
    for path in filter(None, (RECIPE, config)):
        options |= read_yaml(path)
    return options | given


def fetch_all(options: Mapping[str, Any]) -> None:
    """Say what the options name and how much of it is missing, then fetch and verify it."""
    wanted = [_ask(use, known) for use, known in named(options)]
    for one in wanted:
        sizes = f"{size_text(one.size)}, {size_text(one.missing)} to fetch"
        print(f"{one.use}: {one.known.repo}, {sizes}, licence: {one.licence}")
    check_room(sum({one.known.repo: one.missing for one in wanted}.values()))
    if options["dry_run"]:
        return
    for one in wanted:
        fetch(one)
    if options["update_lock"]:
        update_lock(wanted)
    print("everything is here and as it should be")


def named(options: Mapping[str, Any]) -> Iterator[tuple[str, Checkpoint]]:
    """What each repository is for, and the lock's entry of it; what is named by a path must be on this disk."""
    rewards = [*options["rewards"], *options["held_out"]]
    check(rewards, RewardOptions())
    policy, revision = options["gpt_path"], options.get("model_revision")
    if is_adapter(policy):
        policy, revision = base_of(policy, revision)
    uses = [("policy", policy)]
    if "://" not in options["sdmodel_name"]:  # servers have their own
        uses.append(("renderer", options["sdmodel_name"]))
    for reward in rewards:
        own = options.get(f"{reward}_path")
        uses += [(reward, own)] if own else [(reward, repo) for repo in CHECKPOINTS.get(reward, ())]
    for use, path in uses:
        if Path(path).exists():
            print(f"{use}: {path}, on this disk")
        elif path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(f"{use}: no file or folder {path!r}, and it is not a hub name (owner/name)")
        elif use == "policy" and revision not in (None, "main"):
            yield use, Checkpoint(path, weights.locked(path).licence, revision=revision)
        else:
            yield use, weights.locked(path)


def _ask(use: str, known: Checkpoint) -> Wanted:
    """Ask the hub what it has of a repository, and whether this user may have it."""
    with _explained(known.repo):
        info = HfApi().model_info(known.repo, revision=known.revision, files_metadata=True)
        if info.gated:
            HfApi().auth_check(known.repo)
    files = list(filter_repo_objects(
        info.siblings, allow_patterns=known.include or READ, ignore_patterns=known.exclude, key=lambda f: f.rfilename
    ))  # fmt: skip
    if not known.include and any(file.rfilename == "model_index.json" for file in files):
        # a pipeline reads neither the weights that lie beside its index, all in one, nor those in another precision
        second = re.compile(r"[^/]+\.safetensors|.+\.fp16.*\.safetensors")
        files = [file for file in files if not second.fullmatch(file.rfilename)]
    if any(file.rfilename.endswith(".safetensors") for file in files):
        files = [file for file in files if not file.rfilename.endswith(".bin")]
    licence = known.licence or str((info.card_data or {}).get("license", "not stated"))
    return Wanted(use, known, licence, info.sha, tuple(files))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what a request to the hub can come to into a sentence with what to do."""
    try:
        yield
    except (RepositoryNotFoundError, OfflineModeIsEnabled) as error:  # the first is also raised for a gated one
        raise UserError(
            f"{repo}: {one_line(error)}; check the name, accept its licence at {constants.ENDPOINT}/{repo}, give a "
            "token of that account as HF_TOKEN, and unset HF_HUB_OFFLINE"
        ) from error
    except (OSError, httpx.HTTPError) as error:  # a lost connection, a full disk
        raise Stopped(f"{repo}: {one_line(error)}; run the same command again, it goes on where it stopped") from error


def check_room(needed: int) -> None:
    """Say how much is to be fetched and how much is free. Stopped if it cannot fit."""
    place = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    print(f"to fetch: {size_text(needed)}; free in {constants.HF_HUB_CACHE}: {size_text(free)}", flush=True)
    if needed > free:
        raise Stopped(f"{size_text(needed)} do not fit: make room, or set HF_HUB_CACHE to a folder on a larger disk")


def fetch(one: Wanted) -> None:
    """Download what is missing of a repository and verify all that is read of it."""
    for file in one.files:
        with _explained(one.known.repo):
            if file.lfs is not None:
                _fill_blob(one, file)
            path = Path(hf_hub_download(one.known.repo, file.rfilename, revision=one.known.revision or "main"))
        locked = one.known.files.get(file.rfilename, {})
        weights.check(path, locked.get("size"), locked.get("sha256"), "checkpoints.lock")
        weights.check(path, file.size, file.lfs.sha256 if file.lfs else None, "the hub")


def _fill_blob(one: Wanted, file: RepoSibling) -> None:
    """Download a large file to where the hub's cache keeps its content, going on where an earlier run stopped.

    The hub's own library goes on within one run only, and starts a file of ten gigabytes anew in the next.
    """
    part = one.part(file)
    part.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{part}.lock"):
        if part.with_suffix("").exists():
            return
        with open(part, "ab") as content:
            url = hf_hub_url(one.known.repo, file.rfilename, revision=one.sha)
            named = {"expected_size": file.size, "displayed_filename": file.rfilename}
            http_get(url, content, resume_size=content.tell(), headers=build_hf_headers(), **named)
        part.rename(part.with_suffix(""))


def update_lock(wanted: Sequence[Wanted]) -> None:
    """Fill what is null in the lock, as the hub publishes it; print each value, and change none that is there."""
    text = weights.LOCK.read_text(encoding="utf-8")
    entries = yaml.safe_load(text)
    for one in wanted:
        repo = one.known.repo
        new = {"licence": one.licence, "size": size_text(one.size), "include": list(READ), "exclude": []}
        entry = entries.setdefault(repo, {**new, "revision": None, "files": {}})
        if entry["revision"] not in (None, one.sha):
            continue  # fetched at the user's own revision
        _fill(repo, entry, {"revision": one.sha})
        for file in filter(lambda file: file.lfs, one.files):
            row = entry["files"].setdefault(file.rfilename, {"size": None, "sha256": None})
            _fill(f"{repo} {file.rfilename}", row, {"size": file.size, "sha256": file.lfs.sha256})
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    body = yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=1000)
    atomic_write(weights.LOCK, (head + body).encode())
    weights.lock.cache_clear()


def _fill(where: str, row: dict[str, Any], published: Mapping[str, Any]) -> None:
    for key, value in published.items():
        if row[key] is None:
            row[key] = value
            print(f"checkpoints.lock: {where}: {key} {value}")


if __name__ == "__main__":
    sys.exit(main())
