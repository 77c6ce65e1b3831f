"""Claims about README, RESULTS and docs/: no flag, file or link is named that is not there."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from trl import GRPOConfig, ModelConfig, SFTConfig

from miniature.judge_server import FAULTS
from tests.test_house import ROOT, tracked

PAGES = [page for page in tracked("*.md") if page != "docs/log.md"]  # the log names what has left
FOREIGN = re.compile(r"\b(vllm|sglang|transformers serve|uv pip|pip|npm|hf|curl|SBATCH|accelerate launch --num)\b")
OURS = re.compile(r"(?m)^ +(\w+): [^=\n]+ = \w*option\(|add_argument\(\s*\"--([\w-]+)\"|\"--([\w-]+)\"|--(\w[\w-]+)")
THEIRS = {field.name for kind in (GRPOConfig, SFTConfig, ModelConfig) for field in fields(kind)}
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]+)")
LATER = ("runs/", "models/smollm2")  # what commands make
FILE = re.compile(r"`?((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|sh|md|lock|toml|png|json))\b")


def options() -> set[str]:
    sources = [(ROOT / path).read_text(encoding="utf-8") for path in tracked("*.py", "*.sh", "Makefile")]
    return (
        THEIRS
        | FAULTS.keys()
        | {name.replace("-", "_") for text in sources for groups in OURS.findall(text) for name in groups if name}
    )


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known, missing = options(), []
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if not FOREIGN.search(line):
            missing += [flag for flag in FLAG.findall(line) if flag.replace("-", "_") not in known]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (folder / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if page.startswith("docs/"))])
def test_files_of_ours_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    ours = {path.split("/")[0] for path in tracked("*") if "/" in path}
    named = {name for name in FILE.findall(text) if name.split("/")[0] in ours and not name.startswith(LATER)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
