"""Gaussian blur with one sigma per image, as two matrix products per window; then finishes the image."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import LOG2_E
from . import kind
from .color import store_finished
from .tiles import dot

_GAUSSIAN = tl.constexpr(-0.5 * LOG2_E)


@triton.jit
def reflect(index, size):
    """Reflect an index at both ends of an axis; it may lie less than `size` outside."""
    last = size - 1
    return last - tl.abs(last - tl.abs(index))


@triton.jit
def weight_at(distance, sigma, radius, dtype: tl.constexpr):
    """The Gaussian weight: 1 at the center, 0 beyond `radius`."""
    deviations = distance.to(tl.float32) * (1.0 / tl.maximum(sigma, 1e-3))
    return tl.where(tl.abs(distance) <= radius, tl.exp2(deviations * deviations * _GAUSSIAN), 0.0).to(dtype)


@triton.jit
def blur_kernel(
    levels: kind.Levels,  # [B, height, width, 3]
    blur_sigma: kind.Floats,  # [B], as those that follow
    solarize: kind.Bools,
    flip: kind.Bools,
    result: kind.Elements,  # [B, height, width, 3]: of the images with sigma above 0
    red_scale: kind.Factor,
    green_scale: kind.Factor,
    blue_scale: kind.Factor,
    red_shift: kind.Factor,
    green_shift: kind.Factor,
    blue_shift: kind.Factor,
    height: kind.Count,
    width: kind.Count,
    radius: kind.Count,
    across: kind.Count,  # Windows per row
    parts: kind.Count,
    WINDOW: tl.constexpr,
):
    image = tl.program_id(0) // parts
    sigma = tl.load(blur_sigma + image)
    if sigma <= 0.0:
        return
    part = tl.program_id(0) % parts
    step = WINDOW - 2 * radius  # The margin of a window is read but not written
    place = tl.arange(0, WINDOW)
    row = (part // across * step - radius + place)[:, None]
    column = (part % across * step - radius + place)[None, :]
    base = tl.cast(image, tl.int64) * height * width * 3
    source = (reflect(row, height) * width + reflect(column, width)) * 3
    within = (row < height + radius) & (column < width + radius)
    central = (place >= radius) & (place < WINDOW - radius)
    written = central[:, None] & central[None, :] & (row < height) & (column < width)
    # Along each axis the blur is a product with this symmetric matrix
    weight = weight_at(place[:, None] - place[None, :], sigma, radius, levels.dtype.element_ty)
    # The sum of the rounded weights, so that a uniform color does not change
    total = tl.sum(weight_at(place - WINDOW // 2, sigma, radius, levels.dtype.element_ty).to(tl.float32), 0)
    unit = 1.0 / (total * total)
    if tl.load(flip + image):
        column = width - 1 - column
    target = (row * width + column) * 3
    solarized = tl.load(solarize + image)
    for channel in range(3):  # Not unrolled: three windows at once take too many registers
        window = tl.load(levels + base + channel + source, mask=within, other=0.0)
        window = dot(weight, window, tl.zeros([WINDOW, WINDOW], tl.float32), "ieee").to(window.dtype)
        level = dot(window, weight, tl.zeros([WINDOW, WINDOW], tl.float32), "ieee") * unit
        scale = red_scale if channel == 0 else (green_scale if channel == 1 else blue_scale)
        shift = red_shift if channel == 0 else (green_shift if channel == 1 else blue_shift)
        store_finished(result + base + channel + target, level, solarized, scale, shift, written)
