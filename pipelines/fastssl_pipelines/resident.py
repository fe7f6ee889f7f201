"""The resident executor: every image is decoded once, kept on the device, and cut and resized there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.executor import Executor
from fastssl_pipelines.plan import BatchPlan, ViewPlan
from fastssl_pipelines.sources import Source

_DECODE_CHUNK = 64  # a future for every small image would cost more than decoding it
_THREADED_DECODE_PIXELS = 128 * 128  # for 32 px images the interpreter lock makes four threads half as fast as one
_WORKING_SET_VALUES = 2**26  # float32 pixels in flight, 256 MiB, so that large images do not fill the device


class ResidentExecutor(Executor):
    """For data sets that fit on the device: n * max height * max width * 3 bytes."""

    name = "resident"

    def __init__(self, source: Source, **options: Any) -> None:
        super().__init__(source, **options)
        # [n, H, 3, W] needs no transposition between the two matrix products of a resize.
        images = torch.zeros(len(source), int(np.max(source.heights)), 3, int(np.max(source.widths)), dtype=torch.uint8)

        def decode(start: int) -> None:
            for index in range(start, min(start + _DECODE_CHUNK, len(source))):
                pixels = torch.from_numpy(source.pixels(index))
                images[index, : pixels.shape[0], :, : pixels.shape[1]] = pixels.transpose(1, 2)

        _, height, _, width = images.shape
        threads = max(1, self.workers) if height * width >= _THREADED_DECODE_PIXELS else 1
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, range(0, len(source), _DECODE_CHUNK)))
        self._images = images.to(self.device)

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        ids = torch.from_numpy(plan.ids).to(self.device)
        return tuple(self._view(ids, view) for view in plan.views)

    def _view(self, ids: Tensor, view: ViewPlan) -> Tensor:
        boxes = torch.from_numpy(view.boxes).to(self.device)
        images_at_once = max(1, _WORKING_SET_VALUES // self._images[0].numel())
        parts = zip(ids.split(images_at_once), boxes.split(images_at_once), strict=True)
        return torch.cat([_resized_boxes(self._images[part], box, view.size) for part, box in parts])


def _resized_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cuts `boxes` out of uint8 [B, H, 3, W] and resizes them with antialiasing: uint8 [B, size, size, 3]."""
    count, image_height, channels, image_width = images.shape
    top, left, height, width = boxes.unbind(1)
    rows = _resize_weights(top, height, image_height, size)
    columns = _resize_weights(left, width, image_width, size)
    pixels = torch.bmm(rows, images.float().view(count, image_height, channels * image_width))
    pixels = torch.bmm(pixels.view(count, size * channels, image_width), columns.transpose(1, 2))
    # The conversion truncates; weights sum to 1, so nothing leaves the range.
    pixels = pixels.add_(0.5).to(torch.uint8).view(count, size, channels, size)
    return pixels.transpose(2, 3).contiguous()


def _resize_weights(start: Tensor, length: Tensor, image_length: int, size: int) -> Tensor:
    """Weight of every source pixel in every output pixel along one side, [B, size, image_length].

    The antialiased bilinear filter of PIL and torch: a triangle as wide as the scale, at least one pixel to
    each side, and cut off at the box, as if the box had been cropped first.
    """
    start, length = start[:, None, None].float(), length[:, None, None].float()
    scale = length / size
    pixel = torch.arange(image_length, device=start.device) - start
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    weights = 1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)
    weights = weights.clamp_(min=0).masked_fill_((pixel < 0) | (pixel >= length), 0)
    return weights / weights.sum(2, keepdim=True)
