"""What the trainers that own their loop let a user choose alike; `r1_prompter` and `sft` have TRL's names for it."""

from __future__ import annotations

from dataclasses import dataclass

from run.options import SEED, SHARE, option, resume_option


@dataclass
class LoopArguments:
    """Where a run writes, how long it is, what is trained with which steps, and what is kept."""

    outdir: str = option(help="Run folder, new or this run's own; trained weights are saved there.", changes="nothing")
    max_steps: int = option(300, "Rollouts in all.", changes="run", least=1)
    use_peft: bool = option(True, "Train a LoRA; false: all of the transformer.", changes="run")
    lora_r: int = option(64, "Rank of the LoRA.", changes="run", least=1)
    lora_alpha: int = option(128, "Its scale is this over the rank.", changes="run", least=1)
    lora_target_modules: list[str] = option(
        ["to_q", "to_k", "to_v", "to_out.0"], "Layers that get one, by the ends of their names.", changes="run"
    )
    learning_rate: float = option(1e-4, "Constant after the warm-up.", changes="run", least=0)
    warmup_steps: int = option(0, "Rollouts over which the learning rate rises to it.", changes="run", least=0)
    weight_decay: float = option(1e-4, "AdamW's.", changes="run", least=0)
    max_grad_norm: float = option(1.0, "Gradients are shrunk to this norm.", changes="run", above=0)
    ema_decay: float = option(
        0.9,
        "Of the average that is evaluated and saved beside the weights; 0: the weights themselves.",
        changes="run",
        least=0,
        below=1,
    )
    gradient_checkpointing: bool = option(
        True, "Recompute activations; less memory, a third more time.", changes="nothing"
    )
    seed: int = option(0, "Of prompts' order and of all noise.", changes="run", **SEED)
    max_absent_share: float = option(
        0.5, "Pictures without score that stop the run after three rollouts.", changes="nothing", **SHARE
    )
    save_steps: int = option(20, "Rollouts from one checkpoint to the next.", changes="nothing", least=1)
    save_total_limit: int = option(3, "Checkpoints that stay on the disk.", changes="nothing", least=1)
    save_images_max: int = option(
        32, "Pictures kept of a rollout at which checkpoints are saved.", changes="nothing", least=0
    )
    phase_budget: float = option(
        1800.0, "Seconds of one phase after which all stacks are written down.", changes="nothing", above=0
    )
    resume: str | None = resume_option()

    def learning_rate_of(self, step: int) -> float:
        """Of the rollout of `step`, from 1."""
        return self.learning_rate * min(1.0, step / (self.warmup_steps + 1))

    def pictures_to_keep(self, step: int) -> int:
        """Of the rollout of `step`, on all processes together."""
        keeps = step in (1, self.max_steps) or step % self.save_steps == 0
        return self.save_images_max if keeps else 0
