"""Claims about async_prompter.py: TRL's trainer, worker process and loop, and vllm_standin.py where they need a GPU.

pytest tests/test_async.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, TrainingSequence, _AsyncRolloutLoop

import async_prompter
from data.prompts import load_prompts
from rendering import RenderOptions
from rewards import RewardOptions, Setting, build
from tests.test_remote import CARD, SIZE, Painter
from tests.vllm_standin import PolicyServer, stand_in
from training.asynchronous import advantages, combined, noise
from training.scoring import Scorer

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "miniature"
GROUP, STEPS, SEED = 4, 3, 5
WEIGHTS = [2.0, 0.5]
DRAWING = {"render_steps": CARD["steps"], "guidance": CARD["guidance"], "resolution": SIZE, "max_sequence_length": 32}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(folder: Path, renderer: str, policy: str) -> Path:
    """A YAML for the miniature: two groups of four a step."""
    prompts = (MINI / "prompts" / "train.txt").read_text().splitlines()[:6]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    paths = {"data": folder / "prompts.txt", "gpt_path": MINI / "weights/policy", "hps_path": MINI / "weights/hps"}
    servers = {"sdmodel_name": renderer, "vllm_server_base_url": policy}
    batch = {"num_generations": GROUP, "per_device_train_batch_size": 2 * GROUP, "gradient_accumulation_steps": 1}
    numbers = {"bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3, "warmup_steps": 0, "seed": SEED}
    length = {"max_steps": STEPS, "save_steps": 2, "max_completion_length": 112, "queue_maxsize": 2 * GROUP}
    record = {"rewards": ["hps", "format"], "reward_weights": WEIGHTS, "save_images_every": 2, "save_images_max": 5}
    options = {**{k: str(v) for k, v in paths.items()}, **servers, **DRAWING, **batch, **numbers, **length, **record}
    (folder / "async.yaml").write_text(yaml.safe_dump({**options, "outdir": str(folder / "run")}))
    return folder / "async.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, policy server) of a real run, and the render server, still up."""
    folder = tmp_path_factory.mktemp("async")
    with pytest.MonkeyPatch.context() as patch, Painter(CARD) as painter:
        with PolicyServer(str(MINI / "weights/policy")) as policy:
            stand_in(patch, policy)
            patch.setattr(async_prompter, "NEEDED", ())
            assert async_prompter.main(["--config", str(settings(folder, painter.url, policy.url))]) == 0
        yield folder / "run", policy, painter


def test_trl_trains_on_what_its_worker_had_drawn_and_the_server_gets_the_trained_weights(trained):
    run, policy, _ = trained
    logged = rows(run / "metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert all(row["grad_norm"] > 0 and row["sample/staleness_max"] <= 4 for row in logged)
    assert logged[0]["ratio"] == pytest.approx(1, abs=1e-3) and logged[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert policy.updates == STEPS + 1
    saved, served = load_file(run / "model.safetensors"), dict(policy.model.named_parameters())
    first = load_file(MINI / "weights/policy/model.safetensors")
    assert all((served[name] == tensor).all() for name, tensor in saved.items())
    assert any((first[name] != tensor).any() for name, tensor in saved.items())
    assert (run / "checkpoint-2" / "manifest.json").exists() and (run / "report.html").exists()
    assert "response_template" not in json.loads((run / "tokenizer_config.json").read_text())


def test_a_group_scored_in_the_worker_without_a_gpu_has_the_scores_of_the_synchronous_scorer(trained):
    run, policy, painter = trained
    assert policy.hidden == {""}
    prompts = load_prompts(run.parent / "prompts.txt")
    renderer = RenderOptions(sdmodel_name=painter.url, **DRAWING).load("cpu")
    rewards = build(["hps", "format"], RewardOptions(hps_path=str(MINI / "weights/hps")), Setting(renderer=renderer))
    scorer = Scorer(renderer, rewards, {p.id: p for p in prompts}, num_generations=GROUP, run_seed=SEED)
    written = [row for path in sorted((run / "rollouts").glob("*.jsonl")) for row in rows(path)]
    assert len(written) >= STEPS * 2 * GROUP
    for start in range(0, len(written), GROUP):
        group = written[start : start + GROUP]
        texts = [row["completion"] for row in group]
        scored = scorer.score(texts, [row["prompt_id"] for row in group], noise(texts))
        assert [row["rewrite"] for row in group] == [one.sample.rewrite for one in scored]
        assert [row["seeds"] for row in group] == [list(one.seeds) for one in scored]
        for name in ("hps", "format"):
            assert [row["parts"][name] for row in group] == pytest.approx([one.parts[name] for one in scored])
        numbers = combined([list(one.parts.values()) for one in scored], WEIGHTS, True)
        assert [row["advantage"] for row in group] == pytest.approx(advantages(numbers), abs=1e-4)
    assert sum(row["rewrite"] is not None for row in written) > len(written) / 2  # thinking was not taken out


def test_the_run_folder_tells_rewards_and_keeps_few_pictures(trained):
    run, *_ = trained
    scored, logged = rows(run / "scored.jsonl"), rows(run / "metrics.jsonl")
    first = rows(run / "rollouts" / "step_000001.jsonl")
    assert scored[0]["rewards/hps/mean"] == pytest.approx(np.mean([row["parts"]["hps"] for row in first]))
    assert logged[0].keys() >= {"rewards/hps/mean", "rewards/format/std", "rewrites/unreadable", "seconds/render"}
    second = rows(run / "rollouts" / "step_000002.jsonl")  # TRL's loader is one batch ahead, in its metrics as well
    assert logged[0]["reward"] == pytest.approx(np.mean([row["total"] for row in first + second]))
    kept = [image for row in first for image in row["images"] if image]
    assert len(kept) == 5 and all((run / image).exists() for image in kept)
    assert not any(image for row in second for image in row["images"])


# ----- the numbers


PARTS = [[0.31, 1.0], [0.29, 1.0], [None, None], [0.24, 0.0], [0.33, 1.0]]


def trl_advantages(numbers: list[float | None]) -> list[float]:
    """What TRL's own `_score_group` gives a group for which the reward function returns these numbers."""
    PartialState()  # TRL's logger wants one

    class Worker:
        reward_funcs, reward_func_names = [lambda **_: numbers], ["group"]
        _env_reward_types, _provides_rollout_reward = [], False

    count = len(numbers)
    sequences = [[TrainingSequence([1, 2], [0, 1], [0.0, -1.0], "one")] for _ in range(count)]
    group = RolloutGroup(
        [[]] * count, {}, [[]] * count, [[]] * count, sequences, [0] * count, [0] * count, 0, 0, [], []
    )
    return [sample.advantage for sample in asyncio.run(_AsyncRolloutLoop._score_group(Worker(), group))]


@pytest.mark.parametrize("normalise", [True, False])
def test_a_groups_numbers_and_advantages_are_those_of_trl(normalise):
    scores = np.array([[np.nan if part is None else part for part in row] for row in PARTS])
    totals, known = scores @ WEIGHTS, [0, 1, 3, 4]
    expected = totals
    if normalise:  # GRPOTrainer._generate_and_score_completions, normalize_then_sum, before it looks at other groups
        spread = np.nanstd(scores, axis=0, ddof=1, keepdims=True)
        expected = ((scores - np.nanmean(scores, axis=0, keepdims=True)) / (spread + 1e-4)) @ WEIGHTS
    numbers = combined(PARTS, WEIGHTS, normalise)
    assert np.isnan(numbers[2]) and np.nanmean(numbers) == pytest.approx(np.nanmean(totals))
    np.testing.assert_allclose(numbers - np.nanmean(numbers), expected - np.nanmean(expected), atol=1e-12)
    theirs = trl_advantages([None if np.isnan(number) else number for number in numbers])
    assert theirs[2] == 0 and advantages(numbers) == pytest.approx(theirs)
    np.testing.assert_allclose(
        np.array(theirs)[known], (expected[known] - expected[known].mean()) / expected[known].std(), rtol=1e-5
    )


@pytest.mark.parametrize("parts", [[[None], [None]], [[0.5], [None]], [[0.5], [0.5]]])
def test_a_group_that_can_teach_nothing_has_no_advantage(parts):
    numbers = combined(parts, [1.0], True)
    assert advantages(numbers) == [0.0, 0.0]
    assert trl_advantages([None if np.isnan(number) else number for number in numbers]) == [0.0, 0.0]


def test_noise_is_the_groups_own_whatever_the_order_of_arrival():
    assert noise(["a", "b"]) == noise(["b", "a"]) != noise(["a", "c"])


# ----- options


BAD = {
    "no KL": (["--beta", "0.1"], "--beta is not possible here"),
    "scale": (["--scale-rewards", "batch"], "--scale_rewards is not possible here"),
    "local renderer": (["--sdmodel_name", "black-forest-labs/FLUX.1-dev"], "start render servers"),
    "no such server": (["--sdmodel_name", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1"),
    "rewards on a GPU": (["--reward_device", "cuda:0"], "cuda:0"),
    "tokens": (["--token_budget", "4096"], "4096"),
    "group cut in two": (["--num_generations", "3"], "num_generations 3"),
    "weights": (["--reward_weights", "1"], "[1.0]"),
    "typing error": (["--max_stalenes", "1"], "did you mean '--max_staleness'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_with_the_value_and_code_2(tmp_path, capfd, monkeypatch, bad):
    options, named = BAD[bad]
    monkeypatch.setattr(async_prompter, "NEEDED", ())
    config = settings(tmp_path, "http://127.0.0.1:8/v1", "http://127.0.0.1:7")
    assert async_prompter.main(["--config", str(config), *options]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "async_prompter: error:" in line]
    assert len(said) == 1 and named in said[0]
    assert not (tmp_path / "run").exists()


def test_a_yaml_for_the_other_trainer_is_refused_by_name_and_what_is_not_installed_named(tmp_path, capfd):
    arguments = ["--config", str(ROOT / "configs/miniature.yaml"), "--outdir", str(tmp_path / "run")]
    assert async_prompter.main(arguments) == 2
    assert "scale_rewards" in capfd.readouterr().err
    config = settings(tmp_path, "http://127.0.0.1:8/v1", "http://127.0.0.1:7")
    async_prompter.NEEDED, known = ("no_such_package",), async_prompter.NEEDED
    try:
        assert async_prompter.main(["--config", str(config)]) == 2
    finally:
        async_prompter.NEEDED = known
    assert "no_such_package not installed" in capfd.readouterr().err


def test_the_recipe_differs_from_the_synchronous_one_only_where_it_says():
    ours, theirs = (yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in ("async", "flux_dev"))
    assert {name: ours[name] for name in ours if ours[name] != theirs.get(name)} == {
        "token_budget": 0, "max_staleness": 4, "weight_sync_steps": 1, "dtype": "float32",
    }  # fmt: skip
    assert set(theirs) - set(ours) == {"beta", "loss_type"} <= set(async_prompter.LACKING)
