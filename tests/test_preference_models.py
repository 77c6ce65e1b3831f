"""Claims about PickScore and ImageReward, on tiny random models of their real classes in their real file layouts."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from errors import UserError
from interfaces import Prompt, Sample
from models.weights import locked
from rewards import RewardContext, RewardOptions, build, imagereward, pickscore
from rewards.imagereward import ImageReward
from rewards.pickscore import PickScore

MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]
WORDS = "a red green blue circle square two three left right of and".split()
EMOJI = (
    "a red 🟥 circle \ud83d" + " of 🦊👩‍👩‍👧" * 200
)  # a lone surrogate, and far more tokens than either model reads


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def sample(text: str, *images: Image.Image) -> Sample:
    return Sample(Prompt(text), "completion", "a rewrite", images)


def samples() -> list[Sample]:
    """Two groups of four, pictures of several shapes, prompts of different lengths."""
    sizes = [(64, 64), (100, 40), (30, 70), (48, 48)]
    return [
        sample(text, picture(8 * row + i, *size))
        for row, text in enumerate(["a red circle", "two blue square left of a green circle"])
        for i, size in enumerate(sizes)
    ]


def cropped(image: Image.Image) -> torch.Tensor:
    """(3, 48, 48): shorter side to 48 (bicubic), centre cut out, normalised; by PIL and NumPy alone."""
    scale = 48 / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = round((image.width - 48) / 2), round((image.height - 48) / 2)
    pixels = np.asarray(image.crop((left, top, left + 48, top + 48)), np.float32) / 255
    return torch.from_numpy(((pixels - np.array(MEAN)) / np.array(STD)).astype(np.float32)).permute(2, 0, 1)


def write_pickscore(folder: Path) -> Path:
    """A random PickScore as transformers saves it, with CLIP's kind of tokenizer: <s> text </s>."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", *WORDS, "</s>"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    brackets = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=brackets)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": vocab["<s>"], "eos_token_id": vocab["</s>"], "pad_token_id": 0}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            projection_dim=16,
            text_config={"vocab_size": len(vocab), "max_position_embeddings": 77, **size, **special},
            vision_config={"image_size": 48, "patch_size": 8, **size},
            logit_scale_init_value=3.5,
        )
    ).save_pretrained(folder)
    side = {"height": 48, "width": 48}
    CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size=side, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)  # fmt: skip
    return folder


VISION = {
    "image_size": 48, "patch_size": 8, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 3,
}  # fmt: skip
TEXT = {
    "vocab_size": len(WORDS) + 7, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "pad_token_id": 0,
}  # fmt: skip
# transformers' names and the original ones, written down apart from the code under test
IN_A_BLOCK = {
    "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
AROUND = {
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight", "post_layernorm.weight": "norm.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias", "post_layernorm.bias": "norm.bias",
}  # fmt: skip


def original_vit_name(name: str) -> str:
    if name in AROUND:
        return f"blip.visual_encoder.{AROUND[name]}"
    _, _, number, part = name.split(".", 3)
    part, kind = part.rsplit(".", 1)
    return f"blip.visual_encoder.blocks.{number}.{IN_A_BLOCK[part]}.{kind}"


class Parts:
    """Random transformers modules and a head of plain matrices: what ImageReward is made of, apart from its class."""

    def __init__(self):
        torch.manual_seed(1)
        self.vit = BlipVisionModel(BlipVisionConfig(**VISION, layer_norm_eps=1e-6, initializer_range=0.2)).eval()
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
        text = BlipTextConfig(**TEXT, **ids, encoder_hidden_size=24, is_decoder=True, initializer_range=0.2)
        self.bert = BlipTextModel(text, add_pooling_layer=False).eval()
        widths = [32, 1024, 128, 64, 16, 1]
        self.head = [
            (torch.randn(narrow, wide) / wide**0.5, torch.randn(narrow) / 10)
            for wide, narrow in zip(widths, widths[1:], strict=False)
        ]

    def original(self) -> dict[str, torch.Tensor]:
        """The weights under the names that ImageReward.pt has, counters and unused projections with them."""
        weights = {original_vit_name(name): value for name, value in self.vit.state_dict().items()}
        weights |= {f"blip.text_encoder.{name}": value for name, value in self.bert.state_dict().items()}
        for number, (weight, bias) in zip((0, 2, 4, 6, 7), self.head, strict=True):
            weights |= {f"mlp.layers.{number}.weight": weight, f"mlp.layers.{number}.bias": bias}
        weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
        weights["blip.vision_proj.weight"], weights["blip.text_proj.bias"] = torch.randn(8, 24), torch.randn(8)
        return weights

    @torch.inference_mode()
    def score(self, tokenizer, text: str, image: Image.Image) -> float:
        """By calling the modules as the released code does: 35 tokens with padding, [CLS], product of linears."""
        read = tokenizer(text, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        seen = self.vit(pixel_values=cropped(image)[None]).last_hidden_state
        features = self.bert(
            input_ids=read.input_ids, attention_mask=read.attention_mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long),
        ).last_hidden_state[0, 0]  # fmt: skip
        product, offset = torch.eye(32), torch.zeros(32)
        for weight, bias in self.head:
            product, offset = weight @ product, weight @ offset + bias
        return ((product @ features + offset).item() - 0.16717362830052426) / 1.0333394966054072


def write_imagereward(folder: Path, parts: Parts, *, pickled: bool) -> Path:
    """An ImageReward folder in the original layout of names, as .pt or as safetensors, with the world's words."""
    folder.mkdir(exist_ok=True)
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    unread = {"encoder_width": 768, "add_cross_attention": True, "hidden_dropout_prob": 0.1, "model_type": "bert"}
    (folder / "med_config.json").write_text(json.dumps({**TEXT, **unread}))
    (folder / "vision_config.json").write_text(json.dumps({**VISION, "image_mean": MEAN, "image_std": STD}))
    if pickled:
        torch.save(parts.original(), folder / "ImageReward.pt")
    else:
        save_file({name: value.contiguous() for name, value in parts.original().items()}, folder / WEIGHTS)
    return folder


WEIGHTS = "ImageReward.safetensors"


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, parts) -> dict[str, Path]:
    return {
        "pickscore": write_pickscore(tmp_path_factory.mktemp("pickscore")),
        "imagereward": write_imagereward(tmp_path_factory.mktemp("imagereward"), parts, pickled=False),
    }


@pytest.fixture(scope="module")
def pick(folders) -> PickScore:
    return PickScore(folders["pickscore"], device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def liking(folders) -> ImageReward:
    return ImageReward(folders["imagereward"], device="cpu", batch_size=3)


@pytest.fixture(params=["pickscore", "imagereward"])
def reward(request, pick, liking):
    return {"pickscore": pick, "imagereward": liking}[request.param]


def counted(monkeypatch, module: torch.nn.Module) -> list[int]:
    """The rows of each forward pass of `module`, from now on."""
    rows, original = [], module.forward

    def count(*args, **kwargs):
        rows.append(len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "forward", count)
    return rows


def test_pickscore_is_the_scaled_cosine_of_the_features(pick):
    one = samples()[1]
    ids = pick.tokenizer([one.prompt.text], return_tensors="pt").input_ids
    with torch.no_grad():
        image = pick.model.get_image_features(cropped(one.images[0])[None]).pooler_output[0].numpy().astype(float)
        text = pick.model.get_text_features(ids).pooler_output[0].numpy().astype(float)
    cosine = image @ text / np.sqrt((image**2).sum() * (text**2).sum())
    assert pick([one]) == [pytest.approx(np.exp(3.5) * cosine, abs=1e-4)]


def test_pickscore_is_the_logit_of_transformers_own_clip(pick):
    one = samples()[4]
    ids = pick.tokenizer([one.prompt.text], return_tensors="pt").input_ids
    with torch.no_grad():
        logit = pick.model(input_ids=ids, pixel_values=cropped(one.images[0])[None]).logits_per_image.item()
    assert pick([one]) == [pytest.approx(logit, abs=1e-4)]


def test_the_range_of_pickscore_is_its_own_scale(pick):
    assert pick.range == pytest.approx((-np.exp(3.5), np.exp(3.5)), rel=1e-6)


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_original_weights_score_as_transformers_modules_called_directly(tmp_path, parts, layout):
    reward = ImageReward(write_imagereward(tmp_path, parts, pickled=layout == "pt"), device="cpu")
    expected = [parts.score(reward.tokenizer, one.prompt.text, one.images[0]) for one in samples()]
    np.testing.assert_allclose(reward(samples()), expected, atol=2e-4)
    assert np.std(expected) > 0.01, "the toy scores everything alike, so agreeing proves nothing"


def test_every_weight_has_its_original_name_and_comes_back(parts, liking):
    ours = liking.model.state_dict()
    originals = {imagereward.original_name(name): value for name, value in ours.items()}
    expected = {name: value for name, value in parts.original().items() if not imagereward.UNUSED.search(name)}
    assert originals.keys() == expected.keys()
    assert all(torch.equal(originals[name], expected[name]) for name in expected)
    assert [imagereward.our_name(name) for name in originals] == list(ours)


def test_the_head_is_linear_so_the_mean_of_two_features_gets_the_mean_score(liking):
    one, two = torch.randn(2, 32, generator=torch.Generator().manual_seed(2)) * 5
    with torch.no_grad():
        apart = (liking.model.head(one) + liking.model.head(two)) / 2
        assert torch.allclose(liking.model.head((one + two) / 2), apart, atol=1e-5)


def test_a_score_beyond_the_range_of_imagereward_is_handed_on_not_clamped(liking, monkeypatch):
    before = liking(samples()[:1])[0]
    monkeypatch.setattr(liking.model.head[-1].bias, "data", liking.model.head[-1].bias + 100)
    assert liking(samples()[:1]) == [pytest.approx(before + 100 / 1.0333394966054072, abs=1e-3)]


def test_the_published_sizes_are_vit_l_16_at_224_pixels():
    with torch.device("meta"):
        model = imagereward.Network(imagereward.VISION, {**TEXT, "vocab_size": 30524, "hidden_size": 768,
            "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "max_position_embeddings": 512})  # fmt: skip
    shapes = {imagereward.original_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 14 * 14 + 1, 1024)
    assert shapes["blip.visual_encoder.blocks.23.attn.qkv.weight"] == (3 * 1024, 1024)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert shapes["mlp.layers.0.weight"] == (1024, 768)
    assert model.vision.post_layernorm.eps == model.vision.encoder.layers[0].layer_norm1.eps == 1e-6
    # 1,786,880,927 bytes of ImageReward.pt / 4 = 446.7 million numbers, some of them unused
    assert 445e6 < sum(np.prod(shape) for shape in shapes.values()) < 446.7e6


EVEN, ODD = [(64, 64), (48, 30), (20, 10), (48, 48), (40, 100)], [(100, 37), (37, 101)]  # margin left by the cut


@pytest.mark.parametrize("width, height", EVEN + ODD)
def test_imagereward_resizes_by_the_shorter_side_cuts_the_centre_then_normalises(liking, width, height):
    image = picture(3, width, height)
    np.testing.assert_allclose(liking.preprocess(image).numpy(), cropped(image).numpy(), atol=1e-5)


@pytest.mark.parametrize("width, height", EVEN)
def test_pickscore_sees_pictures_as_clips_processor_on_pil_does(pick, width, height):
    image = picture(3, width, height)
    shown = pick.processor([image], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(shown.numpy(), cropped(image).numpy(), atol=1e-5)


def test_pictures_that_are_not_rgb_are_converted(reward):
    grey = picture(0).convert("L")
    assert reward([sample("a red circle", grey)]) == reward([sample("a red circle", grey.convert("RGB"))])


def test_a_batch_scores_like_one_by_one(reward):
    np.testing.assert_allclose(reward(samples()), [reward([one])[0] for one in samples()], atol=1e-4)


def test_different_prompts_and_pictures_score_differently(reward):
    same_picture = [sample(text, picture(1)) for text in ("a red circle", "two blue square")]
    assert len({round(score, 5) for score in reward([*samples(), *same_picture])}) == 10


def test_a_sample_scores_the_mean_of_its_pictures(reward):
    one, two = picture(1), picture(2)
    scores = reward([sample("a red circle", *images) for images in ((one,), (two,), (one, two))])
    assert scores[2] == pytest.approx((scores[0] + scores[1]) / 2, abs=1e-5)


def test_each_distinct_picture_is_encoded_once_in_batches(pick, liking, monkeypatch):
    pictures = [picture(seed) for seed in range(8)]
    shared = [sample(text, *pictures) for text in ("a red circle", "two", "a red circle")]
    for reward, vision in ((pick, pick.model.vision_model), (liking, liking.model.vision)):
        rows = counted(monkeypatch, vision)
        reward([*shared, *shared])
        assert rows == [3, 3, 2]


def test_pickscore_encodes_each_distinct_prompt_once(pick, monkeypatch):
    rows = counted(monkeypatch, pick.model.text_model)
    pick(samples())
    assert rows == [2]


def test_imagereward_reads_each_distinct_pair_of_picture_and_prompt_once(liking, monkeypatch):
    one, two = picture(1), picture(2)
    rows = counted(monkeypatch, liking.model.text)
    pairs = [sample("a red circle", one), sample("two", one), sample("a red circle", one, two), sample("two", one)]
    liking(pairs)
    assert rows == [3]


def test_the_rewrite_and_the_reasoning_are_never_read(reward):
    changed = [replace(one, rewrite="two blue square", completion="other") for one in samples()]
    assert reward(changed) == reward(samples())


def test_long_prompts_and_emoji_are_cut_and_scored(pick, liking):
    for reward, longest in ((pick, 77), (liking, 35)):
        ids = reward.tokenizer("red " * 200, truncation=True, max_length=longest).input_ids
        close = reward.tokenizer("red").input_ids[-1]
        assert len(ids) == longest
        assert ids[-1] == close
        words = longest - 2
        cut, whole = (sample("red " * count, picture(0)) for count in (words, 200))
        assert reward([cut]) == pytest.approx(reward([whole]), abs=1e-6)
        low, high = reward.range
        assert low <= reward([sample(EMOJI, picture(0))])[0] <= high
        assert reward([sample("", picture(0))])[0] is not None


def test_a_score_that_is_not_finite_is_absent_and_the_others_stay(pick, liking, monkeypatch):
    for reward, vision in ((pick, pick.model.vision_model.post_layernorm), (liking, liking.model.vision)):
        expected, original = reward(samples()[:3]), vision.forward

        def broken(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            values = out if isinstance(out, torch.Tensor) else out.last_hidden_state
            values[0] = torch.nan
            return out

        with monkeypatch.context() as patch:
            patch.setattr(vision, "forward", broken)
            scores = reward(samples()[:3])
        assert scores[0] is None
        assert scores[1:] == pytest.approx(expected[1:], abs=1e-5)


def test_a_sample_without_its_pictures_is_refused_not_scored(reward):
    for images in [(), (picture(0), None)]:
        with pytest.raises(ValueError, match="'a red circle'"):
            reward([sample("a red circle", *images)])


def test_no_samples_no_scores(reward):
    assert reward([]) == []


def test_the_models_are_frozen_and_no_modules_themselves(reward):
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    assert not isinstance(reward, torch.nn.Module)


def test_half_precision_agrees_with_full_over_float32_weights(folders, pick, liking):
    for name, kind, full in (("pickscore", PickScore, pick), ("imagereward", ImageReward, liking)):
        half = kind(folders[name], device="cpu", dtype="bfloat16")
        assert next(half.model.parameters()).dtype == torch.float32
        np.testing.assert_allclose(half(samples()), full(samples()), atol=0.1)
        assert half(samples()) != full(samples())


def test_half_precision_weights_compute_in_float32(folders, liking, tmp_path):
    weights = load_file(folders["imagereward"] / WEIGHTS)
    for file in folders["imagereward"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / WEIGHTS)
    half = ImageReward(tmp_path, device="cpu")
    assert next(half.model.parameters()).dtype == torch.float32
    np.testing.assert_allclose(half(samples()), liking(samples()), atol=0.02)


def test_both_are_built_by_name(folders):
    options = RewardOptions(pickscore_path=folders["pickscore"], imagereward_path=folders["imagereward"])
    built = build(["imagereward", "pickscore"], options, RewardContext())
    assert [reward.name for reward in built] == ["imagereward", "pickscore"]
    assert all(low <= s <= high for reward in built for low, high in [reward.range] for s in reward(samples()))


# ---------------------------------------------------------------- checkpoints that cannot be used


def test_a_missing_published_checkpoint_names_size_licence_and_command(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for module, kind, command in (
        (pickscore, PickScore, "hf download yuvalkirstain/PickScore_v1"),
        (imagereward, ImageReward, "hf download THUDM/ImageReward --include 'ImageReward.pt'"),
    ):
        with pytest.raises(UserError) as caught:
            kind(device="cpu")
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in (command, module.PUBLISHED.size, module.PUBLISHED.licence))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for kind in (PickScore, ImageReward):
        with pytest.raises(UserError, match="no folder at .*nowhere"):
            kind(tmp_path / "nowhere", device="cpu")


def test_bad_constructor_values_are_named(folders):
    for name, kind in (("pickscore", PickScore), ("imagereward", ImageReward)):
        with pytest.raises(ValueError, match="'fp16' is none of float32"):
            kind(folders[name], device="cpu", dtype="fp16")
        with pytest.raises(ValueError, match="batch_size is 0"):
            kind(folders[name], device="cpu", batch_size=0)


def test_without_a_processor_or_words_of_its_own_the_published_ones_are_asked_for(monkeypatch, tmp_path, parts):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (write_pickscore(tmp_path / "clip") / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        PickScore(tmp_path / "clip", device="cpu")
    (write_imagereward(tmp_path / "blip", parts, pickled=False) / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="hf download google-bert/bert-base-uncased"):
        ImageReward(tmp_path / "blip", device="cpu")


def move_to_cache(cache: Path, repo: str, folder: Path, names: list[str]) -> None:
    """Move files of a folder to where the hub's cache keeps a repository at the locked commit."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / locked(repo).revision
    snapshot.mkdir(parents=True)
    for name in names:
        (folder / name).rename(snapshot / name)


def test_the_published_processor_and_words_are_read_from_the_hubs_cache(monkeypatch, tmp_path, parts, pick, liking):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for repo, folder, names, kind, whole in (
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", write_pickscore(tmp_path / "clip"),
         ["preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"], PickScore, pick),
        ("google-bert/bert-base-uncased", write_imagereward(tmp_path / "blip", parts, pickled=True),
         ["tokenizer_config.json", "tokenizer.json"], ImageReward, liking),
    ):  # fmt: skip
        move_to_cache(cache, repo, folder, names)
        assert kind(folder, device="cpu")(samples()) == pytest.approx(whole(samples()), abs=1e-4)


def test_pickscore_without_all_its_weights_or_with_another_crop_is_refused(tmp_path):
    folder = write_pickscore(tmp_path)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["crop_size"] = {"height": 40, "width": 48}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match="crops to 40x48"):
        PickScore(folder, device="cpu")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIPModel \(visual_projection\.weight"):
        PickScore(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read .* as a CLIP checkpoint"):
        PickScore(folder, device="cpu")


def test_imagereward_names_weights_that_are_missing_unknown_or_of_another_size(tmp_path, parts):
    folder, whole = write_imagereward(tmp_path, parts, pickled=False), parts.original()
    missing = {k: v for k, v in whole.items() if k != "blip.visual_encoder.blocks.1.attn.qkv.bias"}
    unknown = {**whole, "blip.text_encoder.pooler.dense.bias": torch.zeros(32)}
    resized = {**whole, "mlp.layers.7.weight": torch.zeros(1, 17)}
    for weights, message in (
        (missing, r"lack blip\.visual_encoder\.blocks\.1\.attn\.qkv\.bias \(1 in all\)"),
        (unknown, r"have unknown blip\.text_encoder\.pooler\.dense\.bias"),
        (resized, "size mismatch"),
    ):
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(UserError, match=message):
            ImageReward(folder, device="cpu")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"neither ImageReward.safetensors nor ImageReward.pt: run `hf download"):
        ImageReward(folder, device="cpu")


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("med_config.json", {"hidden_act": ...}, "lacks hidden_act"),
        ("vision_config.json", {"image_std": ...}, "lacks image_std"),
        ("med_config.json", {"hidden_size": "wide"}, "make no BLIP"),
        ("med_config.json", {"num_attention_heads": 5}, "make no BLIP"),
        ("med_config.json", {"vocab_size": 18}, "size mismatch"),
    ],
)
def test_imagereward_names_what_its_configuration_lacks(tmp_path, parts, file, change, message):
    path = write_imagereward(tmp_path, parts, pickled=False) / file
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(UserError, match=message):
        ImageReward(tmp_path, device="cpu")


def test_imagereward_refuses_another_models_words(tmp_path, parts):
    folder = write_imagereward(tmp_path, parts, pickled=False)
    BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
                  ).save_pretrained(folder)  # fmt: skip
    with pytest.raises(UserError, match=f"has 7 entries .* {TEXT['vocab_size']}"):
        ImageReward(folder, device="cpu")


class Intruder:
    """Unpickled freely, this makes a folder."""

    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, parts):
    folder, target = write_imagereward(tmp_path, parts, pickled=True), tmp_path / "intruded"
    (folder / "ImageReward.pt").write_bytes(pickle.dumps({"mlp": Intruder(str(target))}, protocol=2))
    with pytest.raises(UserError, match="ImageReward.pt is no checkpoint of plain tensors"):
        ImageReward(folder, device="cpu")
    assert not target.exists()
    pickle.loads((folder / "ImageReward.pt").read_bytes())
    assert target.exists(), "the intruder is harmless, so refusing it proves nothing"
