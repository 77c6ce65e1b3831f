"""`scripts/bench.py --target gpu`: real shapes with random weights against the ceiling of the device and a plain loop.

The ceiling (products of large matrices in bfloat16, measured), one GRPO step split by phase beside the plain loop, and
pictures a second for every side, number of steps and batch. Cells are measured by importance, the recipe's own first;
what does not fit in memory or in the time that is left is a row with that reason.

The share of the ceiling is counted FLOPs (scripts/bench_models.py) over seconds. The plain loop is run with the
recipe's denoising steps and with RePrompt's: `ratio_to_plain_loop` and `ratio_to_published_steps`. Drawing and scoring
go through `LocalRenderer` and `Scorer`, as in training. The step's learning is this file's own: LoRA and AdamW on the
policy gradient of given advantages, without TRL around it; one GPU has no room for full fine-tuning beside FLUX and an
ORM.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from data.prompts import load_prompts
from interfaces import Prompt
from prompting import completion
from rendering import RenderOptions
from rendering.local import LocalRenderer
from scoring.drawing import Drawer
from scoring.rollouts import Scorer
from scripts.bench import ROOT, plain_loop
from scripts.bench_models import REWARDS, Flops, NoRoom, Scale, count_flops, flux, free, policy, reward

# TFLOP/s of dense bfloat16 by NVIDIA's data sheets; the first part of a name that fits counts.
PUBLISHED = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362,
             "B200": 2250}  # fmt: skip
STEP_SHARE = 0.45  # of the time, at most, that the GRPO step and its plain loop are given
PLAIN_ROLLOUTS = 4  # of the plain loop, whose time is proportional to them
LORA_RANK = 64


class Clock:
    """Minutes that may be used."""

    def __init__(self, minutes: float):
        self.until = time.perf_counter() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.perf_counter()


@dataclass
class Row:
    """One line; None is what was not measured, and `skipped` says why.

    Attributes:
        what: "draw", a phase of the step, or "plain loop".
        share, share_published: counted FLOPs over seconds, as shares of the measured and of the published ceiling.
        peak_gb: the most memory that tensors had, weights included, 10^9 bytes.
    """

    what: str
    side: int | None = None
    steps: int | None = None
    batch: int | None = None
    seconds: float | None = None
    images_per_s: float | None = None
    tflops: float | None = None
    share: float | None = None
    share_published: float | None = None
    peak_gb: float | None = None
    skipped: str = ""


def bench_gpu(scale: Scale, minutes: float, device: torch.device) -> dict:
    """The whole measurement as plain data; `rows` is its table."""
    clock = Clock(minutes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    published = next((value for part, value in PUBLISHED.items() if part in name), None)
    ceiling = matmul_rate(scale.matrix, device)
    flops = count_flops(scale)
    found = {
        "target": "gpu", "scale": scale.name, "device": name, "torch": torch.__version__,
        "memory_gb": free(device) / 1e9,
        "ceiling_tflops": ceiling / 1e12,
        "ceiling_published_tflops": published,
        "tflop_of_a_step": {side: count / 1e12 for side, count in flops.step.items()},
        "of_it_attention": {side: flops.attention[side] / count for side, count in flops.step.items()},
        "tflop_of_text": flops.text / 1e12,
        "tflop_of_decoding": {side: count / 1e12 for side, count in flops.decode.items()},
        "memory": "peak of tensors" if device.type == "cuda" else "not measured on a CPU",
    }  # fmt: skip
    rows: list[Row] = []
    try:
        renderer = _renderer(flux(scale, device), scale, *scale.recipe[1:], device)
    except NoRoom as error:
        return {**found, "rows": [asdict(Row("everything", skipped=f"FLUX {error}"))]}
    meter = Meter(renderer, flops, ceiling, published, device)
    first, *others = cells(scale)
    rows.append(meter.cell(*first, clock.left))
    rows += grpo_step(scale, renderer, device, STEP_SHARE * clock.left)
    rows += [meter.cell(*cell, clock.left) for cell in tqdm(others, desc="cells", leave=False)]
    return {
        **found,
        "rows": [asdict(row) for row in rows],
        "ratio_to_plain_loop": _ratio(rows, scale.recipe[1]),
        "ratio_to_published_steps": _ratio(rows, scale.published_steps),
        "share_outside_drawing": _outside(rows),
    }


def matmul_rate(side: int, device: torch.device) -> float:
    """FLOP/s of the product of two square bfloat16 matrices, the best of 3 times 10."""
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            one @ other

    ten()
    return max(10 * 2 * side**3 / _timed(ten, device) for _ in range(3))


def cells(scale: Scale) -> list[tuple[int, int, int]]:
    """(side, steps, batch), the recipe's first, then what differs from it in one respect, in two, in three."""
    every = itertools.product(scale.sides, scale.steps, scale.batches)
    return sorted(
        every, key=lambda cell: (sum(a != b for a, b in zip(cell, scale.recipe, strict=True)), _cost(cell), cell)
    )


def _cost(cell: tuple[int, int, int]) -> int:
    side, steps, batch = cell
    return side**2 * steps * batch


def _renderer(pipe: FluxPipeline, scale: Scale, steps: int, batch: int, device: torch.device) -> LocalRenderer:
    options = RenderOptions(
        resolution=scale.recipe[0],
        render_steps=steps,
        render_batch_size=batch,
        max_sequence_length=scale.text,
        guidance=3.5,
    )
    return options.load(str(device), pipe=pipe)


# Drawing ----------------------------------------------------------------------------------------------------------


class Meter:
    """Draws cells and knows what their FLOPs are."""

    def __init__(
        self, renderer: LocalRenderer, flops: Flops, ceiling: float, published: float | None, device: torch.device
    ):
        self.renderer, self.flops, self.device = renderer, flops, device
        self.ceiling, self.published = ceiling, published
        self.rate = 0.25 * ceiling  # FLOP/s of drawing: a guess for the first cell, then what the last one had

    def cell(self, side: int, steps: int, batch: int, left: float) -> Row:
        """One call of `batch` pictures, after one of a single step that warms up; skipped above `left` seconds."""
        row = Row("draw", side, steps, batch)
        work = batch * self.flops.picture(side, steps)
        expected = work / self.rate * (1 + 1 / steps)
        if expected > left:
            row.skipped = f"would take about {expected:.0f} s, {max(0, left):.0f} s are left"
            return row
        seconds = self.renderer.trial(batch, 1.0, height=side, width=side, num_inference_steps=steps)
        row.peak_gb = _peak(self.device)
        if seconds is None:
            row.skipped = f"{batch} pictures do not fit: {_resident(self.device)} were in use before"
            return row
        row.seconds = batch * seconds
        self.rate = work / row.seconds
        row.images_per_s, row.tflops, row.share = 1 / seconds, self.rate / 1e12, self.rate / self.ceiling
        row.share_published = self.rate / (self.published * 1e12) if self.published else None
        return row


def _rewrite(start: str, index: int) -> str:
    return f"{start}, version {index}, painted with care, in soft light, on a plain ground, all of it in focus"


# One GRPO step ----------------------------------------------------------------------------------------------------


def grpo_step(scale: Scale, renderer: LocalRenderer, device: torch.device, seconds: float) -> list[Row]:
    """A row a phase of one step, then the plain loop; phases that do not fit are skipped, the others go on."""
    until = time.perf_counter() + seconds
    side, steps, batch = scale.recipe
    renderer.chunk_size = batch
    rows = list(_learning(scale, device, until))
    rewards, lacking = [], []
    for name in REWARDS:
        try:
            rewards.append(reward(name, scale, device))
        except NoRoom as error:
            lacking.append(Row(f"score {name}", skipped=str(error)))
    rows += [*_scoring(scale, renderer, rewards, device, until), *lacking]
    return rows


def _learning(scale: Scale, device: torch.device, until: float) -> Iterator[Row]:
    """Sampling with HF generate, and learning from what was sampled."""
    generating, training = Row("generate", batch=scale.rollouts), Row("train, LoRA", batch=scale.rollouts)
    try:
        model = get_peft_model(policy(scale, device), LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK))
        ids = torch.randint(1, scale.policy["vocab_size"], (scale.rollouts, scale.prompt), device=device)
        length = scale.completion
        with torch.inference_mode():
            _fill(generating, device, lambda: model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, min_new_tokens=length,
                max_new_tokens=length))  # fmt: skip
        written = torch.randint(1, scale.policy["vocab_size"], (scale.rollouts, length), device=device)
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-6)
        step = lambda: learn(model, optimizer, torch.cat([ids, written], 1), length, scale.micro)  # noqa: E731
        step()  # the optimiser's states come with the first
        _fill(training, device, step)
    except (NoRoom, torch.OutOfMemoryError) as error:
        for row in (generating, training):
            if row.seconds is None:
                row.skipped = _reason(error, device)
    yield from (generating, training)


def learn(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids_BT: torch.Tensor, length: int, micro: int
) -> None:
    """One on-policy step, where every ratio is 1: minimise -mean(advantage x log p(token)), `micro` rows at a time."""
    advantages = torch.linspace(-1, 1, len(ids_BT), device=ids_BT.device)
    for rows, weights in zip(ids_BT.split(micro), advantages.split(micro), strict=True):
        logits_BTV = model(input_ids=rows, logits_to_keep=length + 1).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), rows[:, -length:].flatten(),
                                                   reduction="none")  # fmt: skip
        (weights.repeat_interleave(length) * losses).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _scoring(
    scale: Scale, renderer: LocalRenderer, rewards: Sequence, device: torch.device, until: float
) -> Iterator[Row]:
    """Drawing and scoring as in training; then rollout by rollout, each reward drawing for itself."""
    prompts = load_prompts(ROOT / "miniature" / "prompts" / "train.txt")[: scale.rollouts // scale.group]
    asked = [prompt for prompt in prompts for _ in range(scale.group)]
    written = [completion("What is asked for, plainly.", _rewrite(p.text, i)) for i, p in enumerate(asked)]
    peaks = Peaks(device)
    scorer = Scorer(Drawer(renderer, group=scale.group), rewards, {p.id: p for p in prompts}, enter=peaks.enter)
    scorer.score(written[: scale.group], [p.id for p in asked[: scale.group]], 1)  # warms up, off the clock
    scorer.score(written, [p.id for p in asked], 2)
    peaks.enter("end", 2)
    side, steps, batch = scale.recipe
    if renderer.failures:  # random weights that overflow: nothing would be scored, and fast
        yield Row("render", side, steps, batch, skipped=f"not drawn: {dict(renderer.failures)}")
        return
    drawn = int(scorer.metrics["images/drawn"])
    render = scorer.metrics["seconds/render"]
    yield Row("render", side, steps, renderer.chunk_size, render, drawn / render, peak_gb=peaks.of("render"))
    yield Row("score", batch=drawn, seconds=scorer.metrics["seconds/score"], peak_gb=peaks.of("score"),
              skipped="" if rewards else "no reward's model fitted")  # fmt: skip
    for plain_steps in (steps, scale.published_steps):
        one = _renderer(FluxPipeline(**renderer.pipe.components), scale, plain_steps, 1, device)  # the same weights
        expected = render / drawn * steps_alone(rewards) * plain_steps / steps
        yield _plain(Row("plain loop", side, plain_steps, 1), one, rewards, asked, written, expected, until)


def steps_alone(rewards: Sequence) -> int:
    """Pictures that the plain loop draws for one rollout."""
    return sum(one.needs_images for one in rewards)


def _plain(
    row: Row,
    renderer: LocalRenderer,
    rewards: Sequence,
    asked: Sequence[Prompt],
    written: Sequence[str],
    expected: float,
    until: float,
) -> Row:
    """The plain loop over PLAIN_ROLLOUTS rollouts, fewer if time is short; seconds are those of as many as above.

    Args:
        expected: seconds of one rollout.
        until: when to be done, of `time.perf_counter()`.
    """
    left = until - time.perf_counter()
    count = min(PLAIN_ROLLOUTS, len(asked), int(left / expected) - 1 if expected else 0)  # 1 to warm up
    if count < 1:
        row.skipped = f"two rollouts would take about {2 * expected:.0f} s, {max(0, left):.0f} s are left"
        return row
    _reset_peak(renderer.device)
    plain_loop(renderer, rewards, asked[:1], written[:1])
    seconds = plain_loop(renderer, rewards, asked[:count], written[:count])
    row.peak_gb = _peak(renderer.device)
    row.seconds = seconds / count * len(asked)
    row.images_per_s = steps_alone(rewards) * count / seconds
    return row


class Peaks:
    """The most memory of each phase that a `Scorer` announces."""

    def __init__(self, device: torch.device):
        self.device, self.phase = device, ""
        self.most: dict[str, float | None] = {}

    def enter(self, phase: str, step: int) -> None:
        if self.phase:
            self.most[self.phase] = _peak(self.device)
        self.phase = phase
        _reset_peak(self.device)

    def of(self, start: str) -> float | None:
        """Of all phases that begin so; None where memory is not measured."""
        found = [most for phase, most in self.most.items() if phase.startswith(start) and most is not None]
        return max(found, default=None)


def _ratio(rows: Sequence[Row], plain_steps: int) -> float | None:
    """Seconds to draw and score in the plain loop of `plain_steps` steps over those of `Scorer`."""
    ours = _seconds(rows, "render", "score")
    plain = next((row.seconds for row in rows if (row.what, row.steps) == ("plain loop", plain_steps)), None)
    return None if ours is None or plain is None else plain / ours


def _outside(rows: Sequence[Row]) -> float | None:
    """The share of a step's seconds that is not drawing."""
    whole, drawing = _seconds(rows, "generate", "render", "score", "train, LoRA"), _seconds(rows, "render")
    return None if whole is None or drawing is None else 1 - drawing / whole


def _seconds(rows: Sequence[Row], *phases: str) -> float | None:
    """Of all phases; None if one was not measured."""
    found = {row.what: row.seconds for row in rows}
    seconds = [found.get(phase) for phase in phases]
    return None if None in seconds else sum(seconds)


# The device -------------------------------------------------------------------------------------------------------


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _fill(row: Row, device: torch.device, call: Callable[[], object]) -> None:
    _reset_peak(device)
    seconds = _timed(call, device)
    row.seconds, row.peak_gb = seconds, _peak(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def _resident(device: torch.device) -> str:
    if device.type != "cuda":
        return "an unknown number of GB"
    used, total = torch.cuda.memory_allocated(device) / 1e9, torch.cuda.mem_get_info(device)[1] / 1e9
    return f"{used:.1f} of {total:.1f} GB"


def _reason(error: Exception, device: torch.device) -> str:
    return str(error) if isinstance(error, NoRoom) else f"out of memory, {_resident(device)} were in use"


# The table --------------------------------------------------------------------------------------------------------

COLUMNS = ("what", "px", "steps", "batch", "s", "img/s", "TFLOP/s", "of meas.", "of publ.", "peak GB")


def table(rows: Sequence[dict]) -> str:
    """Lines for a terminal; what was skipped has its reason in place of figures."""
    lines = ["".join(f"{name:>10s}" if name != "what" else f"{name:14s}" for name in COLUMNS)]
    for row in rows:
        head = f"{row['what']:14s}" + "".join(_cell(row[key], "d") for key in ("side", "steps", "batch"))
        if row["skipped"]:
            lines.append(f"{head}    skipped: {row['skipped']}")
            continue
        shares = "".join(_cell(row[key], ".1%") for key in ("share", "share_published"))
        figures = _cell(row["seconds"], ".3f") + _cell(row["images_per_s"], ".3f") + _cell(row["tflops"], ".2f")
        lines.append(head + figures + shares + _cell(row["peak_gb"], ".1f"))
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>10s}"
