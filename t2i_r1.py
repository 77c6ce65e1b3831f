"""Train a Janus-Pro to plan in words and to draw in tokens, both in one step: BiCoT-GRPO (T2I-R1, arXiv 2505.00703).

For each user prompt the model writes G plans and draws a picture after each. Frozen rewards compare the pictures with
the prompt; what scores above its group's mean becomes likelier, the plan (semantic-level chain of thought) as well as
the image tokens (token-level): one group, one advantage, one update. Vision tower, aligners, image head and VQ stay
frozen. Left out: several pictures of one plan, understanding as a task of its own.

    accelerate launch --config_file=deepspeed_2.yaml t2i_r1.py --config configs/t2i_r1.yaml

    python t2i_r1.py --help              every option with its reason
    ... --resume                         the same command again: go on from the newest good checkpoint

The run folder is a Janus folder that transformers, `scripts/reason_inference.py` and `evaluate.py` load; `ema/` and
`best/` hold the same of the averaged weights, at the end and where the evaluation was best.
Options: configs/t2i_r1.yaml < `--config` YAML < flags. Exit codes: as r1_prompter.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from data.prompts import load_prompts
from data.questions import Question, load_questions
from errors import Stopped, UserError
from group_training import Batch, GroupArguments, GroupMethod, Row, Setup, processes, run, set_up
from interfaces import Sample
from models import bicot
from models.janus import Janus, Part, Scored, Settings, find_janus, janus_contents, longest_prefix, part_of
from models.trained import Shadow, average, make_trainable, merged, save_trained_alone, whole, whole_state
from rendering import AUTO, RenderOptions
from rendering.janus import JanusRenderer, Picture, load_janus_renderer
from rewards import RewardOptions
from run.files import Contents
from run.loop import Loop
from run.loop_options import LoopArguments
from run.options import option, parse, run_main
from scoring.diagnostics import means
from scoring.progress import WatchArguments

RECIPE = Path(__file__).resolve().parent / "configs" / "t2i_r1.yaml"
CLIP = 0.2  # GRPO's; T2I-R1 makes one update of a rollout, which clips nothing
LEVELS = ("both", "plan", "tokens")


# Options ---------------------------------------------------------------------------------------------------------


@dataclass
class JanusArguments:
    """The method. Groups, loop, evaluation and rewards have options of their own beside these."""

    model_path: str = option(help="Janus in transformers' layout, a folder or a hub name.", changes="run")
    dtype: str = option(
        "auto", "Of frozen weights.", changes="run", choices=["auto", "float32", "bfloat16", "float16"]
    )
    levels: str = option("both", "What learns: written plans, image tokens, or both.", changes="run", choices=LEVELS)
    max_plan_tokens: int = option(512, "A plan is cut there.", changes="run", least=1)
    temperature: float = option(1.0, "Of plans.", changes="run", above=0)
    top_p: float = option(1.0, "Of plans.", changes="run", above=0, most=1)
    image_temperature: float = option(1.0, "Of image tokens.", changes="run", above=0)
    guidance: float = option(
        5.0, "Of images, against a row without text; 1: none, half the rows.", changes="run", least=1
    )
    image_batch: int | str = option(
        AUTO, "Pictures drawn at once; auto: measured at the start.", changes="nothing", words=[AUTO], least=1
    )
    train_batch_size: int = option(1, "Pictures trained on at once, on each process.", changes="run", least=1)
    token_weight: float | None = option(
        None, "Of the image's tokens against 1 - it of the plan's; unset: all tokens alike.", changes="run", least=0,
        most=1,
    )  # fmt: skip
    logprob: str = option(
        "conditional", "Of image tokens: as published, or of the distribution that was sampled.", changes="run",
        choices=["conditional", "guided"],
    )  # fmt: skip
    entropy_mask: float = option(
        0.0, "EG-GRPO: share of tokens, of low entropy, without reward.", changes="run", least=0, most=1
    )
    entropy_bonus: float = option(
        0.0, "EG-GRPO: share of tokens, of high entropy, with a bonus.", changes="run", least=0, most=1
    )
    token_similarity: bool = option(
        False, "STAGE: equal codes in good and bad pictures of a group learn less.", changes="run"
    )
    train_generation_head: bool = option(False, "Train the image head, too.", changes="run")
    questions: str | None = option(
        None, "Yes-no questions about pictures (.jsonl): does the model still see?", changes="run"
    )

    def settings(self) -> Settings:
        """How to sample."""
        return Settings(self.guidance, self.image_temperature, self.temperature, self.top_p, self.max_plan_tokens)


@dataclass(frozen=True)
class Options:
    """The options of one run."""

    groups: GroupArguments
    script: JanusArguments
    loop: LoopArguments
    watch: WatchArguments
    reward: RewardOptions


def parse_options(argv: Sequence[str]) -> Options:
    """Options of one run: the recipe, then the `--config` YAML, then flags.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a missing or ill-typed value.
    """
    kinds = (GroupArguments, JanusArguments, LoopArguments, WatchArguments, RewardOptions)
    return Options(*parse(kinds, RECIPE, argv))


def plan(options: Options, prompts: int, processes: int) -> dict[str, int]:
    """The numbers that follow from the options; those that cut a group or a batch in two are refused.

    Raises:
        UserError: with the numbers that do not fit.
    """
    groups, batch = options.groups, options.script.train_batch_size
    local = groups.local_pictures(prompts, options.watch.eval_prompts, processes, batch, "train_batch_size")
    parts = groups.updates_per_rollout
    return {
        "processes": processes,
        "pictures_per_rollout": local * processes,
        "pictures": options.loop.max_steps * local * processes,
        "optimizer_steps": options.loop.max_steps * parts,
        "pictures_per_optimizer_step": local * processes // parts,
        "passes_per_optimizer_step": local // batch // parts,
    }


# The method ------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Pictures that are trained on at once.

    Attributes:
        plan, image: None where that level does not learn.
        sampled: log-probabilities of the plan's and the image's tokens, as they were sampled.
        cosine: see `bicot.likeness`; None unless that counts.
        old: of both levels before the first update; None where there is but one, which is its own.
    """

    plan: Part | None
    image: Part | None
    sampled: tuple[Tensor, Tensor]
    advantage: Tensor
    cosine: Tensor | None
    old: tuple[Scored | None, Scored | None] | None


class T2IR1(GroupMethod):
    """Rollouts and updates.

    Attributes:
        net: the model as accelerate prepared it; its one `forward` scores both levels.
        ema, start: copies of the trained weights: the average that is evaluated, and the reference of the penalty.
    """

    def __init__(self, options: Options, setup: Setup, renderer: JanusRenderer):
        super().__init__(options.groups, options.loop, options.reward.preference_pairs, setup)
        self.script, self.renderer, self.janus = options.script, renderer, renderer.janus
        self.chunk, self.clip = renderer.chunk_size, self.groups.clip_range or CLIP
        self.needs_start = bool(self.groups.beta or self.script.token_similarity)
        self.is_checked = False  # whether replayed log-probabilities were compared with the sampled ones
        trained = choose_weights(self.janus, self.script, options.loop)
        save_trained_alone(setup.accelerator, self.janus)
        optimizer = torch.optim.AdamW(trained, options.loop.learning_rate, weight_decay=options.loop.weight_decay)
        self.net, self.optimizer = setup.accelerator.prepare(self.janus, optimizer)
        self.ema = average(self.janus, options.loop.ema_decay)
        self.start = Shadow(self.janus, None) if self.needs_start else self.ema
        setup.accelerator.register_for_checkpointing(*dict.fromkeys((self.ema, self.start)))
        self.net(None, None)  # FSDP2 must see its first pass from outside, and sampling begins inside

    # Rollouts: plans, then pictures

    def draw(self, step: int, rows: Sequence[Row]) -> tuple[list[Sample], list[Picture]]:
        """Plans and pictures; no graph is alive meanwhile."""
        pictures = self.renderer.sample([row.prompt.text for row in rows], [row.seed for row in rows])
        if None in pictures:
            raise Stopped("out of memory drawing one picture: give a lower --max_plan_tokens, or ZeRO-3")
        found = [
            Sample(row.prompt, picture.text, f"{row.prompt.text}. {picture.text}", (picture.image,))
            for row, picture in zip(rows, pictures, strict=True)
        ]
        return found, pictures

    @contextmanager
    def drawing_policy(self) -> Iterator[None]:
        """All weights are there, because processes do not sample in step."""
        with whole(self.net, self.accelerator):
            yield

    def evaluate(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """Pictures with the weights that are in place."""
        with self.drawing_policy():
            return self.renderer(texts, seeds)

    def accuracy(self, questions: Sequence[Question]) -> dict[str, float]:
        """Share of right answers to questions about pictures."""
        with self.drawing_policy():
            said = self.janus.says_yes([one.text for one in questions], [one.picture for one in questions])
        right = sum(one.is_yes == yes for one, yes in zip(questions, said, strict=True))
        return {"eval/understanding": right / len(questions)}

    def more_columns(self, batch: Batch) -> Mapping[str, tuple[float, list[float]]]:
        """STAGE rewards a picture whose tokens keep the entropy that the reference has for them."""
        if not self.script.token_similarity:
            return {}
        kept = []
        for chunk in self._chunks(batch, torch.zeros(len(batch.samples))):
            now, then = self._scores(chunk)[1], self._scores(chunk, self.start)[1]
            kept += bicot.stability(now.entropy, then.entropy).tolist()
        return {"stability": (bicot.STABILITY, kept)}

    # Updates: what scored above its group's mean becomes likelier

    def update(self, step: int, batch: Batch, advantages: Tensor, loop: Loop) -> dict[str, float]:
        """The optimiser steps of one rollout; returns means of what was seen."""
        parts, seen = self.groups.updates_per_rollout, {}
        chunks = self._chunks(batch, advantages.to(self.accelerator.device))
        self.janus.train()
        for chunk in chunks if parts > 1 else ():
            chunk.old = self._scores(chunk)
        for part in range(parts):
            for chunk in chunks[part::parts]:
                reference = self._scores(chunk, self.start) if self.groups.beta else None
                with self.accelerator.accumulate(self.net):
                    new = self._forward(self.net, chunk)
                    loss, metrics = self._loss(chunk, new, reference)
                    self.accelerator.backward(loss)
                for name, value in {"loss": float(loss.detach()), **metrics}.items():
                    seen.setdefault(name, []).append(value)
            self._compare_with_sampled(seen)
            loop.optimizer_step(self.optimizer, self.loop_options.max_grad_norm)
            self.ema.follow(self.loop_options.ema_decay)
        self.janus.eval()
        plans = [picture.plan for drawn in batch.drawn for picture in drawn]
        cut = [len(ids) == self.script.max_plan_tokens and ids[-1] != self.janus.eos for ids in plans]
        lengths = sum(map(len, plans)) / len(plans)
        return {**means(seen), "plans/tokens": lengths, "plans/cut": sum(cut) / len(cut)}

    def _chunks(self, batch: Batch, advantages: Tensor) -> list[Chunk]:
        """The rollout in parts of `train_batch_size`."""
        pictures = [one for drawn in batch.drawn for one in drawn]
        size, janus = self.script.train_batch_size, self.janus
        cosine = None
        if self.script.token_similarity:
            tokens = torch.tensor([one.tokens for one in pictures], device=janus.device)
            cosine = bicot.likeness(janus.codes(tokens), advantages.to(janus.device), self.groups.num_generations)
        chunks = []
        for first in range(0, len(pictures), size):
            rows = pictures[first : first + size]
            plans = part_of([one.plan_prefix for one in rows], [one.plan for one in rows], janus.pad)
            images = part_of([one.prefix for one in rows], [one.tokens for one in rows], janus.pad)
            width = plans.answer.shape[1]
            written = [[*one.plan_log_probs, *[0.0] * (width - len(one.plan))] for one in rows]
            sampled = torch.tensor(written), torch.tensor([one.log_probs for one in rows])
            chunks.append(Chunk(
                plans.to(janus.device) if self.script.levels != "tokens" else None,
                images.to(janus.device) if self.script.levels != "plan" else None,
                tuple(part.to(janus.device) for part in sampled), advantages[first : first + size],
                None if cosine is None else cosine[first : first + size], None,
            ))  # fmt: skip
        return chunks

    def _forward(self, net: torch.nn.Module, chunk: Chunk) -> tuple[Scored | None, Scored | None]:
        guidance = self.script.guidance if self.script.logprob == "guided" else 1.0
        return net(
            chunk.plan, chunk.image, guidance=guidance,
            temperatures=(self.script.temperature, self.script.image_temperature),
        )  # fmt: skip

    @torch.no_grad()
    def _scores(self, chunk: Chunk, copy: Shadow | None = None) -> tuple[Scored | None, Scored | None]:
        """Without gradient: of the weights as they are, or of a copy, embeddings and all."""
        if copy is None:
            return self._forward(self.net, chunk)
        with copy.in_place():
            return self._forward(self.net, chunk)

    def _loss(
        self, chunk: Chunk, new: Sequence[Scored | None], reference: Sequence[Scored | None] | None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a chunk, and what there is to say of both levels."""
        levels, metrics, script = [], {}, self.script
        config = self.janus.model.config
        vocabularies = (config.text_config.vocab_size, config.vq_config.num_embeddings)
        for i, (name, part, scored) in enumerate(zip(("plan", "image"), (chunk.plan, chunk.image), new, strict=True)):
            if part is None:
                continue
            old = scored.log_prob.detach() if chunk.old is None else chunk.old[i].log_prob
            advantage = bicot.by_entropy(
                chunk.advantage, scored.entropy, part.mask, vocabularies[i], script.entropy_mask,
                script.entropy_bonus,
            )  # fmt: skip
            found = bicot.policy_loss(scored.log_prob, old, advantage, self.clip)
            similar = name == "image" and chunk.cosine is not None
            loss = found.loss * bicot.learning_weight(chunk.cosine) if similar else found.loss
            said = {
                f"entropy/{name}": scored.entropy, f"ratio/{name}": found.ratio, f"clipped/{name}": found.clipped,
                f"sampled_gap/{name}": (scored.log_prob - chunk.sampled[i]).abs(),
            }  # fmt: skip
            if reference is not None:
                kl = bicot.k3(scored.log_prob, reference[i].log_prob)
                loss = loss + self.groups.beta * kl * (bicot.penalty_weight(chunk.cosine) if similar else 1)
                said[f"kl/{name}"] = kl
            levels.append(bicot.Level(loss, part.mask))
            metrics |= {
                key: float((value.detach() * part.mask).sum() / part.mask.sum()) for key, value in said.items()
            }
            metrics["output_norm"] = float(scored.norm)
        return bicot.join(levels, script.token_weight), metrics

    def _compare_with_sampled(self, seen: Mapping[str, Sequence[float]]) -> None:
        """Before the first update of a process: the log-probabilities that were sampled must come again."""
        if self.is_checked:
            return
        self.is_checked = True
        is_sampled = self.script.guidance == 1 or self.script.logprob == "guided"
        names = [f"sampled_gap/{name}" for name in ("plan", *(["image"] if is_sampled else []))]
        gaps = gather_object([gap for name in names if name in seen for gap in seen[name]])
        gap, allowed = max(gaps, default=0.0), 1e-4 if self.janus.model.dtype == torch.float32 else 0.05
        if not gap <= allowed:
            raise UserError(
                f"replayed log-probabilities differ by {gap:.2g} from the sampled ones on average (allowed: "
                f"{allowed:g}), so what learns is not what drew: give --dtype float32, or report the model"
            )

    def write(self, folder: Path) -> None:
        """The weights of now in a Janus folder, a LoRA merged; every process calls it, one writes."""
        state = whole_state(self.net, self.accelerator)
        if self.accelerator.is_main_process:
            self.janus.keep_settings(self.script.settings())
            self.janus.save(folder, merged(state, self.loop_options))


def choose_weights(janus: Janus, script: JanusArguments, loop: LoopArguments) -> list[torch.nn.Parameter]:
    """What is trained, as published: the language model with the heads of the levels that learn."""
    janus.requires_grad_(False)
    language = janus.model.model.language_model
    make_trainable(language, loop)
    if loop.gradient_checkpointing:
        language.gradient_checkpointing_enable()
    heads = [janus.model.lm_head] if script.levels != "tokens" and not loop.use_peft else []
    if script.train_generation_head and script.levels != "plan":
        heads.append(janus.model.model.generation_head)
    for head in heads:
        head.float().requires_grad_(True)
    return [weight for weight in janus.parameters() if weight.requires_grad]


# One run ---------------------------------------------------------------------------------------------------------


def train(options: Options) -> None:
    """One run, from options to trained weights and report; see `group_training.run`."""
    questions = load_questions(options.script.questions) if options.script.questions else []
    setup, renderer = prepare(options)
    method = T2IR1(options, setup, renderer)
    measures = [lambda: method.accuracy(questions)] if questions else []
    run(setup, method, method.evaluate, method.janus, measures)


def prepare(options: Options) -> tuple[Setup, JanusRenderer]:
    """All that a run needs but its method; bad input is refused before any model is loaded where that is possible."""
    groups, script = options.groups, options.script
    groups.check_rewards(options.reward)
    if script.token_similarity and script.levels == "plan":
        raise UserError(
            "--token_similarity true weighs image tokens, and with --levels plan none learn: leave one out"
        )
    prompts = load_prompts(groups.data)
    watched = options.watch.prompts(prompts)
    numbers = plan(options, len(prompts), processes())
    find_janus(script.model_path)
    most = longest_prefix(script.model_path, [prompt.text for prompt in (*prompts, *watched)], script.max_plan_tokens)
    render = RenderOptions(
        sdmodel_name=script.model_path, render_dtype=script.dtype, render_plan=True,
        render_batch_size=script.image_batch if isinstance(script.image_batch, int) else 1,
    )  # fmt: skip
    parts = tuple(vars(options).values())

    def contents(device: str) -> Contents:
        return janus_contents(script.model_path)

    setup = set_up(
        parts, numbers, script.train_batch_size, contents, announce(options, numbers, most), prompts, watched
    )
    renderer = load_janus_renderer(render, setup.device)
    renderer.settings = script.settings()
    if script.image_batch == AUTO:
        print(f"image_batch: {renderer.choose_batch_size()}", flush=True)
    return setup, renderer


def announce(options: Options, numbers: Mapping[str, int], longest: int) -> list[str]:
    """What is about to run, in lines."""
    groups, script, loop = options.groups, options.script, options.loop
    learning = {"both": "plans and image tokens learn", "plan": "plans learn", "tokens": "image tokens learn"}
    return [
        *groups.announce(numbers, learning[script.levels]),
        f"{f'a LoRA of rank {loop.lora_r}' if loop.use_peft else 'the language model'}; at most {longest} tokens of "
        f"text before an image; guidance {script.guidance:g}; seed {loop.seed}; all options: {loop.outdir}/run.json",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main("t2i_r1", lambda: train(parse_options(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
