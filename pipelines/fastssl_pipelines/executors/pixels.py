"""Pixel operations of all executors: crop and resize the boxes of a plan, then augment the crops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl_kernels import AugmentParameters, augment
from fastssl_pipelines.executors.transfer import to_device
from fastssl_pipelines.plan import BatchPlan, ViewPlan

_PER_IMAGE = tuple(field.name for field in fields(AugmentParameters) if field.name not in ("mean", "std"))


def resized_boxes(images: Iterable[Tensor], boxes: NDArray[np.int32], size: int) -> Tensor:
    """Crop one box of each image and resize it: uint8 [B, size, size, 3], bit-identical to torchvision's resized_crop.

    `images`: uint8 [1, 3, H, W] on a CPU, channels_last. `boxes`: int32 [B, 4], (top, left, height, width) in pixels.
    Bilinear with antialiasing.
    """
    # For a view of 32 pixels, the overhead of interpolate() is as large as the work itself
    resize = torch.ops.aten._upsample_bilinear2d_aa.default
    crops = [
        resize(image[:, :, top : top + height, left : left + width], [size, size], False)
        for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
    ]
    return torch.cat(crops).permute(0, 2, 3, 1).contiguous()


def resized_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop one box of each image and resize it: uint8 [B, size, size, 3], within one gray level of `resized_boxes`.

    `images`: float32 [B, H, 3, W], gray levels. `boxes`: int32 [B, 4] on the same device. Uses two matrix products.
    """
    count, image_height, channels, image_width = images.shape
    weights = _resize_weights(boxes, max(image_height, image_width), size)
    rows, columns = weights[:, 0, :, :image_height], weights[:, 1, :, :image_width]
    pixels = torch.bmm(rows, images.view(count, image_height, channels * image_width))
    pixels = torch.bmm(pixels.view(count, size * channels, image_width), columns.transpose(1, 2))
    # The conversion truncates; weights sum to 1, so nothing leaves the range.
    pixels = pixels.add_(0.5).to(torch.uint8).view(count, size, channels, size)
    return pixels.transpose(2, 3).contiguous()


def _resize_weights(boxes: Tensor, image_length: int, size: int) -> Tensor:
    """Weights of source pixels in output pixels along both axes, [B, 2, size, image_length].

    The antialiased bilinear filter of PIL and torch: a triangle as wide as the scale, at least one pixel to each
    side, and cut off at the box, as if the box had been cropped first. Both axes at once halve the launches.
    """
    start, length = boxes.float()[:, :, None, None].split(2, dim=1)
    scale = length / size
    pixel = torch.arange(0.5, image_length, device=boxes.device) - start  # Centers, relative to the box
    center = torch.arange(0.5, size, device=boxes.device)[:, None] * scale
    weights = 1 - (pixel - center).abs() / scale.clamp(min=1)
    weights = weights.clamp_(min=0).masked_fill_((pixel < 0) | (pixel >= length), 0)
    return weights / weights.sum(3, keepdim=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Color, blur, flip and normalization of crops with the values of their plan; can be sent to worker processes.

    `mean`, `std`: of the normalization, in units of the [0, 1] range. `dtype`, `device`: of the views.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype

    def __call__(self, plan: BatchPlan, crops: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Augment uint8 crops [B, size, size, 3] on `device` to views [B, 3, size, size], channels_last."""
        return tuple(
            augment(crop, parameters, out_dtype=self.dtype)
            for crop, parameters in zip(crops, self._parameters(plan.views), strict=True)
        )

    def _parameters(self, views: Sequence[ViewPlan]) -> Iterator[AugmentParameters]:
        """Parameters of each view, moved to the device in one copy."""
        copied = iter(to_device([getattr(view, name) for view in views for name in _PER_IMAGE], self.device))
        for view in views:
            values: dict[str, Any] = dict(zip(_PER_IMAGE, copied, strict=False))
            if not view.blur_sigma.any():
                values["blur_sigma"] = None  # Saves a kernel launch
            yield AugmentParameters(**values, mean=self.mean, std=self.std)
