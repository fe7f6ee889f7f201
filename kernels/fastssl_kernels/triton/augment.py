"""`augment` in three launches: the mean gray level, for contrast; the colors of all images; the blur.

The second launch finishes the images without blur and stores the levels of the others for the third.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..augment_parameters import BLUR_RADIUS, AugmentParameters
from .blur import blur_kernel
from .color import color_kernel, gray_sum_kernel
from .configuration import Configuration

_PIXELS = 1024  # Per program; fewer for smaller images
_OPTIONS = {"num_warps": 8}
_WINDOW = 32  # Rows and columns read by a program of the blur
_BLUR_OPTIONS = {"num_warps": 4, "num_stages": 1}
_JITTER = ("brightness", "contrast", "saturation", "hue", "order")


def augment(images: Tensor, parameters: AugmentParameters, out_dtype: torch.dtype) -> Tensor:
    """`fastssl_kernels.augment` on Triton kernels; the arguments are already checked.

    `images`: uint8 [B, H, W, 3]. Returns [B, 3, H, W] in `out_dtype`, channels_last, bitwise the same at every call
    on one GPU. Levels to be blurred are rounded to float16, or to float32 if that is `out_dtype`. Nothing waits for
    the device.
    """
    images = images.contiguous()
    batch, height, width, _ = images.shape
    jitter = [getattr(parameters, name).contiguous() for name in _JITTER]
    gray, solarize, flip = (getattr(parameters, name).contiguous() for name in ("grayscale", "solarize", "flip"))
    normalize = (
        *(1 / (255 * std) for std in parameters.std),
        *(mean / std for mean, std in zip(parameters.mean, parameters.std, strict=True)),
    )
    result = torch.empty_like(images, dtype=out_dtype)
    sigma, levels = parameters.brightness, result  # Placeholders, not read without blur
    if blurred := parameters.blur_sigma is not None:
        sigma = parameters.blur_sigma.contiguous()
        levels = torch.empty_like(images, dtype=torch.float32 if out_dtype == torch.float32 else torch.float16)
    pixels, size, parts = _cut(height, width)
    gray_sum = torch.empty(batch, parts, dtype=torch.float32, device=images.device)
    with torch.cuda.device_of(images):
        gray_sum_kernel[batch * parts,](images, *jitter, gray_sum, pixels, parts, PIXELS=size, **_OPTIONS)
        color_kernel[batch * parts,](
            images, *jitter, gray, sigma, solarize, flip, gray_sum, levels, result, *normalize, pixels, width, parts,
            PIXELS=size, PARTS=triton.next_power_of_2(parts), BLUR=blurred, **_OPTIONS,
        )  # fmt: skip
        if blurred:
            radius = min(BLUR_RADIUS, height - 1, width - 1)
            down, across = (triton.cdiv(side, _WINDOW - 2 * radius) for side in (height, width))
            blur_kernel[batch * down * across,](
                levels, sigma, solarize, flip, result, *normalize, height, width, radius, across, down * across,
                WINDOW=_WINDOW, **_BLUR_OPTIONS,
            )  # fmt: skip
    return result.permute(0, 3, 1, 2)


def _cut(height: int, width: int) -> tuple[int, int, int]:
    """Pixels per image, pixels per program of the color kernels, and programs per image."""
    pixels = height * width
    size = min(_PIXELS, max(256, triton.next_power_of_2(pixels)))
    return pixels, size, triton.cdiv(pixels, size)


def configurations() -> Iterator[Configuration]:
    """Configurations to compile: crops of 224 px and, in one dtype, of 32 px."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = ((224, "bf16", True), (224, "fp16", True), (224, "fp32", True), (224, "bf16", False), (32, "bf16", True))
    for side, name, blurred in cases:
        _, size, parts = _cut(side, side)
        constants = {"PIXELS": size, "PARTS": triton.next_power_of_2(parts), "BLUR": blurred}
        label = f"{name} {side} {'some' if blurred else 'none'} blurred"
        yield Configuration(color_kernel, constants, dtypes[name], _OPTIONS, 0, label)
    yield Configuration(gray_sum_kernel, {"PIXELS": _PIXELS}, torch.uint8, _OPTIONS, 0, f"{_PIXELS} pixels")
    for name, dtype in dtypes.items():
        yield Configuration(blur_kernel, {"WINDOW": _WINDOW}, dtype, _BLUR_OPTIONS, 0, name)
