"""Claims about what a fresh clone is made of: pins, configurations, scripts."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", LOCK, flags=re.M))


def test_what_is_installed_is_what_the_lock_says():
    names = ("torch", "torchvision", "transformers", "trl", "accelerate", "deepspeed", "diffusers", "peft")
    assert {name: version(name).split("+")[0] for name in names} == {name: PINS[name] for name in names}


def test_every_direct_dependency_is_locked_and_agrees_with_its_own_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for dependency in project["dependencies"] + extras["dev"] + extras["serve"]:
        name, _, pin = dependency.partition(";")[0].strip().partition("==")
        name = re.split(r"[<>=[]", name)[0].lower().replace("_", "-")
        assert name in PINS, f"{name} is not in requirements.lock: run make lock"
        assert not pin or PINS[name] == pin


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    conda, pip = [d for d in environment["dependencies"] if isinstance(d, str)], environment["dependencies"][-1]["pip"]
    assert conda == ["python=3.11", "pip"]
    assert pip == ["-r requirements.lock"]


def test_no_committed_file_names_a_package_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [
        f for f in files if Path(f).suffix in {".lock", ".toml", ".yaml", ".txt", ".sh", ""} and (ROOT / f).is_file()
    ]
    assert "requirements.lock" in texts
    for file in texts:
        assert not re.search(r"/simple\b|index.url", (ROOT / file).read_text(errors="ignore")), file


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_every_shell_script_parses(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
