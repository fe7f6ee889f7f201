"""The torchvision executor: PIL decodes and torchvision resizes, in worker processes; it runs everywhere."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from itertools import tee

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import resized_crop

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError
from fastssl_pipelines.executor import Executor, Steps
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sources import Source


class TorchvisionExecutor(Executor):
    """The reference of the pixels; `workers` processes decode, and 0 decodes in the thread of the stream."""

    name = "torchvision"

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        return _crops(self.source, plan)

    def _batches(self, steps: Steps, first: int, last: int) -> Generator[Batch]:
        ahead, plans = tee(steps[step] for step in range(first, last))
        loader = DataLoader(
            _CropsOfPlan(self.source),
            batch_size=None,
            sampler=ahead,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=_worker_context() if self.workers else None,
        )
        for step, plan, crops in zip(range(first, last), plans, loader, strict=False):
            if isinstance(crops, DataError):
                raise crops
            yield self._augmented(plan, tuple(crops), step)


class _CropsOfPlan(Dataset):
    """Indexed by a BatchPlan, so that one item is the crops of a whole batch."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, ...] | DataError:
        # Raised in a worker it would reach the user wrapped in a traceback instead of as one sentence.
        try:
            return _crops(self._source, plan)
        except DataError as error:
            return error


def _crops(source: Source, plan: BatchPlan) -> tuple[Tensor, ...]:
    views = tuple(torch.empty(len(plan.ids), view.size, view.size, 3, dtype=torch.uint8) for view in plan.views)
    for row, index in enumerate(plan.ids.tolist()):
        image = torch.from_numpy(source.pixels(index)).permute(2, 0, 1)
        for crops, view in zip(views, plan.views, strict=True):
            top, left, height, width = view.boxes[row].tolist()
            crop = resized_crop(image, top, left, height, width, [view.size, view.size], antialias=True)
            crops[row] = crop.permute(1, 2, 0)
    return views


def _worker_context() -> multiprocessing.context.BaseContext:
    # fork would copy the locks of running threads (the stream's, OpenMP's, CUDA's); spawn would import torch
    # in every worker; the fork server imports it once, in a process without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
