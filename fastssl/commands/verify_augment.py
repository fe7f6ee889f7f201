"""Errors of `augment` against its definition, torchvision's operations in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastssl_kernels import AugmentParameters, augment, use_backend

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.7, torch.float16: 0.25}  # Gray levels
_BATCH, _SIDE = 16, 24


def errors(dtype: torch.dtype, device: str, backend: str) -> tuple[float, float]:
    """The largest errors, in gray levels: of `augment` on a backend, and of torchvision in float32."""
    images, parameters = _pictures(), draw_parameters(_BATCH, seed=1)
    moved = {name: getattr(parameters, name).to(device) for name in _TENSORS}
    with use_backend(backend):
        found = augment(images.to(device), replace(parameters, **moved), out_dtype=dtype)
    scale = torch.tensor(parameters.std).double()[:, None, None], torch.tensor(parameters.mean).double()[:, None, None]
    levels = 255 * (found.cpu().double() * scale[0] + scale[1])
    unsolarized = _defined(images, replace(parameters, solarize=torch.zeros(_BATCH, dtype=torch.bool)), torch.float64)
    # Solarization jumps at its threshold, where rounding decides the side of a value
    jumps = parameters.solarize[:, None, None, None] & ((unsolarized - 128).abs() < LIMITS[dtype])
    truth = _defined(images, parameters, torch.float64)
    plain = _defined(images, parameters, torch.float32)
    worst = [(result - truth).abs()[~jumps].max().item() for result in (levels, plain)]
    return worst[0], worst[1]


def _defined(images: Tensor, parameters: AugmentParameters, dtype: torch.dtype) -> Tensor:
    """[B, 3, H, W] in gray levels, float64: torchvision's operations in order, image by image."""
    unit = images.permute(0, 3, 1, 2).to(dtype) / 255
    return torch.stack([_one(image, parameters, i) for i, image in enumerate(unit)]).double() * 255


def _one(image: Tensor, parameters: AugmentParameters, i: int) -> Tensor:
    jitter = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    numbers = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    for operation in parameters.order[i].tolist():
        image = jitter[operation](image, numbers[operation][i].item())
    if parameters.grayscale[i]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if parameters.blur_sigma is not None and parameters.blur_sigma[i] > 0:
        image = tv.gaussian_blur(image, [13, 13], [parameters.blur_sigma[i].item()])
    if parameters.solarize[i]:
        # Just under level 128, because level / 255 may round to either side of 128 / 255
        image = tv.solarize(image, 127.999 / 255)
    return tv.horizontal_flip(image) if parameters.flip[i] else image


def _pictures() -> Tensor:
    """uint8 [B, H, W, 3]: a gradient of colors and noise."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, _SIDE)
    corner, down, right = torch.rand(3, _BATCH, 1, 1, 3, generator=generator) * 1.4 - 0.2
    noise = torch.randn(_BATCH, _SIDE, _SIDE, 3, generator=generator) * 0.1
    image = corner + (down - corner) * ramp[None, :, None, None] + (right - corner) * ramp[None, None, :, None] + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


_TENSORS = ("flip", "brightness", "contrast", "saturation", "hue", "order", "grayscale", "blur_sigma", "solarize")


def draw_parameters(batch: int, seed: int = 0) -> AugmentParameters:
    """Each operation on about half of the images, with jitter so strong that values are clipped."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    def coin() -> Tensor:
        return torch.rand(batch, generator=generator) < 0.5

    return AugmentParameters(
        flip=coin(),
        brightness=uniform(0.4, 1.6),
        contrast=uniform(0.4, 1.6),
        saturation=uniform(0.4, 1.6),
        hue=uniform(-0.5, 0.5),
        order=torch.rand(batch, 4, generator=generator).argsort(1),
        grayscale=coin(),
        blur_sigma=uniform(0.1, 2.0) * coin(),
        solarize=coin(),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
