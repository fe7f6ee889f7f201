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

_BATCHES_EACH = 2  # Batches queued per worker
_SHARED_MEMORY = "/dev/shm"
_SHARE_OF_ROOM = 0.5  # Leaves room for what other processes write at the same time

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
    """Yield the crops of each plan, or its views with `augmentation`, or a dict of sentences by unreadable image.

    `crops` is sent once to each of the `workers` processes; with 0 workers, this thread does the work. If the shared
    memory is too small, fewer are started and a warning is logged. A plan is taken as soon as a worker is free; none
    may have more rows than the first. Without `own_memory`, views are valid only until the next ones are requested.
    `processes` lists the worker processes while they run; `turns`, if given, says when they may start a batch.
    InputError if a worker dies or cannot be started.
    """
    load = _Load(crops, augmentation)
    plans = iter(plans)
    first = next(plans, None)
    if first is None:
        return
    plans = chain([first], plans)
    # New shared memory for each batch, as in a DataLoader, measured 5 to 25 % slower, since its pages have to be
    # cleared. There is one slot more than batches in progress: the one being copied.
    slot_bytes = _views_bytes(first, augmentation)
    if lack := lack_of_shared_memory(_slots(workers) * slot_bytes):
        fewer = [count for count in range(1, workers) if not lack_of_shared_memory(_slots(count) * slot_bytes)]
        who = f"by {fewer[-1]} of {workers} workers" if fewer else "in this process, by one thread"
        _log.warning(f"{lack}, so images are decoded {who}; lower --data.workers")
        workers = fewer[-1] if fewer else 0
    if not workers:
        yield from map(_unwrap, map(load, plans))
        return
    slots = [_empty_views(first, augmentation) for _ in range(_slots(workers))]
    yield from _views_of_processes(plans, load, slots, workers, own_memory, processes, turns)


def _slots(workers: int) -> int:
    return _BATCHES_EACH * workers + 1 if workers else 0


def lack_of_shared_memory(needed_bytes: int) -> str:
    """Start of a sentence if worker processes cannot share that much, else ""; many containers have 64 MB."""
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


def _unwrap(loaded: _Loaded) -> Views | dict[int, str]:
    """Raise what was loaded if it is an error, else return it."""
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
                yield cast("dict[int, str]", _unwrap(loaded))
            else:
                slot, rows = loaded
                yield tuple(view[:rows].clone() if own_memory else view[:rows] for view in slots[slot])
    finally:
        for process in own:
            processes.remove(process)


def _next_of(loading: Iterator[Any], processes: list[BaseProcess]) -> Any:
    """Next item, None at the end; InputError if a process died."""
    try:
        return next(loading, None)
    except RuntimeError as error:
        for process in processes:
            if process.exitcode:  # None while it runs
                raise InputError(
                    f"a worker process of the input ended ({_exit_text(process.exitcode)}), perhaps as memory ran out; "
                    "lower --data.workers or --data.prefetch, or give the run more memory, and `fastssl resume` it"
                ) from error
        raise


def _exit_text(code: int) -> str:
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


class _Load:
    """Turns a plan into crops or views, sentences about unreadable images, or an error for the user.

    The error is returned, since one raised in a worker would arrive wrapped in a traceback.
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
    """Data set indexed by (plan, slot index); an item is the slot index and its number of filled rows."""

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
    """Shared memory for the result of `_Load` for a plan."""
    dtype = _dtype(augmentation)
    views = (torch.empty(len(plan.ids), view.size, view.size, 3, dtype=dtype).share_memory_() for view in plan.views)
    return tuple(view.permute(0, 3, 1, 2) if augmentation else view for view in views)


def _views_bytes(plan: BatchPlan, augmentation: Augmentation | None) -> int:
    return len(plan.ids) * sum(3 * view.size**2 for view in plan.views) * _dtype(augmentation).itemsize


def _dtype(augmentation: Augmentation | None) -> torch.dtype:
    return augmentation.dtype if augmentation else torch.uint8


def context() -> multiprocessing.context.BaseContext:
    """Multiprocessing context that starts the worker processes."""
    # "fork" would copy the locks of running threads (the stream's, OpenMP's, CUDA's) and "spawn" would import torch in
    # every worker; the fork server imports it once, in a process without threads.
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__, "fastssl_pipelines.executors.torchvision"])
    return forkserver
