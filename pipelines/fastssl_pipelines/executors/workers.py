"""Worker processes that make the views of plans."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, cycle
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl_pipelines.errors import DataError, InputError, UnreadableImages
from fastssl_pipelines.executors.pixels import Augmentation
from fastssl_pipelines.executors.turns import Turns
from fastssl_pipelines.plan import BatchPlan

_log = logging.getLogger(__name__)

_BATCHES_EACH = 2  # That a worker may be given ahead
_SHARED_MEMORY = "/dev/shm"
_SHARE_OF_ROOM = 0.5  # What other processes write at the same time has to have room as well

Views = tuple[Tensor, ...]
Crops = Callable[[BatchPlan], Views]
_Loaded = Views | dict[int, str] | Exception


def views_of(
    plans: Iterable[BatchPlan],
    crops: Crops,
    augmentation: Augmentation | None,
    *,
    workers: int,
    own_memory: bool,
    processes: list[BaseProcess],
    turns: Turns | None,
) -> Iterator[Views | dict[int, str]]:
    """For each plan what `crops` makes of it, augmented if asked for, or a sentence by number for unreadable images.

    `crops` and what it holds go to the `workers` processes once; with 0 of them all is done in this thread. Where the
    shared memory has no room for what they make there are fewer, which `say` is told. A plan is taken as soon as a
    worker can have it; none may have more rows than the first. Without `own_memory` the views may be gone when the next
    ones are asked for. `processes` holds the worker processes while they work, and `turns`, if any, says when they
    begin a batch. InputError where one dies or none can be started.
    """
    load = _Load(crops, augmentation)
    plans = iter(plans)
    first = next(plans, None)
    if first is None:
        return
    plans = chain([first], plans)
    # With new shared memory for each batch, as a DataLoader has it, streams were seen to be 5 to 25 % slower: its pages
    # have to be cleared. One more slot than batches are under way: the one that is being copied.
    slot_bytes = _views_bytes(first, augmentation)
    if lack := lack_of_shared_memory(_slots(workers) * slot_bytes):
        fewer = [count for count in range(1, workers) if not lack_of_shared_memory(_slots(count) * slot_bytes)]
        who = f"by {fewer[-1]} of {workers} workers" if fewer else "in this process, by one thread"
        _log.warning(f"{lack}, so images are decoded {who}; lower --data.workers")
        workers = fewer[-1] if fewer else 0
    if not workers:
        yield from map(raised, map(load, plans))
        return
    slots = [_empty_views(first, augmentation) for _ in range(_slots(workers))]
    yield from _views_of_processes(plans, load, slots, workers, own_memory, processes, turns)


def _slots(workers: int) -> int:
    return _BATCHES_EACH * workers + 1 if workers else 0


def lack_of_shared_memory(needed_bytes: int) -> str:
    """A sentence without its end where worker processes cannot share so much, else ""; many containers have 64 MB."""
    try:
        room = os.statvfs(_SHARED_MEMORY)
    except OSError:  # Not Linux
        return ""
    free_bytes = room.f_bavail * room.f_frsize
    if needed_bytes <= _SHARE_OF_ROOM * free_bytes:
        return ""
    return (
        f"{_SHARED_MEMORY} has {free_bytes / 1e6:.0f} MB free and the workers need {needed_bytes / 1e6:.0f} of at most "
        f"{_SHARE_OF_ROOM:.0%} of it (docker run --shm-size)"
    )


def raised(loaded: _Loaded) -> Views | dict[int, str]:
    """What was loaded; an error is raised."""
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def _views_of_processes(
    plans: Iterator[BatchPlan],
    load: _Load,
    slots: list[Views],
    workers: int,
    own_memory: bool,
    processes: list[BaseProcess],
    turns: Turns | None,
) -> Iterator[Views | dict[int, str]]:
    loader = DataLoader(
        _IntoSlots(load, slots, turns),
        batch_size=None,
        sampler=zip(plans, cycle(range(len(slots)))),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=_BATCHES_EACH,
        multiprocessing_context=context(),
    )
    before = set(multiprocessing.active_children())
    try:
        loading = iter(loader)
    except OSError as error:
        raise InputError(
            f"{workers} worker processes cannot be started ({error.strerror}); lower --data.workers or raise the "
            "limits of this machine"
        ) from error
    own = [process for process in multiprocessing.active_children() if process not in before]
    processes += own
    try:
        while (loaded := _next_of(loading, own)) is not None:
            if isinstance(loaded, (dict, Exception)):
                yield cast("dict[int, str]", raised(loaded))
            else:
                slot, rows = loaded
                yield tuple(view[:rows].clone() if own_memory else view[:rows] for view in slots[slot])
    finally:
        for process in own:
            processes.remove(process)


def _next_of(loading: Iterator[Any], processes: list[BaseProcess]) -> Any:
    """The next item, None at the end; InputError where a process died."""
    try:
        return next(loading, None)
    except RuntimeError as error:
        for process in processes:
            if process.exitcode:  # Of a process that runs it is None
                raise InputError(
                    f"a worker process of the input ended ({_told_exit(process.exitcode)}), perhaps as memory ran out; "
                    "lower --data.workers or --data.prefetch, or give the run more memory, and `fastssl resume` it"
                ) from error
        raise


def _told_exit(code: int) -> str:
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


class _Load:
    """From a plan to crops or views, sentences about unreadable images, or an error for the user.

    Such an error would come out of a worker wrapped in a traceback.
    """

    def __init__(self, crops: Crops, augmentation: Augmentation | None) -> None:
        self._crops, self._augmentation = crops, augmentation

    def __call__(self, plan: BatchPlan) -> _Loaded:
        try:
            crops = self._crops(plan)
        except UnreadableImages as error:
            return error.reasons
        except (DataError, InputError) as error:
            return error.with_traceback(None)
        return self._augmentation(plan, crops) if self._augmentation else crops


class _IntoSlots(Dataset):
    """Indexed by a plan and the number of a slot; an item is that number and how many rows of the slot are filled."""

    def __init__(self, load: _Load, slots: list[Views], turns: Turns | None) -> None:
        self._load, self._slots, self._turns = load, slots, turns

    def __getitem__(self, place: tuple[BatchPlan, int]) -> tuple[int, int] | dict[int, str] | Exception:
        plan, slot = place
        if self._turns:
            self._turns.wait()
        loaded = self._load(plan)
        if not isinstance(loaded, tuple):
            return loaded
        for target, view in zip(self._slots[slot], loaded, strict=True):
            target[: len(view)].copy_(view)
        return slot, len(plan.ids)


def _empty_views(plan: BatchPlan, augmentation: Augmentation | None) -> Views:
    """Shared memory for what `_Load` makes of a plan."""
    dtype = _dtype(augmentation)
    views = (torch.empty(len(plan.ids), view.size, view.size, 3, dtype=dtype).share_memory_() for view in plan.views)
    return tuple(view.permute(0, 3, 1, 2) if augmentation else view for view in views)


def _views_bytes(plan: BatchPlan, augmentation: Augmentation | None) -> int:
    return len(plan.ids) * sum(3 * view.size**2 for view in plan.views) * _dtype(augmentation).itemsize


def _dtype(augmentation: Augmentation | None) -> torch.dtype:
    return augmentation.dtype if augmentation else torch.uint8


def context() -> multiprocessing.context.BaseContext:
    """How worker processes are started."""
    # Fork would copy the locks of running threads (the stream's, OpenMP's, CUDA's); spawn would import torch
    # in every worker; the fork server imports it once, in a process without threads.
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__, "fastssl_pipelines.executors.torchvision"])
    return forkserver
