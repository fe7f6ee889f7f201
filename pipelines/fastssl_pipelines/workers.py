"""Worker processes that make the views of plans."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl_pipelines.augmentation import Augmentation
from fastssl_pipelines.errors import UnreadableImages
from fastssl_pipelines.plan import BatchPlan

Views = tuple[Tensor, ...]
Crops = Callable[[BatchPlan], Views]


def views_of(
    plans: Iterable[BatchPlan],
    crops: Crops,
    augmentation: Augmentation | None,
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Views | dict[int, str]]:
    """For each plan what `crops` makes of it, augmented if asked for, or a sentence by number for unreadable images.

    `crops` and what it holds go to the `workers` processes once; with 0 of them all is done in this thread. A plan
    is taken as soon as a worker can have it.
    """
    loader = DataLoader(
        _OfPlans(crops, augmentation),
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=_context() if workers else None,
    )
    for loaded in loader:
        yield loaded if isinstance(loaded, dict) else tuple(loaded)


class _OfPlans(Dataset):
    """Indexed by a BatchPlan, so that one item is a whole batch."""

    def __init__(self, crops: Crops, augmentation: Augmentation | None) -> None:
        self._crops, self._augmentation = crops, augmentation

    def __getitem__(self, plan: BatchPlan) -> Views | dict[int, str]:
        # an error raised in a worker reaches the user wrapped in a traceback instead of as one sentence
        try:
            crops = self._crops(plan)
        except UnreadableImages as error:
            return error.reasons
        return self._augmentation(plan, crops) if self._augmentation else crops


def _context() -> multiprocessing.context.BaseContext:
    # fork would copy the locks of running threads (the stream's, OpenMP's, CUDA's); spawn would import torch
    # in every worker; the fork server imports it once, in a process without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fastssl_pipelines.torchvision"])
    return context
