"""What every build of the miniature shares: the training loop, pictures as tensors, words, lessons of renderers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data.grammar import TASKS
from miniature import world

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"
CACHE = ROOT.parent / ".cache" / "miniature"
# Layout captions need 32 tokens; every text is padded or cut to this, in training as at use.
TEXT_TOKENS = 32
PADDED = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True, "return_tensors": "pt"}


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss_of: Callable[[random.Random, torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    save_every: int = 500,
) -> None:
    """AdamW, warm-up, cosine decay to zero; goes on from `.cache/miniature/<name>.pt` if an earlier run stopped.

    `loss_of` gets a `random.Random` and a `torch.Generator` that are functions of (name, step) and nothing else.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    state_file, start = CACHE / f"{name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    modules.train()
    average, bar = math.nan, tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(random.Random(f"{name}/{step}"), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            CACHE.mkdir(parents=True, exist_ok=True)
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    modules.eval()


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """(B, 3, 48, 48) in [-1, 1], as diffusers' VAE takes them."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def pictures(batch: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> PIL, the inverse of `pixels`."""
    arrays = ((batch.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def word_tokenizer():
    """One token a word of the world, `<unk>` for any other; used by both text encoders of the miniature FLUX."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rng = random.Random("words")
    tasks = (world.request(task, rng).text for task in TASKS for _ in range(2000))
    captions = (world.describe(world.random_scene(rng)) for _ in range(2000))
    words = sorted({word for text in (*tasks, *captions) for word in text.replace(",", " , ").split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=TEXT_TOKENS, padding_side="right",
    )  # fmt: skip


def byte_level_bpe(texts: Sequence[str], vocab_size: int, special: Sequence[str], **settings: object):
    """Byte-level BPE with ChatML's special tokens, as Qwen's is: any text in UTF-8 passes and comes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left",
        model_max_length=2048, clean_up_tokenization_spaces=False, **settings,
    )  # fmt: skip


def frozen_vae():
    """The VAE of `weights/flux`, which both renderers draw through."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "flux" / "vae", dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="miniature/weights/flux/vae")  # else this machine's path would be saved
    return vae


def text_encoder(words, width: int):
    """A T5 of three layers and four heads."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    return T5EncoderModel(config)


def flow(truth: torch.Tensor, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(t, latents at t, velocity to learn) of flow matching; t (B,) is logit-normal, 0 is the picture, 1 is noise."""
    start = torch.randn(truth.shape, generator=noise)
    t = torch.randn(len(truth), generator=noise).sigmoid()
    at = t.view(-1, *[1] * (truth.dim() - 1))
    return t, (1 - at) * truth + at * start, start - truth


def teach_language(name: str, t5: nn.Module, words, steps: int) -> None:
    """Pretrain a text encoder: every token of a layout caption is to know its thing's colour, shape and place."""
    heads = nn.ModuleList([nn.Linear(t5.config.d_model, n) for n in (len(world.COLORS), len(world.SHAPES), 9)])

    def tagging(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        scenes = [world.random_scene(rng) for _ in range(128)]
        tags = torch.full((len(scenes), TEXT_TOKENS, len(heads)), -100)
        for row, scene in zip(tags, scenes, strict=True):
            labels = []
            for thing in scene:
                looks = (list(world.COLORS).index(thing.color), world.SHAPES.index(thing.shape), thing.place)
                labels += [looks] * (len(world.describe([thing]).split()) + 1)  # the comma, or the end, belongs to it
            row[: len(labels)] = torch.tensor(labels)
        read = t5(words([world.describe(scene) for scene in scenes], **PADDED).input_ids)[0]
        losses = [F.cross_entropy(head(read).flatten(0, 1), tags[..., i].flatten()) for i, head in enumerate(heads)]
        return sum(losses)

    fit(name, nn.ModuleDict({"t5": t5, "heads": heads}), tagging, steps=steps, lr=1e-3)
    t5.requires_grad_(False)


def latent_pool(name: str, vae: nn.Module, pool: int) -> tuple[list[world.Scene], torch.Tensor]:
    """`pool` scenes and their normalised latents (pool, 8, 12, 12)."""
    rng = random.Random(f"{name}/pool")
    scenes = [world.random_scene(rng) for _ in range(pool)]
    latents = []
    with torch.inference_mode():
        for i in tqdm(range(0, pool, 100), desc="latents", mininterval=5):
            z = vae.encode(pixels([world.draw(scene, rng) for scene in scenes[i : i + 100]])).latent_dist.mean
            latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
    return scenes, torch.cat(latents).clone()


def caption(scene: world.Scene, rng: random.Random) -> str:
    """Four in five are layouts, in any order of things; one is careless alt text."""
    things = rng.sample(scene, len(scene))
    return world.describe(things) if rng.random() < 0.8 else world.hearsay(scene, rng)
