"""CLIPScore as T2I-CompBench takes it: the raw cosine of a picture and a text by CLIP ViT-B/32, about 0.31.

Not multiplied by 2.5 and not clipped at 0. Source: CLIPScore_eval of github.com/Karine-Huang/T2I-CompBench. Two
differences: float32 (OpenAI's loader takes float16 on a GPU), and a text beyond 77 tokens is cut, where the original
stops with an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.frozen import batches, load
from models.hub import read, resolve
from models.weights import locked
from prompting import well_formed

PUBLISHED = locked("openai/clip-vit-base-patch32")
NEEDS = ("config.json", "preprocessor_config.json", "tokenizer_config.json")


def text_features(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """(T, D) float32 unit features of texts, in one forward pass."""
    read = tokenizer(
        [well_formed(text) for text in texts],
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        padding_side="right",
        return_tensors="pt",
    ).to(model.device)
    out = model.get_text_features(input_ids=read.input_ids, attention_mask=read.attention_mask)
    return F.normalize(out.pooler_output.float(), dim=-1)


class ClipScore:
    """Raw cosines of pictures and texts, in float32.

    `path` is a folder with a `CLIPModel`, its tokenizer and image processor, or `PUBLISHED.repo`.
    """

    def __init__(self, path: str | Path = PUBLISHED.repo, *, device: str | torch.device, batch_size: int = 32):
        self.device, self.batch_size = torch.device(device), batch_size
        self.folder = resolve(path, NEEDS, pickles=True)
        self.model = load(CLIPModel, self.folder, self.device)
        self.tokenizer = read(AutoTokenizer, self.folder)
        self.processor = read(CLIPImageProcessorPil, self.folder)

    @torch.inference_mode()
    def cosines(self, rows: Sequence[tuple[Image.Image, str]]) -> list[float]:
        """The cosine of each (picture, text); a text that comes again is encoded once."""
        if not rows:
            return []
        texts = list(dict.fromkeys(text for _, text in rows))
        place = {text: row for row, text in enumerate(texts)}
        read = [text_features(self.model, self.tokenizer, some) for some in batches(texts, self.batch_size)]
        text_TD = torch.cat(read).cpu()
        image_ID = torch.cat([self._look(some) for some in batches([image for image, _ in rows], self.batch_size)])
        return (image_ID * text_TD[[place[text] for _, text in rows]]).sum(-1).tolist()

    def _look(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        out = self.model.get_image_features(pixel_values=pixels.to(self.device))
        return F.normalize(out.pooler_output, dim=-1).cpu()
