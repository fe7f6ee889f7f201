"""Worker processes that make the views of plans."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, cycle

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl_pipelines.augmentation import Augmentation
from fastssl_pipelines.errors import UnreadableImages
from fastssl_pipelines.plan import BatchPlan

_BATCHES_EACH = 2  # that a worker may be given ahead

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
    is taken as soon as a worker can have it; none may have more rows than the first. The views come in memory of
    their own, pinned if asked for.
    """
    load = _Load(crops, augmentation)
    if not workers:
        yield from map(load, plans)
        return
    plans = iter(plans)
    first = next(plans, None)
    if first is None:
        return
    # With new shared memory for each batch, as a DataLoader has it, streams were seen to be 5 to 25 % slower: its pages
    # have to be cleared. One more slot than batches are under way: the one that is being copied.
    slots = [_empty_views(first, augmentation) for _ in range(_BATCHES_EACH * workers + 1)]
    loader = DataLoader(
        _IntoSlots(load, slots),
        batch_size=None,
        sampler=zip(chain([first], plans), cycle(range(len(slots)))),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=_BATCHES_EACH,
        multiprocessing_context=_context(),
    )
    for loaded in loader:
        if isinstance(loaded, dict):
            yield loaded
        else:
            slot, rows = loaded
            yield tuple(view[:rows].pin_memory() if pin_memory else view[:rows].clone() for view in slots[slot])


class _Load:
    """From a plan to crops or views."""

    def __init__(self, crops: Crops, augmentation: Augmentation | None) -> None:
        self._crops, self._augmentation = crops, augmentation

    def __call__(self, plan: BatchPlan) -> Views | dict[int, str]:
        # an error raised in a worker reaches the user wrapped in a traceback instead of as one sentence
        try:
            crops = self._crops(plan)
        except UnreadableImages as error:
            return error.reasons
        return self._augmentation(plan, crops) if self._augmentation else crops


class _IntoSlots(Dataset):
    """Indexed by a plan and the number of a slot; an item is that number and how many rows of the slot are filled."""

    def __init__(self, load: _Load, slots: list[Views]) -> None:
        self._load, self._slots = load, slots

    def __getitem__(self, place: tuple[BatchPlan, int]) -> tuple[int, int] | dict[int, str]:
        plan, slot = place
        loaded = self._load(plan)
        if isinstance(loaded, dict):
            return loaded
        for target, view in zip(self._slots[slot], loaded, strict=True):
            target[: len(view)].copy_(view)
        return slot, len(plan.ids)


def _empty_views(plan: BatchPlan, augmentation: Augmentation | None) -> Views:
    """Shared memory for what `_Load` makes of a plan."""
    dtype = augmentation.dtype if augmentation else torch.uint8
    views = (torch.empty(len(plan.ids), view.size, view.size, 3, dtype=dtype).share_memory_() for view in plan.views)
    return tuple(view.permute(0, 3, 1, 2) if augmentation else view for view in views)


def _context() -> multiprocessing.context.BaseContext:
    # fork would copy the locks of running threads (the stream's, OpenMP's, CUDA's); spawn would import torch
    # in every worker; the fork server imports it once, in a process without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fastssl_pipelines.torchvision"])
    return context
