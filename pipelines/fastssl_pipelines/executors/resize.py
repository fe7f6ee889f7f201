"""Cutting boxes out of decoded images and resizing them as torchvision does: one by one on a CPU, or in a batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def resized_boxes(images: Iterable[Tensor], boxes: NDArray[np.int32], size: int) -> Tensor:
    """One box of each image, resized: uint8 [B, size, size, 3], to the bit what torchvision's resized_crop gives.

    `images`: uint8 [1, 3, H, W] on a CPU, channels_last. `boxes`: int32 [B, 4], (top, left, height, width) in pixels.
    Bilinear with antialiasing.
    """
    # interpolate() ends here, and for a view of 32 pixels takes as long as the work itself
    resize = torch.ops.aten._upsample_bilinear2d_aa.default
    crops = [
        resize(image[:, :, top : top + height, left : left + width], [size, size], False)
        for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
    ]
    return torch.cat(crops).permute(0, 2, 3, 1).contiguous()


def resized_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """One box of each image, resized: uint8 [B, size, size, 3], as `resized_boxes` within one gray level.

    `images`: float32 [B, H, 3, W], gray levels. `boxes`: int32 [B, 4] on the same device. Two matrix products.
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
    """Weight of every source pixel in every output pixel along both sides, [B, 2, size, image_length].

    The antialiased bilinear filter of PIL and torch: a triangle as wide as the scale, at least one pixel to
    each side, and cut off at the box, as if the box had been cropped first. Both sides at once are half the launches.
    """
    start, length = boxes.float()[:, :, None, None].split(2, dim=1)
    scale = length / size
    pixel = torch.arange(0.5, image_length, device=boxes.device) - start  # centers, as seen from the box
    center = torch.arange(0.5, size, device=boxes.device)[:, None] * scale
    weights = 1 - (pixel - center).abs() / scale.clamp(min=1)
    weights = weights.clamp_(min=0).masked_fill_((pixel < 0) | (pixel >= length), 0)
    return weights / weights.sum(3, keepdim=True)
