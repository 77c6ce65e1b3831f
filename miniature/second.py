"""A second miniature renderer, of another architecture: does a rewriter trained before one draw well before another?

    python -m miniature.build --stage sd3    # weights/sd3, from the world and the VAE of weights/flux

It differs from the miniature FLUX as the real SD3 does: joint blocks all the way, positions added instead of turned,
two CLIPs whose words are read beside T5's, guidance by a second pass. Sizes, seed, scenes and noise are others too.
Shared on purpose: the world, its words and the VAE, because the two are to differ in what they make of a text.

Left out: training the CLIPs beforehand, dropping each encoder's text on its own, resolution-dependent shift.

Source: Esser et al. 2024, https://arxiv.org/abs/2403.03206; diffusers 0.42.1, `StableDiffusion3Pipeline`.
"""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from miniature import fit
from miniature.fit import TEXT_TOKENS, WEIGHTS

UNCAPTIONED = 0.1  # share of training pictures without a caption: what guidance pushes away from
GUIDANCE = 1.0  # at use: one pass. Unset, it is SD3's own 7.0, at which raw prompts draw well 43 % of the time, not 18


def build_sd3(text_steps: int = 800, steps: int = 4000, batch: int = 64, pool: int = 40_000) -> None:
    """StableDiffusion3Pipeline by flow matching on latents (8, 12, 12), with captions as `build_flux` has them.

    Only the T5 comes pretrained and frozen; the CLIPs learn along with the transformer. No autocast: at these widths
    a step takes 0.46 s in float32 and 0.62 s in bfloat16, on one core that has bfloat16 instructions.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(2)
    vae, words = fit.frozen_vae(), fit.word_tokenizer()
    tokens = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    t5 = fit.text_encoder(words, 96)
    small, large = (
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=TEXT_TOKENS, projection_dim=width, bos_token_id=None,
                **tokens,
            )
        )
        for width in (32, 48)
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=12, patch_size=2, in_channels=8, out_channels=8, num_layers=4, num_attention_heads=4,
        attention_head_dim=24, joint_attention_dim=96, caption_projection_dim=96, pooled_projection_dim=32 + 48,
        pos_embed_max_size=6, qk_norm="rms_norm",
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer, scheduler, vae, small, words, large, words, t5, words)

    fit.teach_language("sd3_text", t5, words, text_steps)
    scenes, latents = fit.latent_pool("sd3", vae, pool)

    def loss_of(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        chosen = [rng.randrange(pool) for _ in range(batch)]
        texts = ["" if rng.random() < UNCAPTIONED else fit.caption(scenes[i], rng) for i in chosen]
        t, mixed, wanted = fit.flow(latents[chosen], noise)
        read, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        velocity = transformer(mixed, read, pooled, 1000 * t, return_dict=False)[0]
        return F.mse_loss(velocity, wanted)

    learning = nn.ModuleDict({"small": small, "large": large, "transformer": transformer})
    fit.fit("sd3", learning, loss_of, steps=steps, lr=1e-3)
    pipe.to(torch.float16).save_pretrained(WEIGHTS / "sd3")
