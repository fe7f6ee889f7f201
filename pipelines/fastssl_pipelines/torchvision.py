"""The torchvision executor: PIL decodes and torchvision resizes, in worker processes; it runs everywhere."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from itertools import tee

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import resized_crop

from fastssl_pipelines.augmentation import Augmentation
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError, UnreadableImages
from fastssl_pipelines.executor import Executor
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sources import Source
from fastssl_pipelines.steps import Steps


class TorchvisionExecutor(Executor):
    """The reference of the pixels; `workers` processes decode, and 0 decodes in the thread of the stream.

    Where the training device is a CPU, the processes augment as well.
    """

    name = "torchvision"

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        return _crops(self.source, plan)

    def _batches(self, steps: Steps, first: int, last: int) -> Generator[Batch]:
        ahead, plans = tee(self._plan(steps, step) for step in range(first, last))
        on_cpu = self.device.type == "cpu"
        loader = DataLoader(
            _Loaded(self.source, self.augmentation if on_cpu else None),
            batch_size=None,
            sampler=ahead,
            num_workers=self.workers,
            pin_memory=not on_cpu,
            multiprocessing_context=_worker_context() if self.workers else None,
        )
        for step, plan, loaded in zip(range(first, last), plans, loader, strict=False):
            if isinstance(loaded, dict):
                self._exclude(loaded)
                yield self._readable_batch(steps, step)
            else:
                views = tuple(loaded)
                yield self._with_views(plan, views if on_cpu else self.augmentation(plan, views), step)


class _Loaded(Dataset):
    """Indexed by a BatchPlan, so that one item is the views or crops of a whole batch, or why images are unreadable."""

    def __init__(self, source: Source, augmentation: Augmentation | None) -> None:
        self._source, self._augmentation = source, augmentation

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, ...] | dict[int, str]:
        # an error raised in a worker reaches the user wrapped in a traceback instead of as one sentence
        try:
            crops = _crops(self._source, plan)
        except UnreadableImages as error:
            return error.reasons
        return self._augmentation(plan, crops) if self._augmentation else crops


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


def _worker_context() -> multiprocessing.context.BaseContext:
    # fork would copy the locks of running threads (the stream's, OpenMP's, CUDA's); spawn would import torch
    # in every worker; the fork server imports it once, in a process without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
