"""Torchvision executor: PIL decodes and torchvision resizes, in worker processes; runs everywhere."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError, UnreadableImages
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.executors.transfer import to_device
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sampler import Sampler
from fastssl_pipelines.sources.base import Source


class TorchvisionExecutor(Executor):
    """Reference for the pixels of all executors; `workers` processes decode, 0 decodes in the stream's thread.

    If the training device is a CPU, the processes augment as well.
    """

    name = "torchvision"

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        return tuple(to_device(_crops(self.source, plan), self.device))

    def _batches(self, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        return self._batches_of_processes(partial(_crops, self.source), steps, first, last)


def _crops(source: Source, plan: BatchPlan) -> tuple[Tensor, ...]:
    views = tuple(torch.empty(len(plan.ids), view.size, view.size, 3, dtype=torch.uint8) for view in plan.views)
    reasons: dict[int, str] = {}
    for row, index in enumerate(plan.ids.tolist()):
        try:
            image = torch.from_numpy(source.pixels(index)).permute(2, 0, 1)
        except DataError as error:
            reasons[index] = str(error)
            continue
        for crops, view in zip(views, plan.views, strict=True):
            top, left, height, width = view.boxes[row].tolist()
            crop = resized_crop(image, top, left, height, width, [view.size, view.size], antialias=True)
            crops[row] = crop.permute(1, 2, 0)
    if reasons:
        raise UnreadableImages(reasons)
    return views
