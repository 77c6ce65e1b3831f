"""The colour of a detected thing as GenEval names it: CLIP, zero-shot, over ten colours.

    crop        pixels outside the mask become #999; then the box is cut out (Pillow rounds its corners)
    read        CLIP's own transform: shorter side to 224 (bicubic), centre cut out; long things lose their ends
    colour      per colour the mean of three templates' unit features, made unit again; the highest cosine

Source: GenEval, djghosh13/geneval (MIT), with open_clip's ViT-L-14 of OpenAI. Here transformers reads the same
weights, because its checkpoint names the activation (these weights need QuickGELU), so it can be checked; in open_clip
it depends on the name that the user picks. The original runs under autocast; here only pictures do, and only on CUDA.
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

from errors import UserError
from evaluation.geneval import CLIP, COLORS, Detection, Question
from models.frozen import arithmetic, autocast, batches, load
from models.hub import read, resolve
from models.weights import locked

PUBLISHED = locked(CLIP)
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

    `path` is the published repo, or a folder with a `CLIPModel` with QuickGELU in safetensors, and its tokenizer. A
    batch is of crops, or of texts.
    """

    def __init__(self, path: str | Path = PUBLISHED.repo, *, device: str | torch.device, batch_size: int = 64):
        self.device, self.batch_size = torch.device(device), batch_size
        self.dtype = arithmetic("float16" if self.device.type == "cuda" else "float32")
        self.folder = folder = resolve(path, FILES)
        self.model, self.tokenizer = load(CLIPModel, folder, self.device), read(AutoTokenizer, folder)
        _check_activation(self.model, folder)
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
            features = torch.cat([self._encode_texts(some) for some in batches(texts, self.batch_size)])
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

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        read = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt").to(self.device)
        out = self.model.get_text_features(input_ids=read.input_ids, attention_mask=read.attention_mask)
        return F.normalize(out.pooler_output.float(), dim=-1)


def _check_activation(model: CLIPModel, folder: Path) -> None:
    for part, config in (("text", model.config.text_config), ("vision", model.config.vision_config)):
        if config.hidden_act != "quick_gelu":
            raise UserError(
                f"the {part} model in {folder} computes with {config.hidden_act}, GenEval's CLIP with quick_gelu: "
                f"give {PUBLISHED.repo}"
            )
