"""The colors of uint8 images: jitter in each image's order and grayscale; then finishes images without blur.

A program works on a part of one image, so the image's parameters are scalars: operations that it does not need are
skipped by a branch that all threads take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import kind
from .tiles import round_to

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_BRIGHTNESS, _CONTRAST, _SATURATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # Values in `order`; 3 is hue


@triton.jit
def gray_of(red, green, blue):
    """The gray level of each pixel, with torchvision's weights."""
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def clip(level):
    """Clamp to [0, 255]."""
    return tl.minimum(tl.maximum(level, 0.0), 255.0)


@triton.jit
def blend(red, green, blue, factor, other):
    """factor * image + other, clipped."""
    return clip(red * factor + other), clip(green * factor + other), clip(blue * factor + other)


@triton.jit
def shift_hue(red, green, blue, turns):
    """Rotate the hue in HSV space; value and saturation stay."""
    low = tl.minimum(tl.minimum(red, green), blue)
    high = tl.maximum(tl.maximum(red, green), blue)
    chroma = high - low
    scale = 1.0 / tl.maximum(chroma, _TINY)  # Gray pixels: 0 * finite, never NaN
    hue = tl.where(high == green, (blue - red) * scale + 2.0, (red - green) * scale + 4.0)
    hue = tl.where(high == red, (green - blue) * scale, hue) + 6.0 * turns
    hue -= 6.0 * tl.floor(hue * (1.0 / 6.0))
    # The share of the chroma in each channel is a trapezium over the six sectors of the hue circle.
    red = low + chroma * tl.clamp(tl.abs(hue - 3.0) - 1.0, 0.0, 1.0)
    green = low + chroma * tl.clamp(2.0 - tl.abs(hue - 2.0), 0.0, 1.0)
    return red, green, low + chroma * tl.clamp(2.0 - tl.abs(hue - 4.0), 0.0, 1.0)


@triton.jit
def jitter(red, green, blue, order, slots, brightness, contrast, saturation, turns, mean):
    """Apply the first `slots` operations of the order; `mean` is that of the gray image before contrast."""
    for slot in range(slots):  # Not unrolled: hue alone is most of the code
        operation = tl.load(order + slot)
        if operation == _BRIGHTNESS:
            red, green, blue = blend(red, green, blue, brightness, 0.0)
        elif operation == _CONTRAST:
            red, green, blue = blend(red, green, blue, contrast, mean * (1.0 - contrast))
        elif operation == _SATURATION:
            gray = gray_of(red, green, blue)
            red, green, blue = blend(red, green, blue, saturation, gray * (1.0 - saturation))
        elif turns != 0.0:
            red, green, blue = shift_hue(red, green, blue, turns)
    return red, green, blue


@triton.jit
def load_pixels(images, first, mask):
    """Load three interleaved channels as float32."""
    red = tl.load(images + first, mask=mask, other=0).to(tl.float32)
    green = tl.load(images + first + 1, mask=mask, other=0).to(tl.float32)
    return red, green, tl.load(images + first + 2, mask=mask, other=0).to(tl.float32)


@triton.jit
def store_finished(result, level, solarize, scale, shift, mask):
    """Solarize, normalize and round one channel."""
    if solarize:
        level = tl.where(level >= 128.0, 255.0 - level, level)
    tl.store(result, round_to(level * scale - shift, result.dtype.element_ty), mask=mask)


@triton.jit
def gray_sum_kernel(
    images: kind.Bytes,  # [B, pixels, 3] contiguous uint8
    brightness: kind.Floats,  # [B], as all that follow
    contrast: kind.Floats,
    saturation: kind.Floats,
    hue: kind.Floats,
    order: kind.Longs,  # [B, 4] int64
    gray_sum: kind.Floats,  # [B, parts]: before contrast; not written where it changes nothing
    pixels: kind.Count,
    parts: kind.Count,
    PIXELS: tl.constexpr,
):
    image = tl.program_id(0) // parts
    if tl.load(contrast + image) == 1.0:
        return
    pixel = tl.program_id(0) % parts * PIXELS + tl.arange(0, PIXELS)
    slots = 0
    for slot in tl.static_range(1, 4):
        slots = tl.where(tl.load(order + image * 4 + slot) == _CONTRAST, slot, slots)
    red, green, blue = load_pixels(images + tl.cast(image, tl.int64) * pixels * 3, pixel * 3, pixel < pixels)
    red, green, blue = jitter(
        red, green, blue, order + image * 4, slots,
        tl.load(brightness + image), 1.0, tl.load(saturation + image), tl.load(hue + image), 0.0,
    )  # fmt: skip
    total = tl.sum(gray_of(red, green, blue), 0)  # Pixels beyond the image are black, whatever the jitter
    tl.store(gray_sum + tl.program_id(0), total)


@triton.jit
def color_kernel(
    images: kind.Bytes,  # [B, pixels, 3] contiguous uint8
    brightness: kind.Floats,  # [B], as all that follow
    contrast: kind.Floats,
    saturation: kind.Floats,
    hue: kind.Floats,
    order: kind.Longs,  # [B, 4] int64
    grayscale: kind.Bools,
    blur_sigma: kind.Floats,  # Not read unless BLUR
    solarize: kind.Bools,
    flip: kind.Bools,
    gray_sum: kind.Floats,  # [B, parts]
    levels: kind.Levels,  # [B, pixels, 3]: of the images to be blurred
    result: kind.Elements,  # [B, pixels, 3]: all others
    red_scale: kind.Factor,
    green_scale: kind.Factor,
    blue_scale: kind.Factor,
    red_shift: kind.Factor,
    green_shift: kind.Factor,
    blue_shift: kind.Factor,
    pixels: kind.Count,
    width: kind.Count,
    parts: kind.Count,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    BLUR: tl.constexpr,
):
    image = tl.program_id(0) // parts
    base = tl.cast(image, tl.int64) * pixels * 3
    pixel = tl.program_id(0) % parts * PIXELS + tl.arange(0, PIXELS)
    mask = pixel < pixels
    contrast_factor = tl.load(contrast + image)
    mean = 0.0
    if contrast_factor != 1.0:
        part = tl.arange(0, PARTS)
        mean = tl.sum(tl.load(gray_sum + image * parts + part, mask=part < parts, other=0.0), 0) / pixels
    red, green, blue = load_pixels(images + base, pixel * 3, mask)
    red, green, blue = jitter(
        red, green, blue, order + image * 4, 4,
        tl.load(brightness + image), contrast_factor, tl.load(saturation + image), tl.load(hue + image), mean,
    )  # fmt: skip
    if tl.load(grayscale + image):
        red = gray_of(red, green, blue)
        green = red
        blue = red
    if BLUR and tl.load(blur_sigma + image) > 0.0:
        kept = levels + base + pixel * 3
        tl.store(kept, red.to(levels.dtype.element_ty), mask=mask)
        tl.store(kept + 1, green.to(levels.dtype.element_ty), mask=mask)
        tl.store(kept + 2, blue.to(levels.dtype.element_ty), mask=mask)
        return
    if tl.load(flip + image):
        pixel += width - 1 - 2 * (pixel % width)
    solarized = tl.load(solarize + image)
    finished = result + base + pixel * 3
    store_finished(finished, red, solarized, red_scale, red_shift, mask)
    store_finished(finished + 1, green, solarized, green_scale, green_shift, mask)
    store_finished(finished + 2, blue, solarized, blue_scale, blue_shift, mask)
