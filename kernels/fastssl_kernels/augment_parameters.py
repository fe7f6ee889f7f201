"""The parameters of `augment` for each image, and the checks of its arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .contract import check_tensor

BLUR_RADIUS = 6  # Three standard deviations at the largest sigma in use, 2: torchvision's kernel_size 13

_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PER_IMAGE = {
    "flip": torch.bool,
    "brightness": torch.float32,
    "contrast": torch.float32,
    "saturation": torch.float32,
    "hue": torch.float32,
    "order": torch.int64,
    "grayscale": torch.bool,
    "blur_sigma": torch.float32,
    "solarize": torch.bool,
}


@dataclass(frozen=True, slots=True)
class AugmentParameters:
    """One value per image for every operation, all drawn by the sample plan.

    Tensors are on the images' device; B images.

    - `brightness`, `contrast`, `saturation`: float32 [B], not negative; 1 changes nothing.
    - `hue`: float32 [B] in turns, -0.5 to 0.5; 0 changes nothing.
    - `order`: int64 [B, 4], the jitter operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the
      order of application; every row is a permutation.
    - `blur_sigma`: float32 [B] in pixels, up to 2; 0 changes nothing. None: no image is blurred.
    - `flip`, `grayscale`, `solarize`: bool [B].
    - `mean`, `std`: per channel, in units of the [0, 1] range.

    `augment` checks shapes, dtypes and devices, but not values: that would wait for the device.
    """

    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grayscale: Tensor
    blur_sigma: Tensor | None
    solarize: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple | list) or not all(isinstance(value, Real) for value in values):
                raise TypeError(
                    f"{name} of type {type(values).__name__} was given; it must be a tuple of three numbers"
                )
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean {self.mean} was given; it must hold three numbers, one per channel")
        if len(self.std) != 3 or not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std {self.std} was given; it must hold three positive numbers, one per channel")


def check(images: Tensor, parameters: AugmentParameters, out_dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError for arguments that `augment` does not accept."""
    check_tensor("images", images)
    if not isinstance(parameters, AugmentParameters):
        raise TypeError(f"parameters of type {type(parameters).__name__} were given; augment takes AugmentParameters")
    if images.dtype != torch.uint8:
        raise TypeError(f"images of dtype {images.dtype} were given; augment takes torch.uint8")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images of shape {list(images.shape)} were given; augment takes [B, H, W, 3], not empty")
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype {out_dtype} was given; allowed are {', '.join(map(str, _OUT_DTYPES))}")
    for name, dtype in _PER_IMAGE.items():
        value = getattr(parameters, name)
        if value is None and name == "blur_sigma":
            continue
        check_tensor(f"parameters.{name}", value)
        shape = (images.shape[0], 4) if name == "order" else (images.shape[0],)
        if value.dtype != dtype:
            raise TypeError(f"parameters.{name} of dtype {value.dtype} was given; it must be {dtype}")
        if value.shape != shape:
            raise ValueError(
                f"parameters.{name} of shape {list(value.shape)} was given; "
                f"it must be {list(shape)} for {images.shape[0]} images"
            )
        if value.device != images.device:
            raise ValueError(
                f"parameters.{name} on {value.device} was given; the images are on {images.device}, "
                "and the parameters must too"
            )
