"""How much memory a run needs, phase by phase, from the shapes of its models alone: arithmetic, no weights, no device.

Weights, gradients and optimiser states are counted. What is alive for a moment is ESTIMATED by the formulas below,
whose coefficients were taken from small models on a CPU (tests/test_doctor.py takes them again); real kernels differ
by tens of per cent there. CONTEXT and SLACK are assumed, not measured. Bytes throughout; 1 GB is 10^9 of them.

A process generates, renders, scores, then trains; PHASES are the columns, a Row is a line, and a column's sum is what
is alive at once. Rows on one device form a Table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

PHASES = ("generate", "render", "score", "train")
GB = 10**9
CONTEXT = 600 * 10**6  # CUDA's own, a process: assumed
COMMUNICATION = 500 * 10**6  # NCCL's buffers of a process that has others: assumed
SLACK = 0.1  # of what comes and goes: blocks that the allocator holds and cannot use; assumed
ZERO_BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
LIVE_ZERO_3 = 10**9  # elements gathered at once; DeepSpeed's stage3_max_live_parameters
TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL's fused head: logits exist in tiles of this many tokens and words
FOUR_BIT = 0.5 + 4 / 64  # bytes: nf4 and one float32 scale for each block of 64 (bitsandbytes)
EIGHT_BIT = 1.0
OWN, MAIN = "each process", "main memory"


@dataclass(frozen=True)
class Policy:
    """A decoder: all its parameters, those of its embeddings (never quantised), and its widths.

    `keys` is the width of keys (and of values): key heads x head size.
    """

    parameters: int
    embeddings: int
    layers: int
    width: int
    keys: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Pipeline:
    """A renderer: parameters of its parts, and the widths that its activations grow with.

    Attributes:
        transformer, encoders, vae: parameters, persistent buffers included.
        width, inner: of a token of the transformer and of its MLP.
        pixels: side of a token's patch in the picture.
        channels: of the VAE's widest tensors at full resolution.
        passes: rows a picture; 2 where guidance is a second, unconditional row.
    """

    transformer: int
    encoders: int
    vae: int
    width: int
    inner: int
    pixels: int
    channels: int
    passes: int = 1

    @property
    def parameters(self) -> int:
        return self.transformer + self.encoders + self.vae


@dataclass(frozen=True)
class Scorer:
    """A reward's model: parameters, bytes of each, and elements alive at once for one picture."""

    name: str
    parameters: int
    size: int
    elements: int

    @property
    def weights(self) -> int:
        return self.parameters * self.size


@dataclass(frozen=True)
class Run:
    """What of a run's options decides its memory.

    Attributes:
        processes: that share the work.
        gpu: False where everything computes in main memory.
        zero: DeepSpeed's ZeRO stage, 0 without DeepSpeed.
        size: bytes of a policy's parameter as it is loaded.
        mixed: whether the policy computes in bfloat16.
        adapter: parameters of LoRA, 0 for full fine-tuning.
        quantised: bytes of a quantised parameter, 0 for none.
        reference: whether beta asks for a reference model.
        checkpointing: of gradients.
        generated, trained: rows a process generates at once and trains on at once.
        prompt, completion: tokens.
        vllm: share of the GPU that a colocated vLLM takes, 0 without it; `vllm_sleeps` while others work.
        chunk, resolution, text, render_size: pictures a call, pixels, text tokens, bytes of a renderer's element.
        render_device: where the renderer is if it is not with its process.
        reward_batch, reward_device, offload: as the options; offload keeps rewards in main memory between calls.
        transformer_size: bytes of a quantised weight of the renderer's transformer; 0: as `render_size`.
        encoders_away: whether its text encoders are in main memory but while they encode.
        sliced: whether its VAE decodes one picture at a time.
    """

    processes: int
    gpu: bool
    zero: int
    size: int
    mixed: bool
    adapter: int
    quantised: float
    reference: bool
    checkpointing: bool
    generated: int
    trained: int
    prompt: int
    completion: int
    vllm: float
    vllm_sleeps: bool
    chunk: int
    resolution: int
    text: int
    render_size: int
    render_device: str | None
    reward_batch: int
    reward_device: str | None
    offload: bool
    transformer_size: float = 0.0
    encoders_away: bool = False
    sliced: bool = False


@dataclass(frozen=True)
class Row:
    """One line: what it is, where, and its bytes in each phase; `passing` if it comes and goes."""

    name: str
    device: str
    bytes: tuple[int, int, int, int]
    passing: bool = False


@dataclass(frozen=True)
class Table:
    """What lies on one device: `totals` are the sums of its rows."""

    device: str
    rows: tuple[Row, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(sum(row.bytes[phase] for row in self.rows) for phase in range(len(PHASES)))

    @property
    def fullest(self) -> tuple[str, int]:
        """The fullest phase and its bytes."""
        most = max(self.totals)
        return PHASES[self.totals.index(most)], most


def estimate(
    run: Run, policy: Policy, pipeline: Pipeline, scorers: Sequence[Scorer], memory: int | None
) -> list[Table]:
    """One table per device: that of each process first, then devices named by the options, then main memory.

    Args:
        run, policy, pipeline, scorers: what runs.
        memory: bytes of a GPU, of which vLLM takes its share; None where none is known.
    """
    home = OWN if run.gpu else MAIN
    rows = [
        *policy_rows(run, policy, home),
        *generation_rows(run, policy, home, memory),
        *render_rows(run, pipeline, _place(run.render_device, home)),
        *reward_rows(run, scorers, _place(run.reward_device, _place(run.render_device, home))),
    ]
    return [_table(run, device, rows) for device in dict.fromkeys([home, *(row.device for row in rows)])]


# The policy ------------------------------------------------------------------------------------------------------


def lora(policy: Policy, rank: int, targets: Sequence[str]) -> int:
    """Parameters of LoRA: rank x (inputs + outputs) of each target, in each layer."""
    width, keys, inner = policy.width, policy.keys, policy.inner
    shapes = {
        "q_proj": (width, width), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (width, width),
        "gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width),
    }  # fmt: skip
    chosen = shapes if "all-linear" in targets else [name for name in shapes if name in targets]
    return policy.layers * rank * sum(sum(shapes[name]) for name in chosen)


def policy_rows(run: Run, policy: Policy, home: str) -> list[Row]:
    """Weights, gradients, optimiser, reference, activations and head of the policy."""
    trained = run.adapter or policy.parameters
    rows = [
        Row("policy weights", home, _weights(run, policy)),
        Row("gradients", home, (0, 0, 0, gradients(run, trained)), passing=True),
        Row("optimiser and master weights", home, (optimiser(run, trained),) * 4),
    ]
    if run.reference and not run.adapter:
        rows.append(Row("reference model", home, (_shard(run, policy.parameters * _loaded(run)),) * 4))
    return [
        *rows,
        Row("policy activations", home, (_reading(run, policy), 0, 0, activations(run, policy)), passing=True),
        Row("logits, in tiles", home, (_next_word(run, policy), 0, 0, head(run, policy)), passing=True),
    ]


def _loaded(run: Run) -> int:
    """Bytes of a parameter in use: DeepSpeed turns the whole module into bfloat16."""
    return 2 if run.zero and run.mixed else run.size


def _shard(run: Run, bytes: int) -> int:
    return bytes // run.processes if run.zero == 3 else bytes


def _weights(run: Run, policy: Policy) -> tuple[int, int, int, int]:
    """Parameters x their bytes, + the adapter; ZeRO-3 keeps a share and gathers all to generate, some to train."""
    whole = policy.parameters * _loaded(run)
    if run.quantised:
        whole = int((policy.parameters - policy.embeddings) * run.quantised) + policy.embeddings * run.size
    whole += run.adapter * _adapter_size(run)
    if run.zero != 3:
        return (whole,) * 4
    shard = whole // run.processes
    gathered = min(policy.parameters, LIVE_ZERO_3) * _loaded(run)
    return shard + whole, shard, shard, shard + gathered


def _adapter_size(run: Run) -> int:
    """PEFT keeps adapters in float32; DeepSpeed in bfloat16 and TRL above a quantised model do not."""
    return 2 if run.mixed and (run.zero or run.quantised) else 4


def gradients(run: Run, trained: int) -> int:
    """Bytes of gradients while training.

    ZeRO-2 and 3: a process's share, trained x b / N, and the larger of the bucket that is being reduced (during
    backward) and the share's float32 copy (during the step). ZeRO-1 and none: all; DistributedDataParallel has a copy.
    """
    size = _trained_size(run)
    if run.zero >= 2:
        share = trained // run.processes
        return share * size + max(min(trained, ZERO_BUCKET) * size, share * 4)
    copies = 2 if run.zero == 0 and run.processes > 1 else 1
    return trained * size * copies


def _trained_size(run: Run) -> int:
    return _adapter_size(run) if run.adapter else _loaded(run)


def optimiser(run: Run, trained: int) -> int:
    """ZeRO: float32 weights and two Adam moments, 12 bytes x trained / N. Else two moments in the parameter's type."""
    return 12 * trained // run.processes if run.zero else 2 * trained * _trained_size(run)


def activations(run: Run, policy: Policy) -> int:
    """What autograd keeps of `trained` rows: per token and layer 20 width + 4 keys + 8 inner bytes in bfloat16.

    With checkpointing each layer keeps 2 width, and one layer at a time is whole. Its gradients: 4 width + 6 inner.
    Float32 arithmetic: twice as much. Float32 weights in bfloat16 arithmetic: a bfloat16 copy of the weights besides.
    """
    tokens, scale = run.trained * (run.prompt + run.completion), 1 if run.mixed else 2
    whole = 20 * policy.width + 4 * policy.keys + 8 * policy.inner
    passing = 4 * policy.width + 6 * policy.inner
    kept = policy.layers * 2 * policy.width + whole if run.checkpointing else policy.layers * whole
    copies = 2 * policy.parameters if run.mixed and not run.zero and run.size == 4 and not run.adapter else 0
    return tokens * scale * (kept + passing) + copies


def alive(tokens: int, width: int, inner: int, size: int) -> int:
    """Bytes alive at once of a transformer without gradients: tokens x (4 width + 3 inner) x bytes of an element."""
    return tokens * (4 * width + 3 * inner) * size


def _reading(run: Run, policy: Policy) -> int:
    """Reading the prompts of all generated rows, or the reference's pass over `trained` whole rows, if larger."""
    if run.vllm:
        return 0
    tokens = max(run.generated * run.prompt, run.trained * (run.prompt + run.completion) * run.reference)
    return alive(tokens, policy.width, policy.inner, 2 if run.mixed else 4)


def head(run: Run, policy: Policy) -> int:
    """TRL 1.16 never holds batch x length x vocabulary: `add_fused_lm_head` folds tiles of TILE_TOKENS x TILE_WORDS.

    Tile + hidden states and their float32 gradient + the head's float32 gradient and its cast, where it is trained.
    """
    tokens, size = run.trained * run.completion, 2 if run.mixed else 4
    tile = min(tokens, TILE_TOKENS) * min(policy.vocabulary, TILE_WORDS) * size
    trained = 0 if run.adapter else policy.vocabulary * policy.width * (4 + size)
    return tile + tokens * policy.width * (size + 4) + trained


def _next_word(run: Run, policy: Policy) -> int:
    """Sampling one word of each row: its logits in float32, thrice (scaled, sorted or masked, softmax)."""
    return 0 if run.vllm else 3 * run.generated * policy.vocabulary * 4


# Generation, drawing, scoring ------------------------------------------------------------------------------------


def generation_rows(run: Run, policy: Policy, home: str, memory: int | None) -> list[Row]:
    """The cache: 2 (keys, values) x layers x keys x tokens x rows x bytes; or vLLM's share of the GPU."""
    if run.vllm:
        share = int(run.vllm * (memory or 0))
        return [Row("vLLM", home, (share, *(0 if run.vllm_sleeps else share,) * 3))]
    tokens = run.generated * (run.prompt + run.completion)
    cache = 2 * policy.layers * policy.keys * tokens * (2 if run.mixed else 4)
    return [Row("KV cache", home, (cache, 0, 0, 0), passing=True)]


def render_rows(run: Run, pipeline: Pipeline, device: str) -> list[Row]:
    """The renderer's parts, resident in every phase, and what drawing one chunk of pictures needs.

    Text encoders that are away come to the device to encode a generation's texts, before anything is drawn.
    """
    transformer = int(pipeline.transformer * (run.transformer_size or run.render_size))
    encoders, vae = pipeline.encoders * run.render_size, pipeline.vae * run.render_size
    rows = [Row("renderer transformer", device, (transformer,) * 4), Row("renderer VAE", device, (vae,) * 4)]
    if not run.encoders_away or device == MAIN:
        rows.insert(1, Row("renderer text encoders", device, (encoders,) * 4))
        return [*rows, Row("renderer activations", device, (0, drawing(run, pipeline), 0, 0), passing=True)]
    most = max(encoders, drawing(run, pipeline))
    rows.append(Row("renderer text encoders, then activations", device, (0, most, 0, 0), passing=True))
    return [*rows, Row("renderer text encoders, offloaded", MAIN, (encoders,) * 4)]


def drawing(run: Run, pipeline: Pipeline) -> int:
    """The larger of denoising and decoding one chunk.

    Denoising: rows x tokens x (10 width + 2 inner); tokens are patches and text. Decoding: pictures x pixels x
    channels x 4: three tensors of the last block at full resolution, one for the convolution's workspace (assumed).
    """
    tokens = (run.resolution // pipeline.pixels) ** 2 + run.text
    denoising = run.chunk * pipeline.passes * tokens * (10 * pipeline.width + 2 * pipeline.inner)
    decoding = (1 if run.sliced else run.chunk) * run.resolution**2 * pipeline.channels * 4
    return max(denoising, decoding) * run.render_size


def reward_rows(run: Run, scorers: Sequence[Scorer], device: str) -> list[Row]:
    """Weights of every reward, and the activations of one batch of the greediest; rewards score one after another.

    Offloaded, weights lie in main memory, and on the device is one reward at a time.
    """
    if not scorers:
        return []
    if not run.offload or device == MAIN:
        busiest = max(scorers, key=lambda one: _batch(run, one))
        rows = [Row(f"reward {one.name}", device, (one.weights,) * 4) for one in scorers]
        name = f"reward activations, most: {busiest.name}"
        return [*rows, Row(name, device, (0, 0, _batch(run, busiest), 0), passing=True)]
    busiest = max(scorers, key=lambda one: one.weights + _batch(run, one))
    name = f"rewards one at a time, most: {busiest.name}"
    there = Row(name, device, (0, 0, busiest.weights + _batch(run, busiest), 0), passing=True)
    return [there, *[Row(f"reward {one.name}, offloaded", MAIN, (one.weights,) * 4) for one in scorers]]


def _batch(run: Run, scorer: Scorer) -> int:
    return run.reward_batch * scorer.elements * scorer.size


# Devices ---------------------------------------------------------------------------------------------------------


def _place(device: str | None, home: str) -> str:
    if device is None or home == MAIN:
        return home
    return MAIN if device == "cpu" else device


def _table(run: Run, device: str, rows: Sequence[Row]) -> Table:
    """The rows on `device`, + what CUDA and its allocator take. All processes share main memory and named devices."""
    here = [row for row in rows if row.device == device]
    if device == OWN:
        return Table(device, (*here, *_overhead(run, device, here, 1)))
    shared = [replace(row, bytes=tuple(count * run.processes for count in row.bytes)) for row in here]
    if device == MAIN:
        return Table(device, tuple(shared))
    _, _, index = device.partition(":")
    if run.gpu and int(index or 0) < run.processes:  # some process's own device
        shared = [*[row for row in rows if row.device == OWN], *shared]
    return Table(device, (*shared, *_overhead(run, device, shared, run.processes)))


def _overhead(run: Run, device: str, rows: Sequence[Row], processes: int) -> list[Row]:
    context = processes * (CONTEXT + (COMMUNICATION if run.processes > 1 else 0))
    passing = [sum(row.bytes[phase] for row in rows if row.passing) for phase in range(len(PHASES))]
    return [
        Row("CUDA context (assumed)", device, (context,) * 4),
        Row("allocator's slack (assumed)", device, tuple(int(SLACK * count) for count in passing)),
    ]
