"""Will a run of t2i_r1.py fit? Memory of each process, next to that of the published code for the same model.

    python -m doctor.janus --gpus 8 --gpu_memory 80 --zero 2 [any flag of t2i_r1.py]

Counted from the shapes of the language model: weights, copies, gradients, optimiser, KV cache, checkpointed
activations, logits. NOT counted are CUDA's own context, fragmentation, and one layer's activations. No GPU has been
compared with it. Exit code 1: it does not fit.

The published code (T2I-R1) has a group's 8 rows at once everywhere, under ZeRO-3. It samples plans of 1024 tokens
after 512 of prompt, keeps the graph of their loss while it draws all images, in 16 rows, and has its rewards beside
it; its released script has the ORM among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import t2i_r1
from doctor.memory import SCORERS, ZERO_BUCKET, Policy, policy_of
from doctor.report import GB
from models.hub import on_disk
from run.options import option, parse_known, run_main

MODELS = {  # the language models
    "deepseek-community/Janus-Pro-1B": Policy(1_652_656_128, 24, 2048, 2048, 5632, 102400),
    "deepseek-community/Janus-Pro-7B": Policy(6_910_365_696, 30, 4096, 4096, 11008, 102400),
}
FROZEN = 500_000_000  # vision tower, aligners, image head, VQ; about
IMAGE, CODES, PROMPT = 576, 16384, 100
PUBLISHED = {"rows": 8, "prompt": 512, "plan": 1024, "drawn": 16}
"""Rows at once, tokens, rows drawn at once."""


@dataclass
class JanusDoctorOptions:
    """The doctor's own options; all others are the trainer's."""

    gpus: int = option(8, "Processes, one a GPU.", changes="nothing", least=1)
    gpu_memory: float = option(80.0, "GB of each of them (10^9 bytes).", changes="nothing", above=0)
    zero: int = option(2, "DeepSpeed's stage.", changes="nothing", choices=[2, 3])


def ours(options: t2i_r1.Options, model: Policy, gpus: int, zero: int) -> dict[str, float]:
    """Bytes in one process."""
    script, groups, loop = options.script, options.groups, options.loop
    chunk = script.image_batch if isinstance(script.image_batch, int) else groups.num_generations
    trained = lora(model, loop.lora_r) if loop.use_peft else model.parameters
    share = gpus if zero == 3 else 1
    rows = {
        "weights": (2 * model.parameters + 2 * FROZEN) / share,
        "all weights while sampling": 2 * (model.parameters + FROZEN) if zero == 3 else 0,
        "reference": 2 * trained / share if groups.beta or script.token_similarity else 0,
        "average": 4 * trained / share if loop.ema_decay else 0,
        "gradients, optimiser": 2 * trained / gpus + 2 * min(trained, ZERO_BUCKET) + 12 * trained / gpus,
    }
    drawn = chunk * (2 if script.guidance > 1 else 1)
    rows["KV cache of drawing"] = cache(model, drawn, PROMPT + script.max_plan_tokens)
    guided = 2 if script.logprob == "guided" and script.guidance > 1 else 1
    batch = script.train_batch_size
    rows["training a batch"] = learning(model, batch, PROMPT, script.max_plan_tokens) + learning(
        model, guided * batch, PROMPT + script.max_plan_tokens, IMAGE, CODES
    )
    return rows | rewards([*groups.rewards, *groups.held_out], options.reward.reward_offload)


def published(model: Policy, gpus: int, names: Sequence[str]) -> dict[str, float]:
    """Bytes in one process of T2I-R1's code, with these rewards beside it."""
    rows, prompt, written, drawn = PUBLISHED.values()
    return {
        "weights": 2 * (model.parameters + FROZEN) / gpus,
        "all weights while sampling": 2 * (model.parameters + FROZEN),
        "reference": 2 * (model.parameters + FROZEN) / gpus,
        "average": 0,
        "gradients, optimiser": 14 * model.parameters / gpus + 2 * ZERO_BUCKET,
        "KV cache of drawing": cache(model, drawn, prompt + written),
        "training a batch": learning(model, rows, prompt, written)
        + learning(model, rows, prompt + written, IMAGE, CODES),
        **rewards(names, False),
    }


def cache(model: Policy, rows: int, prefix: int) -> int:
    """Keys and values of every row's prefix and image."""
    return 2 * 2 * model.layers * model.keys * rows * (prefix + IMAGE)


def learning(model: Policy, rows: int, prefix: int, answer: int, words: int | None = None) -> int:
    """One state a token and layer, as checkpointing keeps it; logits in bfloat16 and float32, and their gradient."""
    states = 2 * model.layers * model.width * rows * (prefix + answer)
    return states + 10 * rows * answer * (words or model.vocabulary)


def rewards(names: Sequence[str], offloaded: bool) -> dict[str, int]:
    sizes = [SCORERS[name] * (2 if name == "orm" else 4) for name in names if name in SCORERS]
    return {"rewards": max(sizes, default=0) if offloaded else sum(sizes)}


def lora(model: Policy, rank: int) -> int:
    """Parameters of a LoRA of all linear layers."""
    return model.layers * rank * (9 * model.width + 2 * model.keys + 3 * model.inner)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("doctor.janus", lambda: examine(sys.argv[1:] if argv is None else argv))


def examine(argv: Sequence[str]) -> int:
    """Print the table; 1 if it does not fit."""
    own, flags = parse_known((JanusDoctorOptions,), argv, prog="python -m doctor.janus", epilog="Others: t2i_r1.py's.")
    options = t2i_r1.parse_options(flags)
    path = options.script.model_path
    model = policy_of(path) if path not in MODELS and on_disk(path) else MODELS[path]
    columns = {
        "this run": ours(options, model, own.gpus, own.zero),
        "published code": published(model, own.gpus, options.groups.rewards),
        "... with the ORM": published(model, own.gpus, ["hps", "gdino", "git", "orm"]),
    }
    totals = {name: sum(rows.values()) for name, rows in columns.items()}
    print(f"{path}, GB on each of {own.gpus} GPUs of {own.gpu_memory:g} GB; this run under ZeRO-{own.zero}\n")
    print(f"{'':30s}" + "".join(f"{name:>18s}" for name in columns))
    for row in columns["this run"]:
        print(f"{row:30s}" + "".join(f"{rows[row] / GB:18.1f}" for rows in columns.values()))
    print(f"{'total':30s}" + "".join(f"{total / GB:18.1f}" for total in totals.values()))
    fits = totals["this run"] < 0.9 * own.gpu_memory * GB
    print(f"\nthis run {'fits' if fits else 'does NOT fit'}: a tenth is left for what is not counted")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
