"""Train every miniature model, of its real architecture at toy size, from the world, on a CPU.

    python -m miniature.build                 # all stages, in this order
    python -m miniature.build --stage flux    # only some, of STAGES below

Deterministic: the data and noise of a step are a function of (stage, step) alone, so a build that was interrupted goes
on from its last saved state (`.cache/miniature/`) to the same weights. Each stage is the ceiling of the next: measure
reconstruction, then drawing, then learning.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import fields

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from interfaces import Prompt
from miniature import fit, janus, second, world
from miniature.fit import PADDED, ROOT, TEXT_TOKENS, WEIGHTS, pictures, pixels
from miniature.policy import build_instruct, build_policy
from miniature.preferences import build_hps, build_imagereward, build_pickscore
from miniature.readers import build_gdino, build_git, build_orm
from rendering import RenderOptions, load_renderer


def build_vae(steps: int = 3000, batch: int = 32) -> None:
    """AutoencoderKL 48 x 48 x 3 -> 12 x 12 x 8, L1 + MSE + a whisper of KL; measures what the oracle loses by it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=8, norm_num_groups=8,
        sample_size=world.SIZE, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip

    def loss_of(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        truth = pixels([world.draw(world.random_scene(rng), rng) for _ in range(batch)])
        posterior = vae.encode(truth).latent_dist
        drawn = vae.decode(posterior.sample(noise)).sample
        return F.l1_loss(drawn, truth) + F.mse_loss(drawn, truth) + 1e-6 * posterior.kl().mean()

    fit.fit("vae", nn.ModuleDict({"vae": vae}), loss_of, steps=steps, lr=2e-3, weight_decay=0.0)
    rng = random.Random("vae/measure")
    scenes = [world.random_scene(rng) for _ in range(500)]
    with torch.inference_mode():
        latents = vae.encode(pixels([world.draw(scene, rng) for scene in scenes])).latent_dist.mean
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(WEIGHTS / "flux" / "vae")
    print(f"the oracle reads {reconstruction(vae):.1%} of 500 reconstructed scenes exactly")


@torch.inference_mode()
def reconstruction(vae: nn.Module, scenes: int = 500) -> float:
    """Share of scenes that the oracle reads exactly after encode -> decode: the ceiling of every drawing."""
    rng = random.Random("reconstruction")
    truth = [world.random_scene(rng) for _ in range(scenes)]
    drawn = vae.decode(vae.encode(pixels([world.draw(scene, rng) for scene in truth])).latent_dist.mean).sample
    return np.mean([world.reads_exactly(s, world.see(p)) for s, p in zip(truth, pictures(drawn), strict=True)])


GUIDANCE = 3.5  # FLUX.1-dev's distilled guidance is an input; here it is constant


def build_flux(text_steps: int = 800, steps: int = 3000, batch: int = 64, pool: int = 40_000) -> None:
    """FluxPipeline by flow matching on latents; 80 % of its captions are layouts, 20 % careless alt text.

    The careless fifth is why the raw prompt draws badly and a rewrite draws well, as with the real FLUX. The T5 comes
    pretrained and stays frozen, as the real one does: a smaller one, trained along with the transformer, drew 2 of 32
    two-thing scenes exactly after 3,000 steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    vae, words = fit.frozen_vae(), fit.word_tokenizer()
    tokens = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    t5 = fit.text_encoder(words, 128)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS, projection_dim=64, bos_token_id=None, **tokens,
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * vae.config.latent_channels, num_layers=2, num_single_layers=3,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=128, pooled_projection_dim=64,
        guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, clip, words, t5, words, transformer)

    fit.teach_language("flux_text", t5, words, text_steps)
    scenes, latents = fit.latent_pool("flux", vae, pool)
    latents = pipe._pack_latents(latents, *latents.shape)  # (pool, 36, 32)
    side = world.SIZE // pipe.vae_scale_factor // 2  # packed tokens a side
    places = pipe._prepare_latent_image_ids(batch, side, side, "cpu", torch.float32)

    def loss_of(rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        chosen = [rng.randrange(pool) for _ in range(batch)]
        ids = words([fit.caption(scenes[i], rng) for i in chosen], **PADDED).input_ids
        with torch.no_grad():
            read = t5(ids)[0]
        t, mixed, wanted = fit.flow(latents[chosen], noise)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=mixed, timestep=t, guidance=torch.full((batch,), GUIDANCE),
                encoder_hidden_states=read, pooled_projections=clip(ids).pooler_output,
                txt_ids=torch.zeros(TEXT_TOKENS, 3), img_ids=places, return_dict=False,
            )[0]  # fmt: skip
        return F.mse_loss(velocity.float(), wanted)

    fit.fit("flux", nn.ModuleDict({"clip": clip, "transformer": transformer}), loss_of, steps=steps, lr=1e-3)
    pipe.to(torch.float16).save_pretrained(WEIGHTS / "flux")


def write_prompts() -> None:
    """`prompts/train.txt`, `held_out.txt` and `cold_start.txt`, one prompt a line; the grammar reads their fields."""
    for name, prompts in zip(("train", "held_out", "cold_start"), (*world.splits(), world.cold_start()), strict=True):
        file = ROOT / "prompts" / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(prompt.text + "\n" for prompt in prompts), encoding="utf-8")


def renderer(**changes: object):
    """A miniature renderer, with the settings of `configs/miniature.yaml` but for `changes` (of `RenderOptions`)."""
    options = yaml.safe_load((ROOT.parent / "configs" / "miniature.yaml").read_text(encoding="utf-8"))
    known = {field.name for field in fields(RenderOptions)}
    given = {**{name: value for name, value in options.items() if name in known}, **changes}
    return load_renderer(RenderOptions(**{**given, "sdmodel_name": str(ROOT.parent / given["sdmodel_name"])}), "cpu")


def drawing(draw, prompts: list[Prompt]) -> dict[str, float]:
    """Oracle accuracy of `draw` (a Renderer) on layouts written for the prompts, and on the prompts as they are."""
    rng = random.Random("drawing")
    written = [world.describe(world.layout(prompt, rng)) for prompt in prompts]
    found = {}
    for name, texts in (("written", written), ("raw", [prompt.text for prompt in prompts])):
        images = draw(texts, range(len(texts)))
        found[name] = float(np.mean([world.holds(p, world.see(i)) for p, i in zip(prompts, images, strict=True)]))
    return found


def measure() -> None:
    """Print the ceilings in their order: reconstruction, drawing, rewards."""
    from diffusers import AutoencoderKL

    from miniature import meaning

    _, held_out = world.splits()
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "flux" / "vae", dtype=torch.float32)
    print(f"reconstruction: the oracle reads {reconstruction(vae):.1%} of 500 scenes exactly")
    for name, guidance in (("flux", None), ("sd3", second.GUIDANCE)):
        share = drawing(renderer(sdmodel_name=WEIGHTS / name, guidance=guidance), held_out)
        print(f"drawing, {name}: {share['written']:.1%} of written layouts, {share['raw']:.1%} of raw prompts")
    told = ", ".join(f"{name} {share:.1%}" for name, share in janus.measure(world.splits()[1]).items())
    print(f"drawing, janus, after plans: {told}")
    print("share of 300 pairs in which the right picture scores higher:")
    for name, share in meaning.measure().items():
        print(f"    {name:28s} {share:.1%}")


STAGES = {
    "prompts": write_prompts, "vae": build_vae, "flux": build_flux, "sd3": second.build_sd3, "hps": build_hps,
    "pickscore": build_pickscore, "imagereward": build_imagereward, "git": build_git, "gdino": build_gdino,
    "orm": build_orm, "instruct": build_instruct, "policy": build_policy, "questions": janus.write_questions,
    "janus_vq": janus.build_vq, "janus": janus.build_janus, "measure": measure,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the miniature models from the world.")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES), help="only these; default: all")
    args = parser.parse_args()
    for stage in args.stage:
        STAGES[stage]()


if __name__ == "__main__":
    main()
