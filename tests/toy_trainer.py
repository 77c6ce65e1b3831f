"""A trainer that owns its loop: a two-layer model learns by GRPO which of four numbers each prompt likes.

    python tests/toy_trainer.py OUTDIR STEPS [--resume]        also under `accelerate launch`

No TRL. `run.Loop`, `run.Saver`, `scoring.judge` and `scoring.advantages` are all that the next trainer needs.
"""

import sys

import torch
from accelerate.utils import gather_object

from interfaces import Prompt, Reward, Sample
from run.folder import RunFolder
from run.heartbeat import Heartbeat
from run.loop import Loop, make_accelerator
from run.options import run_main
from run.progress import start_run
from scoring.advantages import advantages
from scoring.judge import judge

PROMPTS, GROUP, CHOICES = [Prompt(f"prompt {i}") for i in range(4)], 4, 4


class Likes(Reward):
    """1 for the number that the prompt likes, less for others; nothing is drawn."""

    name, needs_images, range = "likes", False, (0.0, 1.0)

    def __call__(self, samples):
        return [1 - abs(int(s.rewrite) - int(s.prompt.text[-1])) / CHOICES for s in samples]


def train(outdir: str, steps: int, resume: str | None) -> None:
    torch.manual_seed(0)
    accelerator = make_accelerator(batch_size=GROUP)
    folder = RunFolder(outdir, {"num_processes": accelerator.num_processes}, resume=resume)
    folder.plan(steps)
    start = start_run(folder, {}, [])
    model = torch.nn.Sequential(torch.nn.Linear(len(PROMPTS), 16), torch.nn.ReLU(), torch.nn.Linear(16, CHOICES))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))
    heartbeat = Heartbeat(folder.path, accelerator.process_index, 60)
    torch.manual_seed(accelerator.process_index)  # each process samples its own rollouts
    with Loop(accelerator, folder, start, heartbeat, total=steps, save_every=3, model=model, keep=2) as loop:
        for step in loop.steps():
            mine = [(step + accelerator.process_index) % len(PROMPTS)] * GROUP
            logits_GC = model(torch.eye(len(PROMPTS))[mine])
            chosen_G = torch.distributions.Categorical(logits=logits_GC.detach()).sample()
            samples = [Sample(PROMPTS[i], "", str(int(n))) for i, n in zip(mine, chosen_G, strict=True)]
            judged = judge(samples, [Likes()], group=GROUP)
            gained_G = torch.tensor(advantages([row["likes"] for row in judged.parts], GROUP))
            accelerator.backward(-(logits_GC.log_softmax(-1)[range(GROUP), chosen_G] * gained_G).mean())
            loop.optimizer_step(optimizer, max_norm=1.0)
            rows = gather_object([{"chosen": chosen_G.tolist(), "parts": judged.parts}])
            loop.log({"likes": sum(part["likes"] for row in rows for part in row["parts"]) / len(rows) / GROUP}, rows)
    loop.saver.publish(loop.done, lambda path: accelerator.save_model(model, str(path)))


if __name__ == "__main__":
    outdir, steps, *flags = sys.argv[1:]
    code = run_main("toy_trainer", lambda: train(outdir, int(steps), "auto" if "--resume" in flags else None))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
