"""HPS v2.1 (Human Preference Score): cosine of a picture and the ORIGINAL prompt in a CLIP tuned on human choices.

`<f_image, f_text>`, both L2-normalised; no logit scale, no times 100, no offset. Scores lie in [-1, 1] (about 0.27 for
a usual picture) and compare only among pictures of one prompt. Source: HPSv2, arXiv 2306.09341, and its released code,
of which two habits are left out: downloading other weights first to overwrite them, and leaving a non-square picture
whose longest side already fits unpadded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from errors import UserError, one_line
from interfaces import Prompt, Reward, Sample
from models.frozen import arithmetic, autocast, check_pictures, freeze, mean_cosines
from models.hub import resolve
from models.weights import locked, read_weights

PUBLISHED, DEFAULT_FILE = locked("xswu/HPSv2"), "HPS_v2.1_compressed.pt"
DEFAULT = f"{PUBLISHED.repo}/{DEFAULT_FILE}"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
ARCHITECTURE = "ViT-H-14"  # of a checkpoint file
Loaded = tuple[torch.nn.Module, Callable[[list[str]], torch.Tensor], Sequence[float], Sequence[float]]


class HPS(Reward):
    """Preference score of a sample's pictures for its original prompt; the mean over its pictures.

    Args:
        path: `DEFAULT` (read from the hub's local cache, never fetched unasked), a checkpoint file with the weights
            under `state_dict` (HPS v2.x), or a folder in open_clip's own layout:
            `open_clip_config.json` (of `preprocess_cfg` mean and std count), `open_clip_model.safetensors`, and
            `tokenizer.json` with `tokenizer_config.json` if `text_cfg` has an `hf_tokenizer_name`.
        dtype: "float32", or "float16"/"bfloat16": autocast over float32 weights, as in the released code.
        batch_size: pictures, or texts, per forward pass.

    Raises:
        UserError: no checkpoint at `path`, or one that is not what the configuration says.
    """

    name = "hps"
    range = (-1.0, 1.0)

    def __init__(
        self,
        path: str | Path = DEFAULT,
        *,
        device: str | torch.device,
        dtype: str = "float32",
        batch_size: int = 32,
    ):
        self.device, self.dtype, self.batch_size = torch.device(device), arithmetic(dtype), batch_size
        path = _locate(path)
        model, self.tokenize, mean, std = _load_folder(path) if path.is_dir() else _load_file(path)
        self.max_tokens = self.tokenize.context_length
        self.model = freeze(model, self.device)
        self.size = model.visual.image_size[0]
        self.mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(3, 1, 1)

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One score in [-1, 1] per sample, None where it is not finite.

        Each distinct prompt and each distinct picture (the same PIL object) is encoded once, in batches.
        """
        check_pictures(samples, self.name)
        return mean_cosines(samples, self.encode_texts, self.encode_images, self.batch_size)

    def count_tokens(self, prompt: Prompt) -> int:
        """One more than it reads where the tokens differ if there is room for one more; else as many as it reads."""
        room = self.tokenize(prompt.text, self.max_tokens + 1)[:, : self.max_tokens]
        return self.max_tokens + bool((room != self.tokenize(prompt.text)).any())

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(T, D) features of a batch; what is beyond the model's context (77 tokens) is cut."""
        with autocast(self.device, self.dtype):
            return self.model.encode_text(self.tokenize(list(texts)).to(self.device))

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(I, D) features of a batch; pictures of any size and mode."""
        with autocast(self.device, self.dtype):
            return self.model.encode_image(torch.stack([self.preprocess(image) for image in images]))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """(3, size, size) float32: longest side resized on floats, centred on black, then CLIP mean and std."""
        pixels = tv.pil_to_tensor(image.convert("RGB")).to(self.device).float() / 255
        scale = self.size / max(pixels.shape[1:])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
        pixels = tv.resize(pixels, [height, width], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        pixels = F.pad(pixels, (left, self.size - width - left, top, self.size - height - top))
        return (pixels - self.mean) / self.std


def _locate(path: str | Path) -> Path:
    """The checkpoint file or folder on this disk. Nothing is fetched: that is a person's call."""
    if str(path) == DEFAULT:
        return resolve(PUBLISHED.repo, (DEFAULT_FILE,)) / DEFAULT_FILE
    if Path(path).is_dir():
        return resolve(path, (CONFIG, WEIGHTS))
    if not Path(path).is_file():
        raise UserError(f"no HPS checkpoint at {path}: give a .pt file, a folder with {CONFIG}, or {DEFAULT!r}")
    return Path(path)


def _load_file(path: Path) -> Loaded:
    """(model, tokenizer, mean, std) of a torch checkpoint; only tensors are unpickled, names and shapes must match."""
    weights = read_weights(path, under="state_dict")
    model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights of {path} are not those of {ARCHITECTURE} ({one_line(error)})") from error
    return model, open_clip.get_tokenizer(ARCHITECTURE), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD


def _load_folder(path: Path) -> Loaded:
    """(model, tokenizer, mean, std) of a folder in open_clip's own layout."""
    source = f"local-dir:{path}"
    try:
        model = open_clip.create_model(source, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(source)
        preprocess = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("preprocess_cfg", {})
    except Exception as error:  # open_clip lets through whatever its readers raise on damaged files
        raise UserError(f"cannot read {path} as an open_clip folder ({one_line(error)})") from error
    return model, tokenizer, preprocess.get("mean", OPENAI_DATASET_MEAN), preprocess.get("std", OPENAI_DATASET_STD)
