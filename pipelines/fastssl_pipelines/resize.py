"""Cutting boxes out of decoded images and resizing them, as torchvision does."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate


def resized_boxes(images: list[Tensor], boxes: NDArray[np.int32], size: int) -> Tensor:
    """One box of each image, resized: uint8 [B, size, size, 3], to the bit what torchvision's resized_crop gives.

    `images`: uint8 [H, W, 3] on a CPU. `boxes`: int32 [B, 4], (top, left, height, width) in pixels. Bilinear with
    antialiasing.
    """
    crops = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    for image, crop, (top, left, height, width) in zip(images, crops, boxes.tolist(), strict=True):
        box = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
        crop.copy_(interpolate(box, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0))
    return crops
