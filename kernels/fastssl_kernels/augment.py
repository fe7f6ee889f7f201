"""Step 3 of the walk of a batch: colour, blur, flip and normalisation of uint8 views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AugmentParameters:
    """One number per image for every operation, all drawn by the sample plan.

    Tensors lie on the images' device; B images.
    `flip`, `grey`, `solarize`: bool [B]. `brightness`, `contrast`, `saturation`: float32 [B], 1 leaves the image alone.
    `hue`: float32 [B] in turns, -0.5 to 0.5, 0 leaves it alone. `blur_sigma`: float32 [B] in pixels, 0 leaves it alone.
    `order`: int64 [B, 4], the jitter operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the order of application.
    `mean`, `std`: per channel, in units of the [0, 1] range.
    """

    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grey: Tensor
    blur_sigma: Tensor
    solarize: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def augment(images: Tensor, parameters: AugmentParameters, *, out_dtype: torch.dtype) -> Tensor:
    raise NotImplementedError
