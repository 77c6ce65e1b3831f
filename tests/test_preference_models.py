"""Claims about PickScore and ImageReward, on tiny random models of their real classes in their real file layouts."""

import json
import shutil
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
from interfaces import Sample
from models.weights import locked
from rewards import imagereward
from rewards.imagereward import ImageReward
from rewards.pickscore import PickScore
from tests.tiny import count_rows, picture, sample

MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]
WORDS = "a red green blue circle square two three left right of and".split()


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


def test_pickscore_is_the_scaled_cosine_of_the_features(pick):
    one = samples()[1]
    ids = pick.tokenizer([one.prompt.text], return_tensors="pt").input_ids
    with torch.no_grad():
        image = pick.model.get_image_features(cropped(one.images[0])[None]).pooler_output[0].numpy().astype(float)
        text = pick.model.get_text_features(ids).pooler_output[0].numpy().astype(float)
    cosine = image @ text / np.sqrt((image**2).sum() * (text**2).sum())
    assert pick([one]) == [pytest.approx(np.exp(3.5) * cosine, abs=1e-4)]
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


@pytest.mark.parametrize("width, height", [(64, 64), (48, 30), (20, 10), (40, 100), (100, 37), (37, 101)])
def test_imagereward_resizes_by_the_shorter_side_cuts_the_centre_then_normalises(liking, width, height):
    image = picture(3, width, height)
    np.testing.assert_allclose(liking.preprocess(image).numpy(), cropped(image).numpy(), atol=1e-5)


def test_imagereward_reads_each_distinct_pair_of_picture_and_prompt_once(liking, monkeypatch):
    one, two = picture(1), picture(2)
    rows = count_rows(monkeypatch, liking.model.text)
    pairs = [sample("a red circle", one), sample("two", one), sample("a red circle", one, two), sample("two", one)]
    liking(pairs)
    assert rows == [3]


# Checkpoints


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
        move_to_cache(tmp_path / "new", repo, folder, names)
        with pytest.raises(UserError, match=f"hf download {repo}"):
            kind(folder, device="cpu")
        shutil.copytree(tmp_path / "new", cache, dirs_exist_ok=True)
        assert kind(folder, device="cpu")(samples()) == pytest.approx(whole(samples()), abs=1e-4)


def change(lost: str = "", **new: object):
    return lambda values: {key: value for key, value in values.items() if key != lost} | new


BAD = {  # file, how it is changed, what the error names
    "no standard deviation": ("vision_config.json", change("image_std"), "image_std"),
    "another vocabulary": ("med_config.json", change(vocab_size=18), "size mismatch"),
    "an unknown weight": (WEIGHTS, change(**{"blip.text_encoder.pooler": torch.ones(1)}), "pooler"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_folder_whose_parts_do_not_fit_is_refused(bad, tmp_path, parts):
    name, changed, named = BAD[bad]
    path = write_imagereward(tmp_path, parts, pickled=False) / name
    if name == WEIGHTS:
        save_file(changed(load_file(path)), path)
    else:
        path.write_text(json.dumps(changed(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=named) as caught:
        ImageReward(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)
