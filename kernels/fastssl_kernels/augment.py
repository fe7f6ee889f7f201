"""Step 3 of the walk of a batch: colour, blur, flip and normalisation of uint8 views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLUR_RADIUS = 6  # three standard deviations at the largest sigma in use, 2: torchvision's kernel_size 13

_GREY = (0.2989, 0.587, 0.114)  # torchvision's weights; they sum to 0.9999
_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # values in `AugmentParameters.order`; 0 is brightness
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PER_IMAGE = {
    "flip": torch.bool,
    "brightness": torch.float32,
    "contrast": torch.float32,
    "saturation": torch.float32,
    "hue": torch.float32,
    "order": torch.int64,
    "grey": torch.bool,
    "blur_sigma": torch.float32,
    "solarize": torch.bool,
}


@dataclass(frozen=True, slots=True)
class AugmentParameters:
    """One number per image for every operation, all drawn by the sample plan.

    Tensors lie on the images' device; B images.

    - `brightness`, `contrast`, `saturation`: float32 [B], not negative; 1 leaves the image alone.
    - `hue`: float32 [B] in turns, -0.5 to 0.5; 0 leaves it alone.
    - `order`: int64 [B, 4], the jitter operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the
      order of application; every row is a permutation.
    - `blur_sigma`: float32 [B] in pixels, up to 2; 0 leaves the image alone.
    - `flip`, `grey`, `solarize`: bool [B].
    - `mean`, `std`: per channel, in units of the [0, 1] range.

    `augment` checks shapes, dtypes and devices, but no values: that would wait for the device.
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

    def __post_init__(self) -> None:
        if len(self.mean) != 3:
            raise ValueError(f"mean {self.mean} was given; it must hold three numbers, one per channel")
        if len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"std {self.std} was given; it must hold three positive numbers, one per channel")


def augment(images: Tensor, parameters: AugmentParameters, *, out_dtype: torch.dtype) -> Tensor:
    """Augment and normalise a batch of uint8 images, each with its own parameters.

    `images`: uint8 [B, H, W, 3] of any strides. Returns [B, 3, H, W] in `out_dtype` (float32, bfloat16 or
    float16), channels_last, on the images' device.

    In this order: brightness, contrast, saturation and hue as `order` says; greyscale; Gaussian blur of 13
    taps (fewer where the short side is under 7 pixels); solarise at level 128; horizontal flip; normalise.
    Each is the function of torchvision.transforms.v2.functional on float images, with no rounding in between.
    Raises TypeError for a wrong dtype and ValueError for a wrong shape or device.
    """
    _check(images, parameters, out_dtype)
    # Planes of grey levels 0..255: contiguous channels vectorise, and whole levels are exact in float32.
    levels = images.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    levels = _jitter(levels, parameters)
    levels = torch.where(_per_image(parameters.grey), _grey(levels), levels)
    levels = _blur(levels, parameters.blur_sigma)
    levels = torch.where(_per_image(parameters.solarize) & (levels >= 128), 255 - levels, levels)
    levels = torch.where(_per_image(parameters.flip), levels.flip(-1), levels)
    channels = [
        plane * (1 / (255 * std)) - mean / std
        for plane, mean, std in zip(levels.unbind(0), parameters.mean, parameters.std, strict=True)
    ]
    return torch.stack(channels, 1).to(out_dtype, memory_format=torch.channels_last)


def _jitter(levels: Tensor, parameters: AugmentParameters) -> Tensor:
    """Apply the four colour operations to [3, B, H, W], each image in its own order.

    Hue is far dearer than the others, so it runs once: the others take the slots before it and the slots
    after it, with factor 1 (no change) in a slot that lies on the wrong side of an image's hue.
    """
    order = parameters.order
    factors = (parameters.brightness, parameters.contrast, parameters.saturation)
    factor = torch.stack((*factors, torch.ones_like(parameters.hue)), 1).gather(1, order)
    slot = torch.arange(4, device=order.device)
    hue_slot = (order == _HUE).to(torch.int64).argmax(1, keepdim=True)
    before = torch.where(slot < hue_slot, factor, 1.0)
    after = torch.where(slot > hue_slot, factor, 1.0)
    for i in (0, 1, 2):
        levels = _blend(levels, order[:, i], before[:, i])
    levels = torch.where(_per_image(parameters.hue != 0), _shift_hue(levels, parameters.hue), levels)
    for i in (1, 2, 3):
        levels = _blend(levels, order[:, i], after[:, i])
    return levels


def _blend(levels: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """factor * image + (1 - factor) * other, with other black, the image's mean grey or its grey image."""
    grey = _grey(levels)
    rest = 1 - factor
    constant = grey.mean((1, 2)) * rest * (operation == _CONTRAST)
    other = torch.addcmul(_per_image(constant), grey, _per_image(rest * (operation == _SATURATION)))
    return torch.addcmul(other, levels, _per_image(factor)).clamp_(0, 255)


def _shift_hue(levels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of [3, B, H, W] in HSV space; value and saturation stay."""
    red, green, blue = levels.unbind(0)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    scale = chroma.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()  # grey pixels: 0 * finite, never NaN
    hue = torch.where(
        high == red,
        (green - blue) * scale,
        torch.where(high == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = (hue + _per_image(6 * turns)).remainder(6)
    # The share of the chroma in each channel is a trapezium over the six sectors of the hue circle.
    shares = ((hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs())
    return torch.stack([torch.addcmul(low, chroma, share.clamp(0, 1)) for share in shares])


def _blur(levels: Tensor, sigma: Tensor) -> Tensor:
    """Blur [3, B, H, W] along both axes, each image with its own sigma, reflecting at the borders.

    A sum of shifted slices: on CPU several times faster than products with banded matrices or grouped
    convolutions, and exempt from autocast and TF32.
    """
    height, width = levels.shape[-2:]
    radius = min(BLUR_RADIUS, height - 1, width - 1)
    distance = torch.arange(radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None]) ** 2)  # sigma 0: exactly (1, 0, 0, ...)
    weight = weight / (2 * weight.sum(1, keepdim=True) - 1)
    levels = _convolve(pad(levels, (0, 0, radius, radius), mode="reflect"), weight, -2)
    return _convolve(pad(levels, (radius, radius, 0, 0), mode="reflect"), weight, -1)


def _convolve(padded: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Correlate along `dim` with symmetric taps given by distance, [B, radius + 1]."""
    radius = weight.shape[1] - 1
    size = padded.shape[dim] - 2 * radius
    out = padded.narrow(dim, radius, size) * _per_image(weight[:, 0])
    for i in range(1, radius + 1):
        out.addcmul_(padded.narrow(dim, radius - i, size), _per_image(weight[:, i]))
        out.addcmul_(padded.narrow(dim, radius + i, size), _per_image(weight[:, i]))
    return out


def _grey(levels: Tensor) -> Tensor:
    red, green, blue = levels.unbind(0)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1], which broadcasts over planes [B, H, W] and [3, B, H, W]."""
    return values[:, None, None]


def _check(images: Tensor, parameters: AugmentParameters, out_dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images of dtype {images.dtype} were given; augment takes torch.uint8")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images of shape {list(images.shape)} were given; augment takes [B, H, W, 3], not empty")
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype {out_dtype} was given; allowed are {', '.join(map(str, _OUT_DTYPES))}")
    for name, dtype in _PER_IMAGE.items():
        value = getattr(parameters, name)
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
                f"parameters.{name} on {value.device} was given; the images lie on {images.device}, "
                "and the parameters must too"
            )
