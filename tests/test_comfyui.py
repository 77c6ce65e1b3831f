"""Claims about the ComfyUI node, loaded and called as ComfyUI does."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys

import pytest

from errors import UserError
from inference import Reprompter
from tests.processes import ROOT, closed_port

PACKAGE, POLICY = ROOT / "comfyui", str(ROOT / "miniature" / "weights" / "policy")


@pytest.fixture
def node(monkeypatch):
    """Of a package under custom_nodes/, whose name is its path."""
    name = str(PACKAGE).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    return module.NODE_CLASS_MAPPINGS["R1Reprompt"]


def call(node: type, **given: object) -> tuple:
    """With what the widgets hold, as ComfyUI's executor calls it."""
    inputs = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES()["optional"]}
    values = {name: settings["default"] for name, (_, settings) in inputs.items()}
    return getattr(node(), node.FUNCTION)(**{**values, **given})


def test_it_gives_the_rewrite_and_the_reasoning_of_the_policy(node):
    found = call(node, text="a photo of three circles", policy=POLICY, max_new_tokens=120)
    (expected,) = Reprompter(POLICY, max_new_tokens=120)(["a photo of three circles"])
    assert found == (expected.rewrite, expected.reasoning) and len(found) == len(node.RETURN_TYPES)
    sampled = {call(node, policy=POLICY, max_new_tokens=120, temperature=1.0, seed=seed) for seed in range(4)}
    assert len(sampled) > 1


def test_it_works_where_a_loop_is_running_and_the_policy_is_behind_a_url(node):
    """As ComfyUI calls nodes; nobody listens there, which is said."""

    async def called() -> tuple:
        return call(node, policy="m", url=f"http://127.0.0.1:{closed_port()}/v1")

    with pytest.raises(UserError, match="policy_url"):
        asyncio.run(called())


def test_without_a_policy_it_says_what_to_do(node):
    with pytest.raises(ValueError, match="name a policy"):
        call(node, policy=" ")


def test_the_workflow_links_what_is_there_and_gives_the_node_its_inputs(node):
    workflow = json.loads((PACKAGE / "workflow.json").read_text(encoding="utf-8"))
    links = [value for one in workflow.values() for value in one["inputs"].values() if isinstance(value, list)]
    assert all(source in workflow and isinstance(place, int) for source, place in links)
    ours = next(one for one in workflow.values() if one["class_type"] == "R1Reprompt")
    kinds = {"STRING": str, "FLOAT": float, "INT": int, "BOOLEAN": bool}
    inputs = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES()["optional"]}
    assert ours["inputs"].keys() == inputs.keys()
    assert all(isinstance(ours["inputs"][name], kinds[kind]) for name, (kind, _) in inputs.items())
