"""From the path of a folder, or a hub name, to a checked folder on this disk: the one way to other people's models.

A hub name stands for its folder in the hub's cache, at the commit that `checkpoints.lock` names or at the user's
`revision`. The policy and the renderer are downloaded if they must be. Frozen judges never are, because gigabytes for
eight processes are a person's decision; the error names the command, the size and the licence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from errors import UserError, one_line
from models.weights import absent_shards, check_folder, fingerprint, locked
from run.files import Contents

READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.py")  # of a model that is not locked
OLD_JANUS = "multi_modality"  # model_type of its authors' own files
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Download = Callable[[str, str | None], str]  # (hub name, revision) -> folder in the hub's cache


def resolve(
    path: str | Path,
    needs: Sequence[str],
    *,
    revision: str | None = None,
    pickles: bool = False,
    download: Download | None = None,
) -> Path:
    """The folder at `path`, or of the hub name `path`, with all files `needs`, checked by `weights.check_folder`.

    Args:
        needs: names of files; the first tells whether the hub's cache has the model.
        revision: of a hub name; None or "main" is the locked one.
        pickles: whether weights may be there as a pickle alone; only for models that are loaded by `frozen.load`.
        download: fetches what the cache lacks; None never asks the network.

    Raises:
        UserError: there is no such model, it lacks a file, or its weights are damaged, unsafe or not as locked.
    """
    path, hint = str(path), "name the folder that holds them"
    if Path(path).is_dir():
        folder = Path(path)
    elif HUB_NAME.fullmatch(path):
        folder = _of_the_hub(
            path, needs[0], locked(path).revision if revision in (None, "main") else revision, download
        )
        hint = f"run `{locked(path).command}`"
    else:
        raise UserError(f"no such folder: {path}. Give a folder with {needs[0]}, or a hub name (owner/name)")
    if missing := [name for name in needs if not (folder / name).is_file()]:
        raise UserError(f"{folder} has no {', '.join(missing)}: {hint}")
    check_folder(folder, pickles)
    return folder


def _of_the_hub(repo: str, marker: str, revision: str | None, download: Download | None) -> Path:
    """The folder of `repo` in the hub's cache. If the hub cannot be reached, what the cache has must do."""
    cached = try_to_load_from_cache(repo, marker, revision=revision)
    folder = Path(cached).parent if isinstance(cached, str) else None
    if folder and (download is None or (any(folder.glob("*.safetensors")) and not absent_shards(folder))):
        return folder
    problem = "nothing is downloaded unasked"
    if download is not None:
        try:
            HfApi().model_info(repo, revision=revision, timeout=10)  # at once, not five attempts for each file
            return Path(download(repo, revision))
        except (OSError, httpx.HTTPError) as error:
            problem = f"the hub does not give it ({one_line(error)})"
    if folder:
        return folder
    known = locked(repo)
    about = f" ({known.size}, {known.licence})" if known.size else ""
    raise UserError(
        f"{repo}{about}: no such folder, not in the Hugging Face cache, and {problem}: run `{known.command}`"
    )


def on_disk(path: str) -> Path | None:
    """The file or folder at `path`, or that of a hub name (and a file of it) in the local cache; None if none is."""
    if Path(path).exists():
        return Path(path)
    repo, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    try:
        found = Path(snapshot_download(repo, revision=locked(repo).revision, local_files_only=True), file)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return found if found.exists() else None


def contents_of(paths: Mapping[str, str | Path]) -> Contents:
    """What the models at `paths`, by option, hold; UserError if one is not on this disk."""
    found = {}
    for option, path in paths.items():
        if (place := on_disk(str(path))) is None:
            raise UserError(f"--{option} {path} is not on this disk: correct it, or run `{locked(str(path)).command}`")
        found[option] = (str(path), fingerprint(place))
    return found


def read(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` without network; UserError if that fails: no such files, or a damaged one."""
    try:
        found = kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers lets through whatever its readers raise on damaged files
        raise UserError(f"cannot read {folder} as {kind.__name__} ({one_line(error)}): fetch it again") from error
    return let_count(found)


def let_count(part: Any) -> Any:
    """`part`; a tokenizer no longer foretells "indexing errors" for a long text, because its users cut the text."""
    tokenizer = part.tokenizer if isinstance(part, ProcessorMixin) else part
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return part


def model_type(folder: Path) -> str:
    """What `config.json` of a folder says that it is; "" if it says nothing."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def is_janus(path: str) -> bool:
    """Whether there is a Janus on this disk, in transformers' layout or its authors'."""
    folder = on_disk(path)
    return folder is not None and model_type(folder) in ("janus", OLD_JANUS)


def is_adapter(path: str) -> bool:
    """Whether `path` is the folder of a PEFT adapter."""
    return Path(path, "adapter_config.json").is_file()


def base_of(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """The base model of the adapter at `path`, and its revision: the user's, else the adapter's."""
    try:
        config = PeftConfig.from_pretrained(path)
        return config.base_model_name_or_path, config.revision if revision in (None, "main") else revision
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"bad adapter_config.json in {path!r}: {one_line(error)}; save it again") from error
