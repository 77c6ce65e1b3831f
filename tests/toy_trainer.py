"""A trainer of 60 lines that owns its loop: a two-layer model learns by GRPO which of four numbers each prompt likes.

`toy_trainer.py OUTDIR STEPS [--resume] [--fault KIND AT]`; no TRL. It shows that `run.Loop`, `run.Saver`,
`scoring.judge` and `scoring.advantages` are all that the next trainer needs. A fault happens at step AT, on the main
process: "kill_step" before the optimiser's step, "kill_between" and "signal_N" after it is logged, "kill_saving" while
the manifest is written, "full_disk" while the state is written.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file

from interfaces import Prompt, Reward, Sample
from run import checkpoints
from run.folder import RunFolder
from run.heartbeat import Heartbeat
from run.loop import Loop
from run.options import run_main
from run.progress import start_run
from scoring.advantages import advantages
from scoring.judge import judge

PROMPTS, GROUP, CHOICES, EVERY = [Prompt(f"prompt {i}") for i in range(4)], 4, 4, 3


class Likes(Reward):
    """1 for the number that the prompt likes, less for others; nothing is drawn."""

    name, needs_images, range = "likes", False, (0.0, 1.0)

    def __call__(self, samples):
        return [1 - abs(int(s.rewrite) - int(s.prompt.text[-1])) / CHOICES for s in samples]


def train(outdir: str, steps: str, *words: str) -> None:
    fault, at = (words[-2], int(words[-1])) if "--fault" in words else ("", 0)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = {"steps": int(steps), "num_processes": accelerator.num_processes}
    folder = RunFolder(outdir, config, resume="auto" if "--resume" in words else None)
    folder.plan(int(steps))
    resume = start_run(folder, {}, [])
    model = torch.nn.Sequential(torch.nn.Linear(len(PROMPTS), 16), torch.nn.ReLU(), torch.nn.Linear(16, CHOICES))
    data = torch.utils.data.DataLoader(torch.eye(len(PROMPTS)), batch_size=2)  # tells DeepSpeed the size of a batch
    model, optimizer, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02), data)
    heartbeat = Heartbeat(folder.path, accelerator.process_index, 60)
    torch.manual_seed(accelerator.process_index)  # each process samples its own rollouts
    if accelerator.is_main_process:
        prepare(fault, at, accelerator)
    with Loop(accelerator, folder, resume, heartbeat, total=int(steps), save_every=EVERY, model=model, keep=2) as loop:
        for step in loop.steps():
            mine = [(step + accelerator.process_index) % len(PROMPTS)] * GROUP
            logits_GC = model(torch.eye(len(PROMPTS))[mine])
            chosen_G = torch.distributions.Categorical(logits=logits_GC.detach()).sample()
            samples = [Sample(PROMPTS[i], "", str(int(n))) for i, n in zip(mine, chosen_G, strict=True)]
            judged = judge(samples, [Likes()], group=GROUP)
            gained_G = torch.tensor(advantages([row["likes"] for row in judged.parts], GROUP))
            loss = -(logits_GC.log_softmax(-1)[range(GROUP), chosen_G] * gained_G).mean()
            accelerator.backward(loss)
            if (fault, at) == ("kill_step", step):
                os.kill(os.getpid(), signal.SIGKILL)
            loop.optimizer_step(optimizer, max_norm=1.0)
            rows = gather_object([{"chosen": chosen_G.tolist(), "parts": judged.parts}])
            loop.log({"loss": loss.item()}, rows)
            if at == step and fault.startswith(("kill_between", "signal_")):
                os.kill(os.getpid(), int(fault.removeprefix("signal_")) if "signal" in fault else signal.SIGKILL)
    weights = accelerator.unwrap_model(model).state_dict()
    loop.saver.publish(loop.done, lambda path: save(weights, path, accelerator.is_main_process))


def prepare(fault: str, at: int, accelerator: Accelerator) -> None:
    """Let saving fail at step `at`."""
    seal, save_state = checkpoints.write_manifest, accelerator.save_state

    def killed(folder, step, key):
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(folder, step, key)

    def full(path):
        if path.endswith(f"-{at}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_state(path)

    if fault == "kill_saving":
        checkpoints.write_manifest = killed
    if fault == "full_disk":
        accelerator.save_state = full


def save(weights: dict[str, torch.Tensor], path: Path, is_main: bool) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if is_main:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")


if __name__ == "__main__":
    code = run_main("toy_trainer", lambda: train(*sys.argv[1:]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
