"""`scripts/bench.py --target gpu`: drawing and one GRPO step, real shapes with random weights, against the ceiling.

The ceiling is the product of large bfloat16 matrices, measured. Rows: drawing with the recipe's settings; each phase
of one GRPO step; the same rollouts in a plain loop; drawing with all other sides and batches. `share` is FLOPs over
seconds as a share of the ceiling. What does not fit in memory or in the time that is left is a row with that reason.

Learning is LoRA and AdamW on a loss that costs what GRPO's costs. A reward is a forward pass of its model on random
pixels of the size that it reads; the preparation of pictures and words is not measured.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import diffusers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.prompts import load_prompts
from interfaces import Reward, Sample
from prompting import completion
from rendering import RenderOptions, load_renderer
from rendering.local import LocalRenderer
from rewards import RewardContext, build
from run.seeds import render_seed
from scripts.bench_common import MINIATURE, MINIATURE_REWARDS, ROOT, measure, plain_loop

REWARDS = ("hps", "gdino", "git")  # the recipe's that look at pictures
PLAIN_ROLLOUTS = 2  # measured of the plain loop, whose time is proportional to them


@dataclass(frozen=True)
class Scale:
    """Models, each a function that loads one onto a device, and the sizes that are measured with them."""

    pipe: Callable[[torch.device], diffusers.FluxPipeline]
    policy: Callable[[torch.device], transformers.PreTrainedModel]
    reward: Callable[[str, torch.device], Reward]
    sides: tuple[int, ...]  # pixels; the first of sides and batches is the recipe's
    batches: tuple[int, ...]
    steps: int  # of denoising
    text: int  # tokens that the renderer reads
    rollouts: int  # of one process in a GRPO step, in two groups; a quarter of them is learnt from at once
    prompt: int  # tokens
    completion: int
    matrix: int  # side of the matrices whose product is the ceiling


def flux(device: torch.device) -> diffusers.FluxPipeline:
    """FLUX.1-dev in bfloat16, the same weights at every call; its tokenizers are the miniature's."""
    torch.manual_seed(0)
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    t5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    vae = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    }  # fmt: skip
    with torch.device(device):
        parts = {
            "transformer": diffusers.FluxTransformer2DModel(guidance_embeds=True),
            "vae": diffusers.AutoencoderKL(**vae),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip)),
            "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(**t5)),
        }
    parts = {name: part.to(torch.bfloat16).eval() for name, part in parts.items()}
    for name, length in (("tokenizer", 77), ("tokenizer_2", 512)):
        folder = ROOT / "miniature" / "weights" / "flux" / name
        parts[name] = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=length)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler=scheduler, **parts)


def qwen(device: torch.device) -> transformers.PreTrainedModel:
    """Qwen2.5-3B in bfloat16."""
    config = transformers.Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)


class RandomReward(Reward):
    """The picture's way through a reward's model in float32: CLIP ViT-H-14, GIT-large or GroundingDINO-tiny."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.side = {"hps": 224, "git": 420, "gdino": 800}[name]
        patches = {"num_attention_heads": 16, "patch_size": 14, "image_size": self.side}
        huge = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, **patches}
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, **patches}
        with torch.device(device):
            self.model = {
                "hps": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**huge)),
                "git": lambda: transformers.GitForCausalLM(transformers.GitConfig(vision_config=large)),
                "gdino": lambda: transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig()),
            }[name]().eval()

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        for pixels in torch.rand(len(samples), 3, self.side, self.side, device=self.device).split(8):
            words = torch.ones(len(pixels), 16, dtype=torch.long, device=self.device)
            self.model(pixel_values=pixels, **({} if self.name == "hps" else {"input_ids": words}))
        return [0.0] * len(samples)


REAL = Scale(
    flux, qwen, RandomReward, sides=(512, 1024), batches=(8, 1, 2, 4, 16), steps=20, text=256,
    rollouts=16, prompt=350, completion=512, matrix=8192,
)  # fmt: skip
TINY = Scale(
    pipe=lambda device: diffusers.FluxPipeline.from_pretrained(ROOT / MINIATURE["sdmodel_name"], dtype=torch.bfloat16),
    policy=lambda device: transformers.AutoModelForCausalLM.from_pretrained(ROOT / MINIATURE["gpt_path"]).to(device),
    reward=lambda name, device: build([name], MINIATURE_REWARDS, RewardContext(str(device)))[0],
    sides=(48, 32), batches=(2, 1), steps=2, text=32, rollouts=8, prompt=8, completion=6, matrix=256,
)  # fmt: skip
SCALES = {"real": REAL, "tiny": TINY}


def bench_gpu(scale: Scale, minutes: float, device: torch.device) -> dict:
    """All figures; `rows` is their table."""
    until = time.perf_counter() + 60 * minutes
    ceiling = matmul_rate(scale.matrix, device)
    renderer = _renderer(scale.pipe(device), scale, scale.batches[0], device)
    counts = {side: count_flops(renderer, side) for side in scale.sides}
    flops = {side: scale.steps * step + once for side, (step, once) in counts.items()}
    recipe, *others = itertools.product(scale.sides, scale.batches)
    draw = partial(drawing, renderer, flops, ceiling, until)
    rows = [draw(recipe)]
    try:
        rows += grpo_step(scale, renderer, device, until)
    except torch.OutOfMemoryError:
        rows.append({"what": "GRPO step", "skipped": "its models do not fit beside FLUX"})
    rows += [draw(cell) for cell in tqdm(others, desc="cells", leave=False)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "ceiling_tflops": ceiling / 1e12, **ratios(rows), "rows": rows}


def matmul_rate(side: int, device: torch.device) -> float:
    """FLOP/s of the product of two square bfloat16 matrices, the best of 3 times 10."""
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    one @ other
    seconds = min(measure(lambda: [one @ other for _ in range(10)], device)["seconds"] for _ in range(3))
    return 10 * 2 * side**3 / seconds


def _renderer(pipe: diffusers.FluxPipeline, scale: Scale, batch: int, device: torch.device) -> LocalRenderer:
    sizes = {"resolution": scale.sides[0], "render_steps": scale.steps, "max_sequence_length": scale.text}
    options = RenderOptions(render_batch_size=batch, **sizes)
    return load_renderer(options, str(device), pipe=pipe)


def count_flops(renderer: LocalRenderer, side: int) -> tuple[int, int]:
    """FLOPs of one picture: of each denoising step, and of all else (text and decoding)."""
    counts = []
    for steps in (1, 1, 2):  # the renderer's first trial also reads a text alone, to learn its shape
        with FlopCounterMode(display=False) as counter:
            renderer.trial(1, 1.0, height=side, width=side, num_inference_steps=steps)
        counts.append(counter.get_total_flops())
    step = counts[2] - counts[1]
    return step, counts[1] // 2 - step  # a trial draws twice: first with one step, to warm up


def attempt(row: dict, work: Callable[[], object], device: torch.device, until: float, expected: float = 0) -> dict:
    """`row` with seconds and memory of `work`, which should take `expected` seconds, or with what stood against it."""
    left = until - time.perf_counter()
    if expected > left:
        return {**row, "skipped": f"would take about {expected:.0f} s, {max(0, left):.0f} s are left"}
    try:
        return {**row, **measure(work, device)}
    except torch.OutOfMemoryError:
        return {**row, "skipped": "out of memory"}


def drawing(renderer: LocalRenderer, flops: dict[int, int], ceiling: float, until: float, cell: Sequence[int]) -> dict:
    """The row of one call, for a cell of (side, batch); it should reach a quarter of the ceiling."""
    side, batch = cell
    work, seconds = batch * flops[side], []
    trial = partial(renderer.trial, batch, 1.0, height=side, width=side)
    row = {"what": "draw", "side": side, "batch": batch}
    row = attempt(row, lambda: seconds.append(trial()), renderer.device, until, 4 * work / ceiling)
    if "skipped" in row:
        return row
    if seconds[0] is None:
        return {**row, "seconds": None, "skipped": f"{batch} pictures do not fit"}
    taken = batch * seconds[0]
    return {**row, "seconds": taken, "images_per_s": batch / taken, "tflops": work / taken / 1e12,
            "share": work / taken / ceiling}  # fmt: skip


def grpo_step(scale: Scale, renderer: LocalRenderer, device: torch.device, until: float) -> list[dict]:
    """A row for each phase of one step, then one for the plain loop."""
    rows = learning(scale, device, until)
    prompts = load_prompts(ROOT / MINIATURE["data"])[:2]
    asked = [prompt for prompt in prompts for _ in range(scale.rollouts // 2)]
    texts = [f"{p.text}, version {i}, painted in soft light, all of it in focus" for i, p in enumerate(asked)]
    rewards = [scale.reward(name, device) for name in REWARDS]
    renderer.chunk_size, drawn = scale.batches[0], []
    row = {"what": "render", "side": scale.sides[0], "batch": len(texts)}
    seeds = [render_seed(0, prompt.id, 1, 0) for prompt in asked]
    render = attempt(row, lambda: drawn.extend(renderer(texts, seeds)), device, until)
    if "skipped" in render or None in drawn:  # random weights may overflow: nothing would be scored, and fast
        return [*rows, {**row, "skipped": render.get("skipped", f"not drawn: {dict(renderer.failures)}")}]
    rows.append(render)
    samples = [Sample(*row, (image,)) for *row, image in zip(asked, texts, texts, drawn, strict=True)]
    for reward in rewards:
        reward(samples[:1])  # warm up, off the clock
        row = {"what": f"score {reward.name}", "batch": len(samples)}
        rows.append(attempt(row, partial(reward, samples), device, until))
    written, count = [completion("As it is asked for.", text) for text in texts], PLAIN_ROLLOUTS
    one = _renderer(diffusers.FluxPipeline(**renderer.pipe.components), scale, 1, device)
    work = partial(plain_loop, one, rewards, asked[:count], written[:count])
    expected = count * len(rewards) * render["seconds"] / len(texts)
    row = attempt({"what": "plain loop", "batch": 1}, work, device, until, expected)
    return [*rows, row if "skipped" in row else {**row, "seconds": row["seconds"] / count * len(asked)}]


def learning(scale: Scale, device: torch.device, until: float) -> list[dict]:
    """Rows of sampling with HF generate, and of learning from as much text."""
    model = get_peft_model(scale.policy(device), LoraConfig(task_type="CAUSAL_LM", r=64))
    ids, length = torch.ones(scale.rollouts, scale.prompt, dtype=torch.long, device=device), scale.completion
    sampling = {"attention_mask": ids, "do_sample": True, "min_new_tokens": length, "max_new_tokens": length}
    generate = attempt({"what": "generate"}, lambda: model.generate(input_ids=ids, **sampling), device, until)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([part for part in model.train().parameters() if part.requires_grad], lr=1e-6)

    def step() -> None:
        for rows in torch.ones(scale.rollouts, scale.prompt + length, dtype=torch.long, device=device).chunk(4):
            logits = model(input_ids=rows, logits_to_keep=length).logits
            logits.float().log_softmax(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    attempt({}, step, device, until)  # warms up: AdamW's states come with the first step
    return [generate, attempt({"what": "train, LoRA"}, step, device, until)]


def ratios(rows: Sequence[dict]) -> dict[str, float]:
    """The plain loop over drawing and scoring, and the share of a step that is not drawing, where all was measured."""
    seconds = {row["what"]: row.get("seconds") for row in rows if row["what"] != "draw"}
    ours = [value for name, value in seconds.items() if name.startswith(("render", "score"))]
    whole = [*ours, seconds.get("generate"), seconds.get("train, LoRA")]
    if not ours or None in whole:
        return {}
    found = {"share_outside_drawing": 1 - seconds["render"] / sum(whole)}
    return found | ({"ratio_to_plain_loop": seconds["plain loop"] / sum(ours)} if seconds["plain loop"] else {})
