"""Relative depth by DPT-hybrid (MiDaS), in 8 bits and larger where nearer, as T2I-CompBench's 3-D rule reads it.

The picture is squashed to 480x480 (bilinear) and mapped to -1 .. 1; the model's inverse depth is stretched from its
least to its greatest value, brought to the picture's size, cut to whole numbers of 0 .. 255, and resized with the
picture to the detector's frame. These are the official weights (dpt_hybrid-midas-501f0c75) in transformers' format, so
depth needs no substitute. A depth model in metres must not be put here: there, larger is farther.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from transformers import DPTForDepthEstimation

from evaluation.boxes import frame_size
from models.frozen import batches, load
from models.hub import resolve
from models.weights import locked

PUBLISHED = locked("Intel/dpt-hybrid-midas")
SIDE = 480
UNUSED = ("neck.fusion_stage.layers.0.residual_layer1.",)  # the first fusion has no residual; no file has these
_READ = Compose([Resize((SIDE, SIDE)), ToTensor(), Normalize(0.5, 0.5)])


class Depth:
    """Depth maps of pictures, in float32; `path` is a folder with a `DPTForDepthEstimation`, or `PUBLISHED.repo`."""

    name = "DPT"

    def __init__(self, path: str | Path = PUBLISHED.repo, *, device: str | torch.device, batch_size: int = 8):
        self.device, self.batch_size = torch.device(device), batch_size
        self.folder = resolve(path, ("config.json",), pickles=True)
        self.model = load(DPTForDepthEstimation, self.folder, self.device, unused=UNUSED)
        self.model.dpt.embeddings.image_size = (SIDE, SIDE)  # it checks its input against this and nothing more

    @torch.inference_mode()
    def maps(self, images: Sequence[Image.Image]) -> list[np.ndarray | None]:
        """An (H, W) array of uint8 per picture, in the size of its frame; None if the output is not finite."""
        found: list[np.ndarray | None] = []
        for some in batches(images, self.batch_size):
            pixels = torch.stack([_READ(image.convert("RGB")) for image in some]).to(self.device)
            depths_BHW = self.model(pixel_values=pixels).predicted_depth.float().cpu()
            found += [eight_bits(depth, image.size) for depth, image in zip(depths_BHW, some, strict=True)]
        return found


def eight_bits(depth_HW: torch.Tensor, size: tuple[int, int]) -> np.ndarray | None:
    """A model's depth as the rule reads it, for a picture of `size` (width, height); a flat one is 0 everywhere."""
    if not depth_HW.isfinite().all():
        return None
    spread = (depth_HW.max() - depth_HW.min()).clamp(min=torch.finfo(depth_HW.dtype).tiny)
    stretched = ((depth_HW - depth_HW.min()) / spread)[None, None]
    full = F.interpolate(stretched, size=(size[1], size[0]), mode="bilinear", align_corners=True)[0, 0]
    whole = (255 * full).clamp(0, 255).to(torch.uint8).numpy()
    width, height = frame_size(size)
    return np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.BILINEAR))
