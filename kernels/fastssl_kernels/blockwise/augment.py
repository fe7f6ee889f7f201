"""Color, blur, flip and normalization of uint8 views in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..augment_parameters import BLUR_RADIUS, AugmentParameters

_GRAY = (0.2989, 0.587, 0.114)  # Torchvision's weights; they sum to 0.9999
_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # Values in `AugmentParameters.order`; 0 is brightness
_NEUTRAL = (1.0, 0.0, 0.0)  # The coefficients of a blend that changes nothing
_CHUNK_PIXELS = 2**16  # On a CPU: 768 KB of levels, about a core's L2 cache; half and a quarter were slower
_LOST = 2**-24  # A smaller tap is lost in the rounding of the sum


def augment(images: Tensor, parameters: AugmentParameters, out_dtype: torch.dtype) -> Tensor:
    """`fastssl_kernels.augment` in plain torch; the arguments are already checked."""
    numbers = _Numbers(
        blends=_blends(parameters),
        turns=_per_image(parameters.hue),
        grayscale=parameters.grayscale,
        taps=_taps(parameters, min(BLUR_RADIUS, images.shape[1] - 1, images.shape[2] - 1)),
        solarize=parameters.solarize,
        flip=parameters.flip,
    )
    out = images.new_empty(images.shape, dtype=out_dtype)
    run = _in_chunks if _host_may_read(images) else _apply
    run(images, numbers, parameters, out)
    return out.permute(0, 3, 1, 2)


class _Numbers(NamedTuple):
    """The coefficients of `_apply` for each image; B is the first axis of every tensor.

    `blends`: [B, 6, 3, 1, 1], see `_blend`: three before hue and three after it. `turns`: [B, 1, 1], hue rotations.
    `taps`: [B, radius + 1], blur weights by distance. `grayscale`, `solarize`, `flip`: bool [B].
    """

    blends: Tensor
    turns: Tensor
    grayscale: Tensor
    taps: Tensor
    solarize: Tensor
    flip: Tensor


def _in_chunks(images: Tensor, numbers: _Numbers, parameters: AugmentParameters, out: Tensor) -> None:
    """Run `_apply` on a CPU in chunks that fit its cache; images that need the same operations share a chunk."""
    order, sizes = _alike(numbers, max(1, _CHUNK_PIXELS // (images.shape[1] * images.shape[2])))
    result, pixels = torch.empty_like(out[: max(sizes)]), out.view(torch.uint8).numpy()
    for rows, *values in zip(order.split(sizes), *(v[order].split(sizes) for v in numbers), strict=True):
        done = result[: len(rows)]
        _apply(images.index_select(0, rows), _Numbers(*values), parameters, done)
        pixels[rows.numpy()] = done.view(torch.uint8).numpy()  # Half the time of index_copy_


def _alike(numbers: _Numbers, count: int) -> tuple[Tensor, list[int]]:
    """An order of the images, int64 [B], and chunk sizes, such that images of a chunk have jitter in the same slots.

    A chunk holds at most `count` images; a batch that fits stays whole, because calls cost more than work. Images
    that turn gray are adjacent, and so are those that flip.
    """
    slots = ((numbers.blends[:, :, 0].flatten(1) != 1) * 2 ** torch.arange(6)).sum(1)
    order = (4 * slots + 2 * numbers.grayscale + numbers.flip).argsort()
    if len(order) <= count:
        return order, [len(order)]
    groups = slots[order].unique_consecutive(return_counts=True)[1].tolist()
    return order, [min(count, group - start) for group in groups for start in range(0, group, count)]


def _apply(images: Tensor, numbers: _Numbers, parameters: AugmentParameters, out: Tensor) -> None:
    """Augment uint8 [B, H, W, 3] into `out`, of the same shape."""
    # Planes of gray levels 0..255: contiguous channels vectorize, and whole levels are exact in float32.
    levels = images.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    needed, blends = _needed(numbers.blends), numbers.blends.unbind(1)
    for i in (0, 1, 2):
        levels = _blend(levels, blends[i], needed[i])
    levels = _where((numbers.turns != 0).flatten(), levels, _shift_hue, numbers.turns)
    for i in (3, 4, 5):
        levels = _blend(levels, blends[i], needed[i])
    levels = _where(numbers.grayscale, levels, lambda chosen: _gray(chosen)[None])
    if numbers.taps.shape[1] > 1:
        levels = _where(numbers.taps[:, 0] != 1, levels, _blur, numbers.taps)
    levels = _where(numbers.solarize, levels, lambda chosen: torch.where(chosen >= 128, 255 - chosen, chosen))
    levels = _where(numbers.flip, levels, lambda chosen: chosen.flip(-1))
    for i, plane in enumerate(levels.expand(3, -1, -1, -1).unbind(0)):
        mean, std = parameters.mean[i], parameters.std[i]
        out[..., i] = (plane * (1 / (255 * std))).sub_(mean / std).to(out.dtype)


def _where(mask: Tensor, levels: Tensor, function: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """`function(levels, *numbers)` for the images in `mask` [B], and unchanged `levels` [3, B, H, W] for the others.

    `function` may return one plane for all three channels. On a CPU it gets only the images in `mask`.
    """
    if not _host_may_read(mask):
        return torch.where(_per_image(mask), function(levels, *numbers), levels)
    chosen = mask.tolist()
    if all(chosen):
        return function(levels, *numbers)
    for run in _runs(chosen):
        levels[:, run] = function(levels[:, run], *(values[run] for values in numbers))
    return levels


def _runs(chosen: list[bool]) -> Iterator[slice]:
    """Slices of consecutive True; indexing with rows instead copies element by element."""
    stop = 0
    for value, run in groupby(chosen):
        start, stop = stop, stop + len(list(run))
        if value:
            yield slice(start, stop)


def _host_may_read(values: Tensor) -> bool:
    """Whether the host may read the values: on another device that would wait for it."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _blends(parameters: AugmentParameters) -> Tensor:
    """Brightness, contrast and saturation as the coefficients of `_blend`, [B, 6, 3, 1, 1].

    Hue is by far the most expensive, so it runs once: the others take the slots before and after it, with factor 1
    (no change) in a slot on the wrong side of an image's hue.
    """
    order = parameters.order
    factors = (parameters.brightness, parameters.contrast, parameters.saturation)
    factor = torch.stack((*factors, torch.ones_like(parameters.hue)), 1).gather(1, order)
    slot = torch.arange(4, device=order.device)
    hue_slot = (order == _HUE).to(torch.int64).argmax(1, keepdim=True)
    before = torch.where(slot < hue_slot, factor, 1.0)[:, :3]
    after = torch.where(slot > hue_slot, factor, 1.0)[:, 1:]
    factor, operation = torch.cat((before, after), 1), torch.cat((order[:, :3], order[:, 1:]), 1)
    rest = 1 - factor
    numbers = torch.stack((factor, rest * (operation == _CONTRAST), rest * (operation == _SATURATION)), 2)
    return numbers[..., None, None]


def _needed(blends: Tensor) -> list[list[bool]]:
    """Which coefficients of which blend, [6][3], change any image; all of them where the host may not read them."""
    if not _host_may_read(blends):
        return [[True] * 3] * 6
    return (blends.flatten(2).numpy() != _NEUTRAL).any(0).tolist()


def _blend(levels: Tensor, numbers: Tensor, needed: list[bool]) -> Tensor:
    """factor * image + about_mean * mean of its gray image + about_gray * its gray image, clipped, in place.

    `numbers`: [B, 3, 1, 1], these three coefficients; the last two are 1 - factor, or 0 for another operation.
    """
    if not needed[0]:
        return levels
    factor, about_mean, about_gray = numbers.unbind(1)
    if not (needed[1] or needed[2]):
        return levels.mul_(factor).clamp_(0, 255)
    other = _gray(levels)
    mean = other.mean((1, 2), keepdim=True).mul_(about_mean)
    other = other.mul_(about_gray).add_(mean) if needed[2] else mean
    return levels.mul_(factor).add_(other).clamp_(0, 255)


def _shift_hue(levels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of [3, B, H, W] in HSV space by [B, 1, 1] turns; value and saturation stay."""
    red, green, blue = levels.unbind(0)
    low = torch.minimum(green, blue).minimum(red)
    high = torch.maximum(green, blue).maximum(red)
    chroma = high - low
    # In sixths of a turn: 1 + (green + blue - red - low) / chroma from red, in all six sectors, toward green or blue.
    hue = (green - red).add_(blue - low)
    hue.div_(chroma.clamp_min(torch.finfo(torch.float32).tiny))  # Gray pixels: 0 / tiny, never NaN
    hue.add_(1).copysign_(green - blue).add_(6 * turns)
    hue.sub_((hue * (1 / 6)).floor_(), alpha=6)
    # The share of the chroma in each channel is a trapezium over the six sectors: with its clamp(distance, 1, 2)
    # it is distance - 1 for red and 2 - distance for the others.
    below, above = low - chroma, torch.add(low, chroma, alpha=2)
    return torch.stack(
        [
            torch.addcmul(below, chroma, (hue - 3).abs_().clamp_(1, 2)),
            torch.addcmul(above, chroma, (hue - 2).abs_().clamp_(1, 2), value=-1),
            torch.addcmul(above, chroma, (hue - 4).abs_().clamp_(1, 2), value=-1),
        ]
    )


def _taps(parameters: AugmentParameters, radius: int) -> Tensor:
    """Weights of the Gaussian by distance, [B, radius + 1]; exactly (1, 0, 0, ...) for sigma 0, [B, 1] for None."""
    sigma = parameters.blur_sigma
    if sigma is None:
        return torch.ones_like(parameters.hue)[:, None]
    distance = torch.arange(radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None]) ** 2)
    return weight / (2 * weight.sum(1, keepdim=True) - 1)


def _blur(levels: Tensor, taps: Tensor) -> Tensor:
    """Blur [C, B, H, W] along both axes, each image with its own taps, reflecting at the borders.

    A sum of shifted slices: several times faster on a CPU than products with banded matrices or grouped
    convolutions, and unaffected by autocast and TF32.
    """
    if _host_may_read(taps):
        images = zip(levels.unbind(1), taps.tolist(), strict=True)
        return torch.stack([_blur_planes(image, [tap for tap in row if tap > _LOST]) for image, row in images], 1)
    return _blur_planes(levels, [_per_image(tap) for tap in taps.unbind(1)])


def _blur_planes(levels: Tensor, taps: Sequence[float | Tensor]) -> Tensor:
    radius = len(taps) - 1
    levels = _convolve(pad(levels, (0, 0, radius, radius), mode="reflect"), taps, -2)
    return _convolve(pad(levels, (radius, radius, 0, 0), mode="reflect"), taps, -1)


def _convolve(padded: Tensor, taps: Sequence[float | Tensor], dim: int) -> Tensor:
    """Correlate along `dim` with symmetric taps, given by distance."""
    radius = len(taps) - 1
    size = padded.shape[dim] - 2 * radius
    out = padded.narrow(dim, radius, size) * taps[0]
    for i, tap in enumerate(taps[1:], 1):
        for start in (radius - i, radius + i):
            shifted = padded.narrow(dim, start, size)
            if isinstance(tap, float):
                out.add_(shifted, alpha=tap)
            else:
                out.addcmul_(shifted, tap)
    return out


def _gray(levels: Tensor) -> Tensor:
    red, green, blue = levels.unbind(0)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def _per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1], which broadcasts over planes [B, H, W] and [3, B, H, W]."""
    return values[:, None, None]
