"""Fetch what a run needs, and no more: the checkpoints that its options name, at the locked commits, verified.

    python scripts/fetch.py                                       for the documented command, configs/flux_dev.yaml
    python scripts/fetch.py --config mine.yaml --rewards hps orm  any option of r1_prompter.py
    ... --dry_run                                                 only say what, how large, under which licence
    ... --update_lock                                             write into checkpoints.lock what is null there

Prints a table first, and refuses to start what cannot fit on the disk. Interrupted and run again, it goes on. Each
file is compared with checkpoints.lock, and with the size and hash that the hub publishes; nothing is ever deleted.
What the options name by a path of this disk is only looked for. HF_TOKEN gives access to repositories whose licence
must be accepted, HF_HUB_CACHE or HF_HOME say where files go.

Exit code 0: all is there and right. 1: it cannot be had (network, access, disk, a wrong file). 2: wrong options.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers, filter_repo_objects

from errors import UserError
from models import weights
from models.policy import READ, base_of, is_adapter
from models.weights import Checkpoint
from r1_prompter import Options, parse_options
from rewards import CHECKPOINTS, check
from run.files import atomic_write


@dataclass(frozen=True)
class Wanted:
    """A repository that a run reads.

    Attributes:
        uses: what for: "policy", "renderer", or a reward.
        known: what the lock says of it, with the revision that is to be fetched.
        info: what the hub says of it.
        files: those of its files that are read.
        barred: whether this user has yet to accept its licence.
    """

    uses: str
    known: Checkpoint
    info: ModelInfo
    files: tuple[RepoSibling, ...]
    barred: bool

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        return sum(file.size - self._here(file) for file in self.files)

    def _here(self, file: RepoSibling) -> int:
        if isinstance(try_to_load_from_cache(self.known.repo, file.rfilename, revision=self.info.sha), str):
            return file.size
        part = self.part(file) if file.lfs is not None else None
        return part.stat().st_size if part is not None and part.exists() else 0

    def part(self, file: RepoSibling) -> Path:
        """Where a large file grows until it is whole: beside where the hub's cache keeps its content."""
        folder = repo_folder_name(repo_id=self.known.repo, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder, "blobs", f"{file.lfs.sha256}.part")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Fetch and verify the checkpoints that a run names; all other flags are r1_prompter.py's.",
        allow_abbrev=False,
    )
    parser.add_argument("--dry_run", action="store_true", help="print the table and fetch nothing")
    parser.add_argument("--update_lock", action="store_true", help="fill in checkpoints.lock what is null there")
    args, trainers = parser.parse_known_args(argv)
    try:
        options = parse_options(["--data", "DATA", "--outdir", "OUTDIR", *trainers])
        check([*options.script.rewards, *options.script.held_out], options.reward)
        wanted = [_ask(uses, known) for uses, known in named(options)]
        print(table(wanted), flush=True)
        room(wanted)
        if barred := [one.known.repo for one in wanted if one.barred]:
            raise UserError("; and ".join(map(_accept, barred)))
        if not args.dry_run:
            for one in wanted:
                fetch(one)
            if args.update_lock:
                update_lock(wanted)
            print(f"all is here and as it should be; next:\n  {_next(trainers)}")
    except UserError as error:
        print(f"fetch: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, UserError | UserError) else 2
    except KeyboardInterrupt:
        print("\nfetch: stopped; the same command goes on where it stopped", file=sys.stderr, flush=True)
        return 1
    return 0


def named(options: Options) -> Iterator[tuple[str, Checkpoint]]:
    """What each repository is for, and the lock's entry of it; what is named by a path must be on this disk.

    Raises:
        UserError: no such path.
        UserError: an adapter that does not say what it adapts.
    """
    policy, revision = options.script.gpt_path, options.model.model_revision
    if is_adapter(policy):
        policy, revision = base_of(policy, revision)
    uses = [("policy", policy), *([] if options.render.remote else [("renderer", options.render.sdmodel_name)])]
    paths = asdict(options.reward)
    for reward in dict.fromkeys([*options.script.rewards, *options.script.held_out]):
        own = paths.get(f"{reward}_path")
        uses += [(reward, own)] if own else [(reward, repo) for repo in CHECKPOINTS.get(reward, ())]
    for use, path in uses:
        if Path(path).exists():
            print(f"{use}: {path}, on this disk")
        elif path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(f"{use}: no file or folder {path!r}, and it is not a hub name (owner/name)")
        else:
            known = weights.locked(path)
            own_revision = use == "policy" and revision not in (None, "main")
            yield use, known if not own_revision else Checkpoint(path, known.licence, known.size, revision=revision)


def _ask(uses: str, known: Checkpoint) -> Wanted:
    """Ask the hub what it has of a repository, and whether this user may have it."""
    with _explained(known.repo):
        info = HfApi().model_info(known.repo, revision=known.revision, files_metadata=True)
        barred = bool(info.gated) and not _has_access(known.repo)
    pipeline = any(file.rfilename == "model_index.json" for file in info.siblings)
    files = filter_repo_objects(
        info.siblings, allow_patterns=known.include or READ, ignore_patterns=known.exclude, key=lambda f: f.rfilename
    )
    files = [file for file in files if known.include or not (pipeline and _is_second_copy(file.rfilename))]
    if any(file.rfilename.endswith(".safetensors") for file in files):
        files = [file for file in files if not file.rfilename.endswith(".bin")]
    if not files:
        raise UserError(f"{known.repo} has none of the files that are read ({', '.join(known.include or READ)})")
    return Wanted(uses, known, info, tuple(files), barred)


def _has_access(repo: str) -> bool:
    try:
        HfApi().auth_check(repo)
    except GatedRepoError:
        return False
    return True


def _accept(repo: str) -> str:
    return (
        f"{repo}: its licence must be accepted first: do so at {constants.ENDPOINT}/{repo}, and give a token of that "
        "account as HF_TOKEN (or `hf auth login`)"
    )


def _is_second_copy(name: str) -> bool:
    """Whether a diffusers pipeline does not read this file of weights: all in one, or in another precision."""
    return name.endswith(".safetensors") and ("/" not in name or ".fp16" in name)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What a request to the hub can come to, as a sentence with what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be fetched: unset it, and run this again") from error
    except GatedRepoError as error:
        raise UserError(_accept(repo)) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: the hub has no such repository, or not for this user: check the name, and HF_TOKEN if it is "
            "private"
        ) from error
    except (OSError, httpx.HTTPError) as error:  # what the hub refuses, a lost connection, a full disk
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{repo}: {said}; run the same command again, it goes on where it stopped") from error


def table(wanted: Sequence[Wanted]) -> str:
    """What, size, licence, access and whether it is here, a row for each repository."""
    rows = [("for", "checkpoint", "size", "licence", "access", "here")]
    for one in wanted:
        card = one.info.card_data or {}
        licence = one.known.licence or str(card.get("license", "not stated"))
        here = "yes" if not one.missing else "no" if one.missing == one.size else f"{_gb(one.missing)} missing"
        pinned = "" if one.known.revision else f", not locked: {one.info.sha[:8]}"
        access = "gated, not accepted yet" if one.barred else "gated, accepted" if one.info.gated else "open"
        rows.append((one.uses, f"{one.known.repo}{pinned}", _gb(one.size), licence, access, here))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def room(wanted: Sequence[Wanted]) -> None:
    """Say how much is to be fetched and how much is free. UserError if it cannot fit."""
    needed = sum({one.known.repo: one.missing for one in wanted}.values())
    place = Path(constants.HF_HUB_CACHE).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    print(f"to fetch: {_gb(needed)}; free in {constants.HF_HUB_CACHE}: {_gb(free)}", flush=True)
    if needed > free:
        raise UserError(
            f"{_gb(needed)} do not fit into the {_gb(free)} that are free in {constants.HF_HUB_CACHE}: make room, or "
            "set HF_HUB_CACHE to a folder on a larger disk"
        )


def fetch(one: Wanted) -> None:
    """Download what is missing of a repository and verify all that is read of it.

    Raises:
        UserError: it cannot be had; running again goes on.
        UserError: a file that is not what the lock or the hub says.
    """
    for file in one.files:
        with _explained(one.known.repo):
            if file.lfs is not None:
                _fill_blob(one, file)
            path = Path(hf_hub_download(one.known.repo, file.rfilename, revision=one.known.revision or "main"))
        locked = one.known.files.get(file.rfilename, {})
        weights.check(path, locked.get("size"), locked.get("sha256"), "checkpoints.lock")
        weights.check(path, file.size, file.lfs.sha256 if file.lfs else None, "the hub")
        if file.lfs is None and _git_id(path) != file.blob_id:
            raise UserError(
                f"{path} is not what the hub says (git id {file.blob_id}): delete {path.resolve()} and fetch it again"
            )


def _fill_blob(one: Wanted, file: RepoSibling) -> None:
    """Download a large file to where the hub's cache keeps its content, going on where an earlier run stopped.

    The hub's own library goes on within one run only, and starts a file of ten gigabytes anew in the next.
    """
    part = one.part(file)
    blob = part.with_suffix("")
    part.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{part}.lock"):
        if blob.exists():
            return
        with open(part, "ab") as content:
            http_get(
                hf_hub_url(one.known.repo, file.rfilename, revision=one.info.sha),
                content,
                resume_size=content.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.rfilename,
            )
        part.rename(blob)


def _git_id(path: Path) -> str:
    """The hash under which git knows a file's content, which is all that the hub publishes of a small one."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def update_lock(wanted: Sequence[Wanted]) -> None:
    """Fill what is null in the lock: commits, and sizes and hashes of the large files, as the hub publishes them.

    A value that is there is never changed; each one added is printed.
    """
    text = weights.LOCK.read_text(encoding="utf-8")
    entries = yaml.safe_load(text)
    for one in wanted:
        card = one.info.card_data or {}
        entry = entries.setdefault(
            one.known.repo,
            {"licence": str(card.get("license", "not stated")), "size": _gb(one.size), "include": list(READ),
             "exclude": [], "revision": None, "files": {}},
        )  # fmt: skip
        if entry["revision"] not in (None, one.info.sha):
            continue  # fetched at the user's own revision
        _fill(one.known.repo, entry, "revision", one.info.sha)
        for file in one.files:
            if file.lfs is not None:
                row = entry["files"].setdefault(file.rfilename, {"size": None, "sha256": None})
                _fill(f"{one.known.repo} {file.rfilename}", row, "size", file.size)
                _fill(f"{one.known.repo} {file.rfilename}", row, "sha256", file.lfs.sha256)
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    atomic_write(
        weights.LOCK, (head + yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=1000)).encode()
    )
    weights.lock.cache_clear()


def _fill(where: str, row: dict, key: str, value: str | int) -> None:
    if row[key] is None:
        row[key] = value
        print(f"checkpoints.lock: {where}: {key} {value}")


def _next(trainers: Sequence[str]) -> str:
    """The command that trains with what was fetched."""
    flags = {word.partition("=")[0] for word in trainers}
    needed = [word for flag in ("--data", "--outdir") if flag not in flags for word in (flag, "...")]
    return "accelerate launch --config_file=deepspeed_2.yaml r1_prompter.py " + shlex.join([*needed, *trainers])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
