"""How fast is a rollout, against a plain loop in the manner of the published code? Both in one run, on the miniature.

    python scripts/bench.py --target cpu [--json PATH] [--prompts 16] [--group 8]
    python scripts/bench.py --target groups [--json PATH]       cost of a rollout and memory as the group grows 4 -> 32
    python scripts/bench.py --target rewards [--json PATH]      each local reward in batches against one by one
    python scripts/bench.py --target gpu [--minutes 8]          real shapes, random weights: scripts/bench_gpu.py
    python scripts/bench.py --target levers                     each lever of the renderer: scripts/bench_levers.py
    python scripts/bench.py --target generate                   ways to sample without vLLM: scripts/bench_generate.py

A rollout is: write a completion, draw it, score it with the rewards of configs/miniature.yaml. Both sides get the same
completions, sampled in batches as TRL does. The plain loop then takes them one by one, as RePrompt and T2I-R1 do: each
image reward draws the rewrite again for itself, one picture a call with its text encoded anew, and scores that one
picture. The trainer's `Scorer` draws each distinct (rewrite, seed) once, in batches, and gives every reward the same
pictures. `ratio_to_plain_loop` compares drawing and scoring; `ratio_with_generation` adds the sampling, which both
sides share.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from data.prompts import load_prompts
from inference import Reprompter
from interfaces import Prompt, Renderer, Sample
from miniature import build as miniature
from prompting import messages, parse
from rewards import RewardContext, RewardOptions, build
from run.seeds import render_seed
from scoring.drawing import Drawer
from scoring.rollouts import Scorer

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (4, 8, 16, 32)
SAMPLED = 128  # completions in one call of `generate`, the miniature's generation batch
LOCAL = ("hps", "git", "gdino", "orm", "imagereward", "pickscore")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How fast is what a run does?", allow_abbrev=False)
    parser.add_argument("--target", choices=[*TARGETS], required=True)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--prompts", type=int, default=16, help="cpu, rewards, generate: groups of a generation")
    parser.add_argument("--group", type=int, default=8, help="cpu, rewards, generate: completions a prompt")
    parser.add_argument("--no_plain_loop", action="store_true", help="cpu: leave out the side that is compared with")
    parser.add_argument("--minutes", type=float, default=8, help="gpu, levers: what does not fit in is left out")
    parser.add_argument("--scale", choices=["real", "tiny"], help="gpu, levers: shapes; tiny ones run on any machine")
    args = parser.parse_args(argv)
    result, shown = TARGETS[args.target](args)
    for key, value in result.items():
        if key != "rows":
            print(f"{key:28s} {value:.4f}" if isinstance(value, float) else f"{key:28s} {value}")
    print(shown, end="")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _gpu(args: argparse.Namespace) -> tuple[dict, str]:
    from scripts import bench_gpu, bench_models  # which import this module

    device = _device()
    found = bench_gpu.bench_gpu(bench_models.SCALES[args.scale or "real"], args.minutes, device)
    return found, bench_gpu.table(found["rows"]) + "\n"


def _levers(args: argparse.Namespace) -> tuple[dict, str]:
    from scripts import bench_levers

    found = bench_levers.bench_levers(args.scale, args.minutes, _device())
    return found, bench_levers.table(found["rows"]) + "\n"


def _generate(args: argparse.Namespace) -> tuple[dict, str]:
    from scripts import bench_generate

    found = bench_generate.bench_generate(args.prompts, args.group)
    return found, bench_generate.table(found["rows"]) + "\n"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bench_cpu(groups: int, group: int, *, compare: bool = True) -> dict:
    """Seconds per rollout and phase of both sides, shares of each phase, their ratios, and the peak of memory."""
    options = yaml.safe_load((ROOT / "configs" / "miniature.yaml").read_text(encoding="utf-8"))
    prompts = random.Random(0).sample(load_prompts(ROOT / options["data"]), groups)
    asked = [prompt for prompt in prompts for _ in range(group)]
    renderer, phases = miniature.renderer(), _Phases()
    paths = {f"{name}_path": str(ROOT / options[f"{name}_path"]) for name in LOCAL}
    rewards = build(options["rewards"], RewardOptions(**paths), RewardContext(renderer=renderer, prompts=prompts))
    by_id = {prompt.id: prompt for prompt in prompts}
    scorer = Scorer(Drawer(renderer, group=group), rewards, by_id, enter=phases.enter)

    completions, generating = _sample(ROOT / options["gpt_path"], asked, options["max_completion_length"])
    ids = [prompt.id for prompt in asked]
    scorer.score(completions[:group], ids[:group], 1)  # warm up, off the clock
    phases.seconds.clear()
    scorer.score(completions, ids, 1)
    phases.enter("", 1)
    seconds = {"generate": generating, **phases.seconds}
    rollouts, whole = len(asked), sum(seconds.values())
    result = {
        "rollouts": rollouts,
        "threads": torch.get_num_threads(),
        "distinct_pictures": int(scorer.metrics["images/drawn"]),
        **{f"{phase}_s_per_rollout": value / rollouts for phase, value in seconds.items()},
        **{f"{phase}_share": value / whole for phase, value in seconds.items()},
        "s_per_rollout": whole / rollouts,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if compare:
        one_by_one = miniature.renderer(render_batch_size=1)
        plain_loop(one_by_one, rewards, asked[:1], completions[:1])  # warm up, off the clock
        plain, ours = plain_loop(one_by_one, rewards, asked, completions), whole - generating
        result["plain_loop_s_per_rollout"] = plain / rollouts
        result["ratio_to_plain_loop"] = plain / ours
        result["ratio_with_generation"] = (generating + plain) / whole
    return result


class _Phases:
    """Seconds between one `Scorer.enter` and the next, by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._phase, self._since = "", 0.0

    def enter(self, phase: str, step: int) -> None:
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase.replace(" ", "_"), now


def bench_groups(prompts: int) -> dict:
    """Seconds per rollout and peak memory with `prompts` groups of 4, 8, 16 and 32, each in a process of its own."""
    result: dict[str, float] = {"prompts": prompts}
    with tempfile.TemporaryDirectory() as folder:
        for size in tqdm(GROUPS, desc="groups", leave=False):
            out = Path(folder) / f"{size}.json"
            command = [sys.executable, __file__, "--target", "cpu", "--no_plain_loop", "--json", str(out)]
            command += ["--prompts", str(prompts), "--group", str(size)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            row = json.loads(out.read_text(encoding="utf-8"))
            for name in ("s_per_rollout", "distinct_pictures", "peak_memory_mib"):
                result[f"group_{size}_{name}"] = row[name]
    costs = [result[f"group_{size}_s_per_rollout"] for size in GROUPS]
    middle = sum(costs) / len(costs)
    result["largest_departure_from_mean"] = max(abs(cost / middle - 1) for cost in costs)
    return result


def bench_rewards(pictures: int) -> dict:
    """Milliseconds per picture of each local reward, all pictures in one call and one picture a call; medians of 3."""
    options = yaml.safe_load((ROOT / "configs" / "miniature.yaml").read_text(encoding="utf-8"))
    prompts = random.Random(0).sample(load_prompts(ROOT / options["data"]), pictures)
    images = miniature.renderer()([p.text for p in prompts], range(pictures))
    samples = [Sample(prompt, "", prompt.text, (image,)) for prompt, image in zip(prompts, images, strict=True)]
    paths = {f"{name}_path": str(ROOT / options[f"{name}_path"]) for name in LOCAL}
    result = {"pictures": pictures, "threads": torch.get_num_threads()}
    for reward in build(LOCAL, RewardOptions(**paths), RewardContext()):
        reward(samples[:1])  # warm up, off the clock
        together = _median_of_3(lambda reward=reward: reward(samples)) / pictures
        alone = _median_of_3(lambda reward=reward: [reward([sample]) for sample in samples]) / pictures
        result |= {f"{reward.name}_batched_ms": 1000 * together, f"{reward.name}_one_by_one_ms": 1000 * alone}
        result[f"{reward.name}_ratio"] = alone / together
    return result


def _median_of_3(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[1]


def _sample(policy: Path, asked: list[Prompt], length: int) -> tuple[list[str], float]:
    """One sampled completion per prompt in `asked`, padded into batches as TRL does, and the seconds it took."""
    reprompter = Reprompter(str(policy), max_new_tokens=length, temperature=1.0, dtype="float32")
    texts, seconds = [], 0.0
    torch.manual_seed(0)
    for first in range(0, len(asked), SAMPLED):
        batch = reprompter.tokenizer.apply_chat_template(
            [messages(prompt.text) for prompt in asked[first : first + SAMPLED]], add_generation_prompt=True,
            padding=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        started = time.perf_counter()
        with torch.inference_mode():
            out = reprompter.policy.generate(**batch)
        seconds += time.perf_counter() - started
        written = out[:, batch["input_ids"].shape[1] :]
        texts += reprompter.tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts, seconds


def plain_loop(renderer: Renderer, rewards: list, asked: list[Prompt], completions: list[str]) -> float:
    """Seconds to draw and score rollout by rollout, each image reward drawing for itself."""
    started = time.perf_counter()
    for prompt, completion in zip(tqdm(asked, desc="plain loop", leave=False), completions, strict=True):
        answer = parse(completion)
        for reward in rewards:
            images = ()
            if reward.needs_images and answer is not None:
                images = tuple(renderer([answer.rewrite], [render_seed(0, prompt.id, 1, 0)]))
            if not reward.needs_images or images:
                reward([Sample(prompt, completion, answer.rewrite if answer else None, images)])
    return time.perf_counter() - started


TARGETS = {
    "cpu": lambda args: (bench_cpu(args.prompts, args.group, compare=not args.no_plain_loop), ""),
    "groups": lambda args: (bench_groups(args.prompts), ""),
    "rewards": lambda args: (bench_rewards(args.prompts * args.group), ""),
    "gpu": _gpu,
    "levers": _levers,
    "generate": _generate,
}

if __name__ == "__main__":
    sys.exit(main())
