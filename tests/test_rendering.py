"""The local renderer's contracts, on tiny pipelines of the real classes: random weights, saved and loaded again."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import httpx
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub import constants
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.integrations import deepspeed

from errors import UserError
from models.hub import read
from rendering import RenderOptions, load_renderer
from rendering.local import LocalRenderer

TEXTS = ["a red circle above a blue square", "two cats", "three green stars left of a small house, at dusk"]
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
QWEN_LENGTHS = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def tokenizer(length: int, *, bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token per character; </s> at the end as T5's, <s> in front too as CLIP's."""
    characters = ["<pad>", "<unk>", "<s>", *map(chr, range(32, 127)), "\n", "</s>"]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [(token, characters.index(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=special
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


# fmt: off


def clip_config(**overrides: object) -> transformers.CLIPTextConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.CLIPTextConfig(
        **sizes, vocab_size=100, projection_dim=32, bos_token_id=2, eos_token_id=99, pad_token_id=0, **overrides
    )


def t5(width: int = 32) -> transformers.T5EncoderModel:
    config = transformers.T5Config(d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=100)
    return transformers.T5EncoderModel(config)


def vae(channels: int, **overrides: object) -> diffusers.AutoencoderKL:
    """Two scales: pixels = 2 x latents."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**blocks, **shape, **overrides)


def flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=transformers.CLIPTextModel(clip_config()), tokenizer=tokenizer(77, bos=True),
        text_encoder_2=t5(), tokenizer_2=tokenizer(512), transformer=transformer,
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=transformers.CLIPTextModelWithProjection(clip_config()), tokenizer=tokenizer(77, bos=True),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()), tokenizer_2=tokenizer(77, bos=True),
        text_encoder_3=t5(64), tokenizer_3=tokenizer(512),
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        norm_num_groups=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=64,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), vae=vae(4),
        text_encoder=transformers.CLIPTextModel(clip_config()), tokenizer=tokenizer(77, bos=True),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()), tokenizer_2=tokenizer(77, bos=True),
    )


def sd15() -> diffusers.StableDiffusionPipeline:
    """With a safety checker whose thresholds are so low that it flags everything."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 1}
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(
            text_config=clip_config().to_dict(), vision_config={**vision, "image_size": 32, "patch_size": 8},
            projection_dim=32,
        )
    )
    checker.concept_embeds_weights.data.fill_(-2.0)
    return diffusers.StableDiffusionPipeline(
        vae=vae(4), text_encoder=transformers.CLIPTextModel(clip_config()), tokenizer=tokenizer(77, bos=True),
        unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), safety_checker=checker,
        feature_extractor=transformers.CLIPImageProcessor(size=32, crop_size=32),
    )


def sana() -> diffusers.SanaPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )
    config = transformers.Gemma2Config(
        head_dim=16, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
        num_key_value_heads=2, vocab_size=100,
    )
    return diffusers.SanaPipeline(
        tokenizer(300, bos=True),
        transformers.Gemma2Model(config),
        autoencoder,
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def qwen3(layers: int) -> transformers.Qwen3ForCausalLM:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**QWEN_LENGTHS, head_dim=8, num_hidden_layers=layers, vocab_size=100)
    )


def z_image() -> diffusers.ZImagePipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(transformer.get_parameter(name))
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=0.3611),
        text_encoder=qwen3(2), tokenizer=tokenizer(512), transformer=transformer,
    )


def flux2() -> diffusers.Flux2Pipeline:
    """31 thin layers of text encoder, since the pipeline reads hidden states 10, 20 and 30."""
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
    )
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral", **QWEN_LENGTHS, "head_dim": 8, "num_hidden_layers": 31, "vocab_size": 100,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
        },
        image_token_index=3,
    )
    words = tokenizer(1024)
    words.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>"
        "{% endfor %}"
    )
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(), tokenizer=words, patch_size=16, image_token="!",
        image_break_token="#", image_end_token="$", chat_template=words.chat_template,
    )
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder, transformer=transformer,
        text_encoder=transformers.Mistral3ForConditionalGeneration(config), tokenizer=processor,
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **QWEN_LENGTHS, "num_hidden_layers": 2, "vocab_size": 100,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6,
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer(1024),
        transformer=transformer,
    )


# fmt: on


PIPELINES = {build.__name__: build for build in (sd15, flux, sd3, sdxl, sana, z_image, flux2, qwen_image)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """name -> folder with a saved tiny pipeline, built once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> str:
        path = root / name
        if not path.exists():
            torch.manual_seed(0)
            PIPELINES[name]().save_pretrained(path)
        return str(path)

    return folder


def renderer(path: str, **changes: object) -> LocalRenderer:
    small = {"render_dtype": "float32", "render_steps": 2, "resolution": 16, "max_sequence_length": 64}
    return load_renderer(RenderOptions(path, **{**small, "render_batch_size": 4, **changes}), "cpu")


def distance(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of any channel of any pixel, in levels of 255."""
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


@pytest.fixture
def draw(checkpoint) -> LocalRenderer:
    return renderer(checkpoint("flux"))


def rows_seen(module: torch.nn.Module, argument: str | int) -> list[int]:
    """Batch size of every coming forward pass of `module`."""
    seen: list[int] = []

    def note(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(len(kwargs[argument] if isinstance(argument, str) else args[argument]))

    module.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def run_out_of_memory(module: torch.nn.Module, above: int) -> list[int]:
    """Let `module` raise PyTorch's own error on more than `above` rows; the batch sizes tried are listed."""
    tried: list[int] = []

    def check(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        tried.append(len(kwargs["hidden_states"]))
        if tried[-1] > above:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {tried[-1]} rows")

    module.register_forward_pre_hook(check, with_kwargs=True)
    return tried


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "sd15"])
def test_a_row_draws_the_same_picture_alone_and_in_a_batch(name, checkpoint):
    lengths = {"sdxl": None, "flux2": 512, "qwen_image": 512}  # no such setting, or a long chat template
    size = 32 if name == "sana" else 16
    draw = renderer(checkpoint(name), max_sequence_length=lengths.get(name, 64), resolution=size)
    together = draw(TEXTS, [1, 2, 3])
    assert [picture.size for picture in together] == [(size, size)] * 3
    for text, seed, picture in zip(TEXTS, [1, 2, 3], together, strict=True):
        assert distance(draw([text], [seed])[0], picture) == 0
    assert not draw.failures


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "sd15"])
def test_the_pictures_are_those_of_the_pipeline_used_by_hand(name, checkpoint):
    path, size = checkpoint(name), 32 if name == "sana" else 16
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    by_hand = {
        "prompt": list(TEXTS),
        "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        "num_inference_steps": 2,
        "height": size,
        "width": size,
    }
    if name == "qwen_image":
        by_hand["negative_prompt"] = [" "] * 3
    if name == "sana":
        by_hand["use_resolution_binning"] = False
    drawn = renderer(path, max_sequence_length=None, resolution=size)(TEXTS, [1, 2, 3])
    assert max(map(distance, pipe(**by_hand).images, drawn)) <= 1


def test_the_picture_follows_the_text_and_the_seed(draw):
    pictures = draw([TEXTS[0]] * 4 + TEXTS[1:2], [1, 2, 3, 4, 1])
    assert len({picture.tobytes() for picture in pictures}) == 5


def test_neither_order_nor_global_randomness_changes_a_picture(draw):
    torch.manual_seed(1)
    first = draw(TEXTS * 2, [1, 2, 3, 4, 5, 6])
    torch.manual_seed(2)
    again = draw((TEXTS * 2)[::-1], [6, 5, 4, 3, 2, 1])[::-1]
    assert [a.tobytes() for a in first] == [b.tobytes() for b in again]


def test_a_text_is_encoded_in_one_pass_whatever_the_seeds_and_chunks(draw):
    rows = rows_seen(draw.pipe.text_encoder_2, 0)
    draw([TEXTS[0]] * 5 + [TEXTS[1]] * 5, list(range(10)))
    assert rows == [1, 4, 4]  # once alone, to see the shapes; then one full pass for the new texts of a chunk
    draw([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[1]], [1, 2, 3, 4])
    assert rows == [1, 4, 4, 4]


def test_blank_text_is_none_and_leaves_its_neighbours_alone(draw):
    pictures = draw([TEXTS[0], " \n", TEXTS[1], ""], [1, 2, 3, 4])
    assert pictures[1] is None and pictures[3] is None
    assert [pictures[0].tobytes(), pictures[2].tobytes()] == [p.tobytes() for p in draw(TEXTS[:2], [1, 3])]
    assert draw.failures == {"blank text": 2}
    assert draw(["", ""], [1, 2]) == [None, None]
    assert draw([], []) == []


def test_out_of_memory_halves_the_chunk_for_good_and_draws_the_same(draw, checkpoint, caplog):
    expected = renderer(checkpoint("flux"))(TEXTS * 2, [1, 2, 3, 4, 5, 6])
    tried = run_out_of_memory(draw.pipe.transformer, above=2)
    pictures = draw(TEXTS * 2, [1, 2, 3, 4, 5, 6])
    assert "4 pictures at once: from now on 2" in caplog.text
    assert tried == [4] + [2, 2] * 3 and draw.chunk_size == 2
    assert max(map(distance, pictures, expected)) == 0
    draw(TEXTS[:1], [1])
    assert tried[-2:] == [2, 2] and tried.count(4) == 1
    assert not draw.failures


def test_a_single_row_that_does_not_fit_is_none(checkpoint):
    draw = renderer(checkpoint("flux"), render_batch_size=1)
    run_out_of_memory(draw.pipe.transformer, above=0)
    assert draw(TEXTS[:2], [1, 2]) == [None, None]
    assert draw.failures == {"out of memory": 2}


@pytest.mark.parametrize(("value", "reason"), [(-1.0, "black picture"), (float("nan"), "non-finite pixels")])
def test_a_spoilt_picture_is_none_and_its_neighbours_are_not(value, reason, draw):
    expected = draw(TEXTS, [1, 2, 3])

    def spoil_row_one(_module: torch.nn.Module, _args: tuple, decoded: torch.Tensor) -> torch.Tensor:
        decoded[1] = value
        return decoded

    draw.pipe.vae.decoder.register_forward_hook(spoil_row_one)
    pictures = draw(TEXTS, [1, 2, 3])
    assert pictures[1] is None and draw.failures == {reason: 1}
    assert [pictures[0].tobytes(), pictures[2].tobytes()] == [expected[0].tobytes(), expected[2].tobytes()]


def test_what_the_safety_checker_flags_is_none(checkpoint):
    draw = renderer(checkpoint("sd15"), max_sequence_length=None)
    assert draw(TEXTS[:2], [1, 2]) == [None, None]
    assert draw.failures == {"safety checker": 2}
    draw.pipe.safety_checker = None
    assert None not in draw(TEXTS[:2], [1, 2])


def test_tokens_are_counted_and_limited_as_the_long_encoder_reads_them(draw, checkpoint):
    assert draw.count_tokens("abc") == len(draw.pipe.tokenizer_2("abc").input_ids) == 4
    assert draw.count_tokens("a" * 2000) == 2001
    assert draw.max_tokens == 64
    assert renderer(checkpoint("flux"), max_sequence_length=None).max_tokens == 512
    assert renderer(checkpoint("sdxl"), max_sequence_length=None).max_tokens == 77


def test_a_text_that_is_cut_is_reported_once(draw, caplog):
    draw(["a" * 100, "b" * 63, "a" * 100], [1, 1, 2])
    assert None not in draw(["c" * 64], [1])
    assert ["101 tokens" in one.message for one in caplog.records] == [True]


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_long_text_does_not_foretell_indexing_errors(checkpoint, caplog, kind):
    transformers.utils.logging.enable_propagation()
    draw = renderer(checkpoint(kind))
    assert draw.count_tokens("a" * 3000) > 3000 and None not in draw(["a" * 3000], [1])
    policy = read(transformers.AutoTokenizer, f"{checkpoint('flux')}/tokenizer")
    assert len(policy.apply_chat_template([{"role": "user", "content": "a" * 3000}], return_dict=False)) > 3000
    transformers.utils.logging.disable_propagation()
    assert "indexing errors" not in caplog.text


def test_the_renderer_is_frozen_and_no_module(draw):
    assert not isinstance(draw, torch.nn.Module)
    modules = [part for part in draw.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 4
    assert not any(module.training for part in modules for module in part.modules())
    assert not any(parameter.requires_grad for part in modules for parameter in part.parameters())


def test_weights_load_whole_while_zero_3_is_registered(checkpoint, draw):
    stage_3 = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        sharded = renderer(checkpoint("flux"))
        assert deepspeed.is_deepspeed_zero3_enabled(), "the trainer's configuration must be put back"
    finally:
        deepspeed.unset_hf_deepspeed_config()
        del stage_3
    assert sharded(TEXTS[:1], [1])[0].tobytes() == draw(TEXTS[:1], [1])[0].tobytes()


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "no_such_folder", "a/b/c"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(UserError, match=f"no such folder: {path}"):
        renderer(path)


@pytest.mark.parametrize("setting", [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_flux_without_a_hub_says_size_licence_and_command_after_one_request(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, *setting)
    sent, send = [], httpx.Client.send
    monkeypatch.setattr(httpx.Client, "send", lambda *args, **named: sent.append(args) or send(*args, **named))
    with pytest.raises(UserError) as error:
        renderer("black-forest-labs/FLUX.1-dev")
    assert len(sent) == 1
    message = str(error.value)
    for part in ("black-forest-labs/FLUX.1-dev", "34 GB", "FLUX.1 [dev] Non-Commercial License", "hf download"):
        assert part in message


def test_a_folder_with_a_missing_weight_file_is_a_checkpoint_error(checkpoint, tmp_path):
    path = tmp_path / "flux"
    shutil.copytree(checkpoint("flux"), path)
    for weights in Path(path, "text_encoder_2").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        renderer(str(path))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("sdxl", {}, "max_sequence_length .*64"),
        ("flux", {"render_dtype": "fp8"}, "fp8"),
        ("flux", {"render_batch_size": "auto"}, "--render_batch_size"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(name, changes, named, checkpoint):
    with pytest.raises(UserError, match=named):
        renderer(checkpoint(name), **changes)


def test_texts_and_seeds_must_pair_up(draw):
    with pytest.raises(ValueError):
        draw(TEXTS[:2], [1])
