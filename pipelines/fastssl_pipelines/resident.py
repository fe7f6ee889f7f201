"""The resident executor: every image is decoded once, kept on the device, and cut and resized there."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.executor import Executor
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sources import Source

_DECODE_CHUNK = 64  # a future for every small image would cost more than decoding it
_THREADED_DECODE_PIXELS = 128 * 128  # for 32 px images the interpreter lock makes four threads half as fast as one
# float32 pixels in flight: on a GPU 256 MiB, so that large images do not fill it; on a CPU what its cache holds
_WORKING_SET_VALUES = {"cuda": 2**26, "cpu": 2**17}
_SHARE_OF_FREE_MEMORY = 0.5  # for the images; the rest is the encoder's


class ResidentExecutor(Executor):
    """For data sets that fit decoded on the device, or else in host memory: n * max height * max width * 3 bytes.

    `notes` says which. From host memory the images of each batch are copied to the device, where all else is done.
    """

    name = "resident"

    def __init__(self, source: Source, **options: Any) -> None:
        super().__init__(source, **options)
        self._images = self._decoded()

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        ids = torch.from_numpy(plan.ids).to(self._images.device)
        boxes = [torch.from_numpy(view.boxes).to(self.device) for view in plan.views]
        at_once = max(1, _WORKING_SET_VALUES[self.device.type] // self._images[0].numel())

        def work(start: int, stop: int) -> tuple[Tensor, ...]:
            views: list[list[Tensor]] = [[] for _ in plan.views]
            for first in range(start, stop, at_once):
                part = slice(first, min(first + at_once, stop))
                images = self._on_device(ids[part])
                for crops, box, view in zip(views, boxes, plan.views, strict=True):
                    crops.append(_resized_boxes(images, box[part], view.size))
            return tuple(torch.cat(crops) for crops in views)

        return self._by_rows(work, len(plan.ids))

    def _decoded(self) -> Tensor:
        source, count = self.source, len(self.source)
        height, width = int(np.max(source.heights)), int(np.max(source.widths))
        place = _place(count * height * width * 3, self.device)
        if self.device.type == "cuda":
            self.notes.append(f"the images are kept decoded in {'GPU' if place == 'cuda' else 'host'} memory")
        # [n, H, 3, W] needs no transposition between the two matrix products of a resize
        images = torch.zeros(count, height, 3, width, dtype=torch.uint8)

        def decode(start: int) -> dict[int, str]:
            reasons = {}
            for index in range(start, min(start + _DECODE_CHUNK, count)):
                try:
                    pixels = torch.from_numpy(source.pixels(index))
                except DataError as error:
                    reasons[index] = str(error)
                else:
                    images[index, : pixels.shape[0], :, : pixels.shape[1]] = pixels.transpose(1, 2)
            return reasons

        threads = max(1, self.workers) if height * width >= _THREADED_DECODE_PIXELS else 1
        with ThreadPoolExecutor(threads) as pool:
            for reasons in pool.map(decode, range(0, count, _DECODE_CHUNK)):
                self._exclude(reasons)
        return images.to(self.device) if place == self.device.type else images

    def _on_device(self, ids: Tensor) -> Tensor:
        images = self._images[ids]
        if images.device != self.device:
            images = images.pin_memory().to(self.device, non_blocking=True)
        return images.float()


def _place(needed_bytes: int, device: torch.device) -> str:
    """ "cuda" or "cpu": where the images fit; DataError if nowhere."""
    free_bytes = {"cpu": _available_host_bytes()}
    if device.type == "cuda":
        free_bytes = {"cuda": torch.cuda.mem_get_info(device)[0], **free_bytes}
    for place, free in free_bytes.items():
        if needed_bytes <= _SHARE_OF_FREE_MEMORY * free:
            return place
    found = " and ".join(f"{free / 2**30:.1f} GiB free ({place})" for place, free in free_bytes.items())
    raise DataError(
        f"the images take {needed_bytes / 2**30:.1f} GiB when they are decoded and there is {found}, of which they may"
        f" take {_SHARE_OF_FREE_MEMORY:.0%}; take --data.pipeline dali or torchvision"
    )


def _available_host_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resized_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cuts `boxes` out of float32 [B, H, 3, W] and resizes them with antialiasing: uint8 [B, size, size, 3]."""
    count, image_height, channels, image_width = images.shape
    top, left, height, width = boxes.unbind(1)
    rows = _resize_weights(top, height, image_height, size)
    columns = _resize_weights(left, width, image_width, size)
    pixels = torch.bmm(rows, images.view(count, image_height, channels * image_width))
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
