"""How much memory a run needs: weights, gradients, optimiser, KV cache and logits, from the shapes of its models.

All rows are summed as if alive at once. NOT counted are activations, CUDA's own context, fragmentation, and what the
options put elsewhere (`--render_device`, `--reward_device`, offloading). The sum should be good to 20 % for billions
of parameters, but no GPU has been compared with it. The tables hold published models that may not be on this disk.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from doctor.report import Plan
from models.hub import base_of, is_adapter, on_disk
from r1_prompter import Options
from rewards import CHECKPOINTS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FOUR_BIT = 0.5 + 4 / 64  # nf4, and one float32 scale for each block of 64 (bitsandbytes)
QUANTIZED = {"fp8": 1, "fp8_weights": 1, "int8": 1, "nf4": FOUR_BIT}
ZERO_BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL's fused head computes logits in tiles of this size
PROMPT = 300  # tokens of the instructions and a prompt, about


@dataclass(frozen=True)
class Policy:
    """A decoder; `keys` is the width of its keys, and of its values, `inner` that of its MLPs."""

    parameters: int
    layers: int
    width: int
    keys: int
    inner: int
    vocabulary: int


POLICIES = {
    "Qwen/Qwen2.5-0.5B-Instruct": Policy(494_032_768, 24, 896, 128, 4864, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": Policy(1_543_714_304, 28, 1536, 256, 8960, 151936),
    "Qwen/Qwen2.5-3B-Instruct": Policy(3_085_938_688, 36, 2048, 256, 11008, 151936),
    "Qwen/Qwen2.5-7B-Instruct": Policy(7_615_616_512, 28, 3584, 512, 18944, 152064),
}
RENDERERS = {  # parameters of the denoiser, the text encoders, the VAE
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 4_885_371_136, 83_819_683),
    "black-forest-labs/FLUX.1-schnell": (11_891_178_560, 4_885_371_136, 83_819_683),
    "stabilityai/stable-diffusion-3.5-large": (8_146_280_768, 5_580_620_800, 83_819_683),
    "stabilityai/stable-diffusion-3.5-medium": (2_469_663_936, 5_580_620_800, 83_819_683),
    "Qwen/Qwen-Image": (20_430_401_088, 8_292_166_656, 126_892_531),
    "Tongyi-MAI/Z-Image-Turbo": (6_154_908_736, 4_022_468_096, 83_819_683),
}
SCORERS = {
    "hps": 986_109_441, "pickscore": 986_109_441, "imagereward": 446_206_689, "git": 394_855_482,
    "gdino": 172_250_626, "orm": 8_030_348_832,
}  # fmt: skip


def estimate(options: Options, plan: Plan) -> dict[str, int]:
    """Bytes on the GPU of each process, or of all processes in main memory where there is no GPU, by name."""
    render, reward = options.render, options.reward
    rows = policy_rows(options, plan, policy_of(options.script.gpt_path))
    if not render.remote and render.render_device is None:
        denoiser, encoders, vae = renderer_of(render.sdmodel_name)
        size = BYTES[render.render_dtype]
        rows["renderer's denoiser"] = int(denoiser * QUANTIZED.get(render.render_quantization, size))
        rows["renderer's text encoders"] = 0 if render.render_offload_text else encoders * size
        rows["renderer's VAE"] = vae * size
    scorers = {}
    for name, path in scorers_of(options).items():
        parameters = count(on_disk(path)) or SCORERS[name]
        scorers[f"reward {name}"] = parameters * BYTES[reward.orm_dtype if name == "orm" else "float32"]
    if reward.reward_device is None and render.render_device is None and scorers:
        rows |= {"rewards, one at a time": max(scorers.values())} if reward.reward_offload else scorers
    return rows if plan.gpus else {name: plan.processes * count for name, count in rows.items()}


def policy_rows(options: Options, plan: Plan, policy: Policy) -> dict[str, int]:
    """Bytes of the policy in one process.

    ZeRO-1 shares the optimiser's states among the processes, ZeRO-2 the gradients too. ZeRO-3 shares the weights, but
    gathers all of them to generate, so they count in full. DistributedDataParallel keeps gradients twice.
    """
    training, model, processes = options.training, options.model, plan.processes
    trained, size, states = trained_bytes(options, plan, policy)
    loaded, arithmetic = policy_sizes(options, plan)
    words, full = policy.vocabulary * policy.width, trained == policy.parameters
    weights = int(policy.parameters * (FOUR_BIT if model.load_in_4bit else 1 if model.load_in_8bit else loaded))
    rows = {"policy's weights": weights if full else weights + trained * size}
    if training.beta and full:
        rows["reference model"] = weights
    rows["gradients"] = trained * size * (2 if plan.zero == 0 and processes > 1 else 1)
    if plan.zero > 1:  # a share, and the bucket that is reduced
        rows["gradients"] = trained * size // processes + min(trained, ZERO_BUCKET) * size
    rows["optimiser"] = states // (processes if plan.zero else 1)

    batch, completion = training.per_device_train_batch_size, training.max_completion_length
    if not training.use_vllm:
        cached = batch * training.steps_per_generation * (PROMPT + completion)  # tokens
        rows["KV cache"] = 2 * policy.layers * policy.keys * cached * arithmetic
    elif training.vllm_mode == "colocate":
        rows["vLLM"] = int(training.vllm_gpu_memory_utilization * plan.memory)
    tile = min(batch * completion, TILE_TOKENS) * min(policy.vocabulary, TILE_WORDS) * arithmetic
    rows["logits"] = tile + (words * (4 + arithmetic) if full else 0)  # the head's gradient, and the cast of it
    return rows


def trained_bytes(options: Options, plan: Plan, policy: Policy) -> tuple[int, int, int]:
    """How many parameters are trained, the bytes of each, and the bytes of the optimiser's states of all processes.

    LoRA has rank x (inputs + outputs) of each layer that it adapts; all linear ones are counted, the most that can be.
    With ZeRO the states are float32 weights and Adam's two moments, without it two moments in the weights' type.
    """
    path, model = options.script.gpt_path, options.model
    trained, (size, _) = policy.parameters, policy_sizes(options, plan)
    if model.use_peft or is_adapter(path):
        sides = 9 * policy.width + 2 * policy.keys + 3 * policy.inner
        trained = count(Path(path)) if is_adapter(path) else policy.layers * model.lora_r * sides
        size = size if plan.zero else 4
    return trained, size, trained * (12 if plan.zero else 2 * size)


def checkpoint_bytes(options: Options, plan: Plan) -> int:
    trained, size, states = trained_bytes(options, plan, policy_of(options.script.gpt_path))
    return trained * size + (0 if options.training.save_only_model else states)


def policy_sizes(options: Options, plan: Plan) -> tuple[int, int]:
    """Bytes of a loaded parameter of the policy, and of a number in its arithmetic; DeepSpeed makes both the same."""
    stored = BYTES.get(options.model.dtype, 4)
    arithmetic = 2 if options.training.bf16 or options.training.fp16 else stored
    return arithmetic if plan.zero else stored, arithmetic


def policy_of(path: str) -> Policy:
    """The policy at `path`, or the base model of the adapter there."""
    path = base_of(path, None)[0] if is_adapter(path) else path
    folder = on_disk(path)
    if folder is None:
        return POLICIES[path]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    keys = config.get("num_key_value_heads", heads) * config.get("head_dim", width // heads)
    layers, inner, words = config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]
    return Policy(count(folder), layers, width, keys, inner, words)


def renderer_of(path: str) -> tuple[int, int, int]:
    """Parameters of the denoiser, the text encoders and the VAE of a diffusers pipeline."""
    folder = on_disk(path)
    if folder is None:
        return RENDERERS[path]
    denoiser = count(folder / "transformer") + count(folder / "unet")
    return denoiser, sum(map(count, folder.glob("text_encoder*"))), count(folder / "vae")


def scorers_of(options: Options) -> dict[str, str]:
    """The rewards with weights that the options name, and the path of each."""
    names = dict.fromkeys([*options.script.rewards, *options.script.held_out])
    own = asdict(options.reward)
    return {name: own[f"{name}_path"] or CHECKPOINTS[name][0] for name in names if name in CHECKPOINTS}


def count(folder: Path | None) -> int:
    """Parameters in the safetensors files of a folder, by their headers; 0 if there is none."""
    parameters = 0
    for file in folder.glob("*.safetensors") if folder else ():
        with safe_open(file, framework="pt") as tensors:
            parameters += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return parameters
