"""Claims about the house (docs/design.md): imports run down its floors, in no circle; every part keeps its size."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"errors", "interfaces", "prompting", "report"},
    {"run", "data"},
    {"models", "clients", "scoring"},
    {"rendering", "rewards"},
    {"group_training", "r1_prompter", "pref_grpo", "t2i_r1", "sft", "inference"},
    {"evaluation"},
    {"doctor", "miniature"},
    {"scripts", "comfyui"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS, 1) for name in names}
# Lines of Python, blank lines and docstrings included. Larger than first planned: run (a loop for trainers without
# TRL, options that say what they change, models by contents), scoring (drawing and judging are two parts), clients
# (the judges' cache, the teacher, the reader of verdicts), report (terminals, a policy's card), rendering
# (quantisation, LoRA, other engines' servers), data (places, relations and words of an intent, the reader of other
# people's files, texts to be read), rewards (one that reads), what pref_grpo and t2i_r1 added (models/flow.py,
# trained.py, janus.py and bicot.py, rendering/trajectory.py and janus.py, scoring/progress.py, miniature/janus.py),
# evaluation (what could not be judged is counted by reason, asked again, and left out of paired means).
BUDGETS = {
    "r1_prompter": 500, "pref_grpo": 500, "t2i_r1": 500, "group_training": 400, "sft": 260, "run": 1825,
    "report": 545, "scoring": 1245, "models": 1840, "clients": 770, "rendering": 2230, "rewards": 2465, "data": 1665,
    "evaluation": 3725, "doctor": 830, "miniature": 2500, "scripts": 3750,
    "comfyui": 150,
}  # fmt: skip
WHOLE, TESTS, REWARD, BENCHMARK = 25_300, 15_400, 200, 450
LARGER = {  # imagereward builds its network here; preference holds its prompt; __init__ holds the options of all
    "rewards/gdino.py": 385, "rewards/imagereward.py": 250, "rewards/preference.py": 245, "rewards/__init__.py": 285,
    "evaluation/compbench.py": 500,
}  # fmt: skip


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split() if (ROOT / path).exists()]


FILES = [path for path in tracked("*.py") if not path.startswith("tests/")]


def lines(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def part(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported(source: str, files: set[str]) -> Iterator[str]:
    """Our own files that a source text imports, inside functions too, without what is only for type hints."""
    tree = ast.parse(source)
    hints = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            path = module.replace(".", "/")
            found = [f for f in (f"{path}/{name}.py", f"{path}.py", f"{path}/__init__.py") if f in files]
            yield from found[:1]


def arrows(files: list[str]) -> dict[str, set[str]]:
    return {path: set(imported((ROOT / path).read_text(encoding="utf-8"), set(files))) for path in files}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a part that stands on a higher floor."""
    pairs = [(one, other) for one, others in graph.items() for other in others]
    return [f"{one} -> {other}" for one, other in pairs if FLOOR[part(other)] > FLOOR[part(one)]]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import themselves by way of others."""

    def reached(path: str) -> set[str]:
        found, ahead = set(), list(graph[path])
        while ahead:
            if (one := ahead.pop()) not in found:
                found.add(one)
                ahead += graph[one]
        return found

    return sorted(path for path in graph if path in reached(path))


def test_imports_run_down_the_floors_and_in_no_circle():
    graph = arrows(FILES)
    assert upward(graph) == []
    assert circles(graph) == []


def test_a_circle_and_an_import_upwards_would_be_found(tmp_path):
    graph = {"run/a.py": {"run/b.py"}, "run/b.py": {"run/a.py", "rewards/c.py"}, "rewards/c.py": set()}
    assert circles(graph) == ["run/a.py", "run/b.py"] and upward(graph) == ["run/b.py -> rewards/c.py"]
    inside = "def f():\n    from rewards import c\n\nif TYPE_CHECKING:\n    import run.a\n"
    assert set(imported(inside, set(graph))) == {"rewards/c.py"}


def test_only_the_miniatures_own_programs_and_what_stands_above_know_it():
    knowing = {path for path, others in arrows(FILES).items() if any(part(other) == "miniature" for other in others)}
    assert {part(path) for path in knowing} <= {"miniature", "scripts"}


def test_every_part_keeps_its_budget():
    sizes = {name: sum(lines(path) for path in FILES if part(path) == name) for name in BUDGETS}
    assert {name: size for name, size in sizes.items() if size > BUDGETS[name]} == {}
    assert sum(map(lines, FILES)) <= WHOLE
    assert sum(map(lines, tracked("tests/*.py"))) <= TESTS
    limits = {f: REWARD for f in FILES if part(f) == "rewards"} | {
        f: BENCHMARK for f in FILES if part(f) == "evaluation"
    }
    limits |= LARGER
    assert {path: lines(path) for path, most in limits.items() if lines(path) > most} == {}


def test_no_file_edits_the_path_that_modules_are_found_by():
    assert [path for path in FILES if re.search(r"sys\.path\b", (ROOT / path).read_text(encoding="utf-8"))] == []


def options() -> Iterator[type]:
    import group_training
    import pref_grpo
    import r1_prompter
    import sft
    from doctor import __main__ as doctor  # noqa: F401  its flags are argparse's
    from evaluation import benchmarks, run
    from rendering import RenderOptions
    from rewards import RewardOptions
    from run.loop_options import LoopArguments
    from scoring.progress import WatchArguments
    from scripts import draw, make_sft, reprompt

    yield from (r1_prompter.ScriptArguments, sft.ScriptArguments, RenderOptions, RewardOptions)
    yield from (run.EvaluateOptions, benchmarks.BenchmarkOptions, reprompt.RepromptOptions, reprompt.Drawing)
    yield from (make_sft.Options, draw.DrawOptions, pref_grpo.FlowArguments, LoopArguments, WatchArguments)
    yield group_training.GroupArguments


@pytest.mark.parametrize("kind", options(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_option_says_what_it_changes(kind):
    assert [one.name for one in fields(kind) if "changes" not in one.metadata] == []


def calls(*names: str) -> Iterator[tuple[str, int, dict[str | None, str]]]:
    """Of each call of a function or method of these names: where it is, its unnamed arguments, the named ones."""
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names:
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"{path}:{node.lineno} {ast.unparse(node)}", len(node.args), given


def test_every_option_has_a_help_and_a_type_whose_name_can_be_shown():
    flags = [(where, given) for where, _, given in calls("add_argument") if None not in given]
    bare = [where for where, unnamed, given in calls("option") if unnamed < 2 and "help" not in given]
    assert len(flags) > 8 and bare == []
    assert [where for where, given in flags if "help" not in given or given.get("type", "").startswith("_")] == []


def test_every_text_file_is_utf_8_whatever_the_locale():
    found = [where for where, _, _ in calls("read_text", "write_text", "open")]
    texts = [one for one in found if re.search(r"\.(read|write)_text\(| open\((?!.*'[rwa]b')", one)]
    assert len(texts) > 50 and [where for where in texts if "utf-8" not in where] == []
