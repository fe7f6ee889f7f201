"""Resident executor: decodes every image once, keeps it on the device, and crops and resizes it there."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError
from fastssl_pipelines.executors.base import THREADS_NAME, Executor
from fastssl_pipelines.executors.pixels import resized_batch, resized_boxes
from fastssl_pipelines.executors.threads import DaemonThreads
from fastssl_pipelines.executors.transfer import to_device
from fastssl_pipelines.executors.workers import Crops, lack_of_shared_memory
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sampler import Sampler
from fastssl_pipelines.sources.base import Source

_log = logging.getLogger(__name__)

_DECODE_CHUNK = 64  # A future for every small image would cost more than decoding it
_THREADED_DECODE_PIXELS = 128 * 128  # For 32 px images the interpreter lock makes four threads half as fast as one
_WORKING_SET_VALUES = 2**26  # float32 pixels in flight, 256 MiB, so that large images do not fill the GPU
_WORTH_PROCESSES = 100  # Batches; fewer are done before the processes have started
_SHARE_OF_FREE_MEMORY = 0.5  # For the images; the rest is the encoder's


class ResidentExecutor(Executor):
    """Executor for data sets that fit in GPU or host memory when decoded: n * max height * max width * 3 bytes.

    It logs which. From host memory, the images of each batch are copied to the GPU, which does everything else; its
    pixels are within one gray level of torchvision's. On a CPU, `workers` processes crop, resize and augment if there
    are enough batches; the pixels are bit-identical to torchvision's.
    """

    name = "resident"

    def __init__(self, source: Source, **options: Any) -> None:
        super().__init__(source, **options)
        self._images = self._decoded()
        self._crops: Crops = (
            partial(_crops_one_by_one, self._images)
            if self.device.type == "cpu"
            else partial(_crops_in_batches, self._images, self.device)
        )

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        return self._crops(plan)

    def _batches(self, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        worth_it = self.device.type == "cpu" and self.workers > 1 and last - first >= _WORTH_PROCESSES
        if worth_it:
            lack = "" if self._images.is_shared() else lack_of_shared_memory(self._images.numel())
            if not lack:
                return self._batches_of_processes(self._crops, steps, first, last)
            _log.warning(f"{lack}, so batches are made in this process")
        return super()._batches(steps, first, last)

    def _decoded(self) -> Tensor:
        source, count = self.source, len(self.source)
        height, width = int(np.max(source.heights)), int(np.max(source.widths))
        place = _place(count * height * width * 3, self.device)
        if self.device.type == "cuda":
            _log.info(f"the images are kept decoded in {'GPU' if place == 'cuda' else 'host'} memory")
        if self.device.type == "cpu":
            images = interleaved = torch.zeros(count, height, width, 3, dtype=torch.uint8)
        else:
            # This layout needs no transposition between the two matrix products of a resize
            images = torch.zeros(count, height, 3, width, dtype=torch.uint8)
            interleaved = images.transpose(2, 3)

        def decode(start: int) -> dict[int, str]:
            reasons = {}
            for index in range(start, min(start + _DECODE_CHUNK, count)):
                try:
                    pixels = torch.from_numpy(source.pixels(index))
                except DataError as error:
                    reasons[index] = str(error)
                else:
                    interleaved[index, : pixels.shape[0], : pixels.shape[1]] = pixels
            return reasons

        threads = max(1, self.workers) if height * width >= _THREADED_DECODE_PIXELS else 1
        pool = DaemonThreads(threads, f"{THREADS_NAME}decode")
        starts = range(0, count, _DECODE_CHUNK)
        try:
            for start, decoded in zip(starts, [pool.submit(decode, start) for start in starts], strict=True):
                reasons = self._in_time(decoded, f"{source.describe(start)}, to be kept decoded,")
                self._exclude(reasons)
        finally:
            pool.shutdown(wait=not self._stuck, cancel_futures=True)
        return images.to(self.device) if place == self.device.type else images


def _crops_one_by_one(images: Tensor, plan: BatchPlan) -> tuple[Tensor, ...]:
    """Crop `images`, uint8 [n, H, W, 3], on a CPU."""
    planes = images.permute(0, 3, 1, 2)
    chosen = [planes[index : index + 1] for index in plan.ids.tolist()]
    return tuple(resized_boxes(chosen, view.boxes, view.size) for view in plan.views)


def _crops_in_batches(images: Tensor, device: torch.device, plan: BatchPlan) -> tuple[Tensor, ...]:
    """Crop `images`, uint8 [n, H, 3, W], on `device`."""
    ids, *boxes = to_device([plan.ids, *(view.boxes for view in plan.views)], device)
    host_ids = torch.from_numpy(plan.ids)
    at_once = max(1, _WORKING_SET_VALUES // images[0].numel())
    views: list[list[Tensor]] = [[] for _ in plan.views]
    for start in range(0, len(ids), at_once):
        part = slice(start, start + at_once)
        if images.device == device:
            chosen = images[ids[part]]
        else:
            (chosen,) = to_device([images[host_ids[part]]], device)
        chosen = chosen.float()
        for crops, box, view in zip(views, boxes, plan.views, strict=True):
            crops.append(resized_batch(chosen, box[part], view.size))
    return tuple(torch.cat(crops) if len(crops) > 1 else crops[0] for crops in views)


def _place(needed_bytes: int, device: torch.device) -> str:
    """Choose where the images fit, "cuda" or "cpu"; DataError if nowhere."""
    free_bytes = {"cpu": _available_host_bytes()}
    if device.type == "cuda":
        free_bytes = {"cuda": torch.cuda.mem_get_info(device)[0], **free_bytes}
    for place, free in free_bytes.items():
        if needed_bytes <= _SHARE_OF_FREE_MEMORY * free:
            return place
    found = " and ".join(f"{free / 2**30:.1f} GiB free ({place})" for place, free in free_bytes.items())
    raise DataError(
        f"the decoded images take {needed_bytes / 2**30:.1f} GiB and there is {found}, of which they may"
        f" take {_SHARE_OF_FREE_MEMORY:.0%}; take --data.pipeline dali or torchvision"
    )


def _available_host_bytes() -> int:
    """Memory that is available without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # Not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
