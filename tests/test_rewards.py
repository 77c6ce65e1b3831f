"""Claims about the rewards that need no published weights: HPS on a random toy of its architecture, format, length."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import rewards
from errors import UserError
from interfaces import Prompt, Sample
from rewards import REWARDS, RewardContext, RewardOptions, build
from rewards.hps import HPS
from rewards.text import Format, Length

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
WORDS = "a red green blue circle square two three left right of and".split()
VISION = {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A word-level tokenizer that writes <s> text </s>, cuts inside the brackets and pads on the right."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", *WORDS, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    brackets = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=brackets)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return vocab


def write_folder(folder: Path) -> Path:
    """A random HPS in open_clip's own folder layout."""
    vocab = write_tokenizer(folder)
    text = {"context_length": 77, "vocab_size": len(vocab), "width": 64, "heads": 2, "layers": 2}
    pooling = {"pool_type": "eos", "eos_id": vocab["</s>"], "pad_id": vocab["<pad>"], "hf_tokenizer_name": "."}
    model_cfg = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": {**text, **pooling}}
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model_cfg).state_dict(), folder / "open_clip_model.safetensors")
    preprocess_cfg = {"mean": MEAN, "std": STD, "resize_mode": "longest", "interpolation": "bicubic"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def hps(folder) -> HPS:
    return HPS(folder, device="cpu", batch_size=3)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def sample(text: str, *images: Image.Image, rewrite: str = "a rewrite") -> Sample:
    return Sample(Prompt(text), "completion", rewrite, images)


def samples() -> list[Sample]:
    """Two groups of four, pictures of several shapes."""
    sizes = [(64, 64), (96, 40), (30, 70), (48, 48)]
    return [
        sample(text, picture(8 * row + i, *size))
        for row, text in enumerate(["a red circle", "two blue square left of a green circle"])
        for i, size in enumerate(sizes)
    ]


def test_hps_is_the_bare_cosine_of_the_features(hps):
    one = samples()[1]
    with torch.no_grad():
        image = hps.model.encode_image(hps.preprocess(one.images[0])[None])[0].numpy().astype(np.float64)
        text = hps.model.encode_text(hps.tokenize([one.prompt.text]))[0].numpy().astype(np.float64)
    cosine = image @ text / np.sqrt((image**2).sum() * (text**2).sum())
    assert hps([one]) == [pytest.approx(cosine, abs=1e-6)]


@pytest.mark.parametrize("width, height", [(64, 64), (100, 37), (37, 100), (48, 30), (20, 10), (200, 1)])
def test_pictures_are_resized_by_the_longest_side_padded_black_then_normalised(hps, width, height):
    image = picture(3, width, height)
    scale = 48 / max(width, height)
    new = max(1, round(width * scale)), max(1, round(height * scale))
    channels = [Image.fromarray(channel) for channel in np.asarray(image, np.float32).transpose(2, 0, 1) / 255]
    resized = np.stack([np.asarray(channel.resize(new, Image.Resampling.BICUBIC)) for channel in channels])
    square = np.zeros((3, 48, 48), np.float32)
    top, left = (48 - new[1]) // 2, (48 - new[0]) // 2
    square[:, top : top + new[1], left : left + new[0]] = resized
    expected = (square - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(hps.preprocess(image).numpy(), expected, atol=1e-4)


def test_each_distinct_prompt_is_encoded_once(hps, monkeypatch):
    rows, encode = [], hps.model.encode_text
    monkeypatch.setattr(hps.model, "encode_text", lambda batch: rows.append(len(batch)) or encode(batch))
    hps(samples())
    assert rows == [2]


@pytest.fixture
def toy_architecture(tmp_path, monkeypatch) -> str:
    """The name of a tiny architecture in place of ViT-H-14, with CLIP's tokenizer."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path / "toy-hps.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}))
    open_clip.add_model_config(path)
    monkeypatch.setattr("rewards.hps.ARCHITECTURE", path.stem)
    return path.stem


def test_a_checkpoint_file_is_read_from_its_state_dict(tmp_path, toy_architecture):
    torch.manual_seed(1)
    model = open_clip.CLIP(**open_clip.get_model_config(toy_architecture)).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "hps.pt")
    hps, one = HPS(tmp_path / "hps.pt", device="cpu"), samples()[1]
    with torch.no_grad():
        image = model.encode_image(hps.preprocess(one.images[0])[None], normalize=True)
        text = model.encode_text(open_clip.tokenize([one.prompt.text]), normalize=True)
    assert hps([one]) == [pytest.approx((image @ text.T).item(), abs=1e-6)]
    assert tuple(hps.mean.flatten().tolist()) == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_a_checkpoint_with_missing_or_misplaced_weights_is_refused(tmp_path, toy_architecture):
    weights = open_clip.CLIP(**open_clip.get_model_config(toy_architecture)).state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    del weights["ln_final.weight"]
    torch.save({"state_dict": weights}, tmp_path / "short.pt")
    for name, message in [("bare.pt", "state_dict"), ("short.pt", "ln_final.weight")]:
        with pytest.raises(UserError, match=message):
            HPS(tmp_path / name, device="cpu")


def test_format_is_one_for_any_readable_answer():
    readable = sample("a red circle")
    assert Format()([readable, replace(readable, rewrite=None)]) == [1.0, 0.0]


def test_length_is_full_in_the_window_and_falls_linearly_outside():
    length = Length(lambda text: len(text.split()), low=4, high=10, max_tokens=512)
    tokens = [0, 1, 3, 4, 7, 10, 12, 15, 20, 21, 500]
    expected = [0.0, 0.25, 0.75, 1.0, 1.0, 1.0, 0.8, 0.5, 0.0, 0.0, 0.0]
    rewrites = [sample("a red circle", rewrite="word " * count) for count in tokens]
    assert length(rewrites) == pytest.approx(expected)
    assert length([replace(rewrites[0], rewrite=None)]) == [0.0]


@pytest.mark.parametrize(
    "low, high, message", [(0, 5, "1 <= low"), (6, 5, "length_low 6"), (5, 80, "reads 77 tokens")]
)
def test_an_impossible_length_window_is_refused(low, high, message):
    with pytest.raises(UserError, match=message):
        Length(len, low, high, max_tokens=77)


class WordRenderer:
    """Counts words; draws nothing, for no reward here may draw."""

    max_tokens = 77

    def __call__(self, texts, seeds):
        raise AssertionError("a text reward drew a picture")

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def test_rewards_are_built_in_the_order_named(folder):
    options = RewardOptions(hps_path=str(folder), length_low=2, length_high=4)
    built = build(["length", "hps", "format"], options, RewardContext(renderer=WordRenderer()))
    assert [reward.name for reward in built] == ["length", "hps", "format"]
    assert [reward.needs_images for reward in built] == [False, True, False]
    assert built[0]([sample("a red circle", rewrite="three whole words")]) == [1.0]


def test_an_unknown_reward_names_the_nearest_and_all_valid_before_any_model_loads(monkeypatch):
    monkeypatch.setitem(REWARDS, "hps", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as caught:
        build(["hps", "lenght"], RewardOptions(), RewardContext())
    assert "unknown reward 'lenght', did you mean 'length'?" in str(caught.value)
    assert all(name in str(caught.value) for name in rewards.REWARDS)


def test_a_reward_named_twice_and_a_length_without_renderer_are_refused():
    with pytest.raises(UserError, match="named twice"):
        build(["format", "format"], RewardOptions(), RewardContext())
    with pytest.raises(UserError, match="RewardContext.renderer is None"):
        build(["length"], RewardOptions(), RewardContext())
