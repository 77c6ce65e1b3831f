"""The colour of a detected thing as GenEval names it: CLIP, zero-shot, over ten colours.

    crop        pixels outside the mask become #999; then the box is cut out (Pillow rounds its corners)
    read        CLIP's own transform: shorter side to 224 (bicubic), centre cut out; long things lose their ends
    colour      per colour the mean of three templates' unit features, made unit again; the highest cosine

Source: GenEval, djghosh13/geneval (MIT), with open_clip's ViT-L-14 of OpenAI. Here transformers reads the same
weights, because its checkpoint names the activation (these weights need QuickGELU). In open_clip it depends on the
name that the user picks. The original runs under autocast; here only pictures do, and only on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from transformers import AutoTokenizer, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from evaluation.clip_score import text_features
from evaluation.geneval import COLORS, Detection, Question
from models.frozen import arithmetic, autocast, batches, load
from models.hub import read, resolve
from models.weights import locked

PUBLISHED = locked("openai/clip-vit-large-patch14")
FILES = ("config.json", "model.safetensors", "tokenizer_config.json")
BACKGROUND = "#999"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def crop_of(image: Image.Image, detection: Detection) -> Image.Image | None:
    """The thing on grey; all of its box if the detection has no mask; None if the box, rounded, has no pixels."""
    left, top, right, bottom = map(round, detection.box)
    if right <= left or bottom <= top:
        return None
    if detection.mask is not None:
        grey = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image.convert("RGB"), grey, Image.fromarray(detection.mask))
    return image.crop((left, top, right, bottom))


class ClipColours:
    """Questions -> colours; an instance goes into `GenEval` as `colours`.

    `path` is a folder with a `CLIPModel` in safetensors and its tokenizer, or `PUBLISHED.repo`; a batch is of crops.
    """

    def __init__(self, path: str | Path = PUBLISHED.repo, *, device: str | torch.device, batch_size: int = 64):
        self.device, self.batch_size = torch.device(device), batch_size
        self.dtype = arithmetic("float16" if self.device.type == "cuda" else "float32")
        self.folder = folder = resolve(path, FILES)
        self.model, self.tokenizer = load(CLIPModel, folder, self.device), read(AutoTokenizer, folder)
        side = self.model.config.vision_config.image_size
        self.transform = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            ]
        )
        self._classifiers: dict[str, torch.Tensor] = {}
        self.settings = {"dtype": str(self.dtype).removeprefix("torch.")}

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[str | None]:
        """One of `COLORS` per question, None where the box is empty or the model's output is not finite."""
        crops = [crop_of(image, detection) for image, detection in questions]
        rows = [row for row, crop in enumerate(crops) if crop is not None]
        answers: list[str | None] = [None] * len(questions)
        for some in batches(rows, self.batch_size):
            features = self.encode_images([crops[row] for row in some])
            for row, feature in zip(some, features, strict=True):
                cosines = self.classifier(questions[row][1].name) @ feature
                if cosines.isfinite().all():
                    answers[row] = COLORS[cosines.argmax().item()]
        return answers

    @torch.inference_mode()
    def classifier(self, name: str) -> torch.Tensor:
        """(colours, D) float32 unit rows for things of that class; made once per class."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = text_features(self.model, self.tokenizer, texts)
            means = features.view(len(COLORS), len(TEMPLATES), -1).mean(dim=1)
            self._classifiers[name] = F.normalize(means, dim=-1)
        return self._classifiers[name]

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(I, D) float32 unit features of crops, in one forward pass."""
        pixels = torch.stack([self.transform(image) for image in images]).to(self.device)
        with autocast(self.device, self.dtype):
            out = self.model.get_image_features(pixel_values=pixels)
        return F.normalize(out.pooler_output.float(), dim=-1)
