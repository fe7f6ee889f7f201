"""Executors turn plans into batches; all apply the same random values, so they differ only in speed."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing
from importlib import import_module
from itertools import tee
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError, InputError, UnreadableImages, install_command
from fastssl_pipelines.executors.pixels import Augmentation
from fastssl_pipelines.executors.threads import DaemonThreads
from fastssl_pipelines.executors.transfer import InputStream, handed_over, to_device
from fastssl_pipelines.executors.turns import Turns
from fastssl_pipelines.executors.workers import Crops, context, views_of
from fastssl_pipelines.names import printable
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sampler import Sampler
from fastssl_pipelines.sources.base import Source
from fastssl_pipelines.sources.listing import being_read

UNREADABLE_AT_MOST = 0.01  # Fraction of the images of a source

TIMEOUT_S = 600.0
THREADS_NAME = "fastssl-"  # Prefix of the names of all input threads

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_REQUIREMENTS = {
    "dali": ("nvidia.dali", f"it is not installed: {install_command('dali')}"),
    "torchvision": ("torchvision", "it is not installed: pip install torchvision"),
    "resident": ("torch", "it is not installed: pip install torch"),
}


class Executor(ABC):
    """Decodes, crops, resizes and augments the images of a plan; yields batches on `device`.

    `mean`, `std`: of the normalization, in units of the [0, 1] range. `dtype`: of the views.
    `workers`: decoding threads or processes. `prefetch`: batches that `stream` prepares ahead. `timeout_s`: longest
    wait for a batch before InputError ends a stream.
    `unreadable`: maps the index of each image that could not be decoded so far to a sentence. The executor logs what
    it chooses and which images it replaces.
    """

    name: ClassVar[str]

    def __init__(
        self,
        source: Source,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        workers: int = 4,
        prefetch: int = 2,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"{workers} workers and a prefetch of {prefetch} were given; --data.workers must be at"
                " least 0 and --data.prefetch at least 1"
            )
        self.source = source
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # The current GPU differs between threads, so the stream's thread needs the index.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.augmentation = Augmentation(mean=mean, std=std, device=self.device, dtype=dtype)
        self.workers = workers
        self.prefetch = prefetch
        self.timeout_s = timeout_s
        self._input_stream = InputStream(self.device)
        self._processes: list[BaseProcess] = []  # Now working for streams
        self._turns: Turns | None = None  # Of the processes, once there are any that augment on a CPU
        self._stuck = False
        self._lock = threading.Lock()  # Guards what the threads of all streams change
        self.unreadable: dict[int, str] = {}
        self._is_unreadable = np.zeros(len(source), np.bool_)
        self._exclude(source.defects)

    @abstractmethod
    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """Resized boxes of every view: uint8 [B, size, size, 3] on `device`; UnreadableImages for broken files."""

    def batch(self, plan: BatchPlan, step: int) -> Batch:
        """Finished batch of one plan; UnreadableImages for broken files."""
        return self._finished(plan, self.crops(plan), step)

    def stream(self, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        """Yield the batches of steps first, ..., last - 1, prepared ahead by a background thread.

        An image that cannot be read is excluded: a warning is logged and the next image in plan order takes its place.
        DataError ends the stream once more than 1 % of the images are excluded. An error of the input path is raised
        when the consumer asks for the batch that it concerns. InputError if the consumer waits longer than `timeout_s`
        for a batch, or if a worker process dies; after that, no other stream works either.

        On a GPU, batches are made on a separate CUDA stream, and the consumer's current CUDA stream waits for them,
        not the consumer's thread (see fastssl_pipelines.executors.transfer).
        """
        with closing(self._prepared(steps, first, last)) as batches:
            yield from handed_over(batches)

    def _prepared(self, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        """Batches of `stream`, before they are handed to the consumer's CUDA stream."""
        batches = self._batches(steps, first, last)
        thread = DaemonThreads(1, f"{THREADS_NAME}input", self._enter_thread)
        pending: deque[Future[Batch]] = deque()
        try:
            for step in range(first, last):
                pending.append(thread.submit(self._next, batches))
                if len(pending) > self.prefetch:
                    yield self._in_time(pending.popleft(), f"the batch of step {step - self.prefetch}")
            while pending:
                yield self._in_time(pending.popleft(), f"the batch of step {last - len(pending) - 1}")
        finally:
            if self._turns:
                self._turns.end()
            thread.shutdown(wait=not self._stuck, cancel_futures=True)
            if not self._stuck:
                batches.close()

    def _next(self, batches: Generator[Batch]) -> Batch:
        return self._input_stream.finish(next(batches))

    def _in_time(self, future: Future[_T], what: str) -> _T:
        """Return the result; if it takes longer than `timeout_s`, abandon the work and raise InputError.

        The previous batch was finished before this call, so slow input has that time for every batch.
        """
        if self._turns and not future.done():
            self._turns.give()
        if not wait([future], self.timeout_s).done:
            self._stuck = True
            for process in self._processes:
                process.kill()  # A stopped process would survive terminate()
            files = being_read()
            reading = f", and {files[0]} is being read" if files else ""
            workers = " or a worker process" if self._processes else ""
            raise InputError(
                f"{what} was not ready within {self.timeout_s:g} s{reading}: a disk{workers} does not respond or is"
                " very slow; fix it, copy the images to a local disk or raise --train.timeout-s, then `fastssl resume`"
                " the run"
            )
        return future.result()

    def _batches(self, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        for step in range(first, last):
            yield self._readable_batch(steps, step)

    def _readable_batch(self, steps: Sampler, step: int) -> Batch:
        return self._finished(*self._readable_crops(steps, step), step)

    def _readable_crops(self, steps: Sampler, step: int) -> tuple[BatchPlan, tuple[Tensor, ...]]:
        while True:
            plan = self._plan(steps, step)
            try:
                return plan, self.crops(plan)
            except UnreadableImages as error:
                self._exclude(error.reasons)

    def _plan(self, steps: Sampler, step: int) -> BatchPlan:
        return steps.at(step, self._is_unreadable if self.unreadable else None)

    def _exclude(self, reasons: Mapping[int, str]) -> None:
        with self._lock:
            new = {index: reason for index, reason in reasons.items() if index not in self.unreadable}
            self.unreadable.update(new)
            self._is_unreadable[list(new)] = True
        count, total = len(self.unreadable), len(self.source)
        if count > UNREADABLE_AT_MOST * total:
            raise DataError(
                f"{count} of the {total} images of {self.source.name} cannot be read, which is more than"
                f" {UNREADABLE_AT_MOST:.0%}: {next(iter(self.unreadable.values()))}; `fastssl data check` finds all"
                " of them and --data.quarantine leaves them out"
            )
        for reason in new.values():
            _log.warning(printable(f"{reason}; the next image takes its place"))

    def _enter_thread(self) -> None:
        # A second team of OpenMP threads on the training cores made a step 20 times slower
        torch.set_num_threads(1)
        self._input_stream.enter()

    def _batches_of_processes(self, crops: Crops, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        """Batches of the crops that worker processes make with `crops`; for a CPU they augment as well."""
        on_cpu = self.device.type == "cpu"
        if on_cpu and self.workers and not self._turns:
            self._turns = Turns(context(), self.workers)
        ahead, plans = tee(self._plan(steps, step) for step in range(first, last))
        loading = views_of(
            ahead,
            crops,
            self.augmentation if on_cpu else None,
            workers=self.workers,
            own_memory=on_cpu,
            processes=self._processes,
            turns=self._turns,
        )
        for step, plan, loaded in zip(range(first, last), plans, loading, strict=False):
            if isinstance(loaded, dict):
                self._exclude(loaded)
                yield self._readable_batch(steps, step)
            elif on_cpu:
                yield self._with_views(plan, loaded, step)
            else:
                yield self._finished(plan, tuple(to_device(loaded, self.device)), step)

    def _finished(self, plan: BatchPlan, crops: tuple[Tensor, ...], step: int) -> Batch:
        return self._with_views(plan, self.augmentation(plan, crops), step)

    def _with_views(self, plan: BatchPlan, views: tuple[Tensor, ...], step: int) -> Batch:
        labels, ids = to_device([plan.labels, plan.ids], self.device)
        return Batch(views=views, labels=labels, ids=ids, step=step)


def available_executors() -> dict[str, str | None]:
    """Map each executor to None if it works here, else to a sentence that says what to do."""
    return {name: _missing(name) for name in _REQUIREMENTS}


def build_executor(
    name: str,
    source: Source,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    prefetch: int = 2,
    timeout_s: float = TIMEOUT_S,
    decode: str = "auto",
    resident_gib: float = 2.0,
) -> Executor:
    """Build the executor called `name`: "dali", "torchvision", "resident" or "auto".

    "auto" is "resident" for a data set that decodes to at most `resident_gib` GiB; otherwise "dali" on a GPU if it is
    installed, and "torchvision", which leaves more CPU time to training. `decode`: option of the DALI executor. The
    other arguments are those of Executor. DataError for an unknown name, or for an executor that does not work here.
    """
    if name == "auto":
        name = _automatic(source, torch.device(device), resident_gib)
        _warn_of_outlier(source, name, resident_gib)
    if name not in _REQUIREMENTS:
        raise DataError(f"the input pipeline {name} was asked for; --data.pipeline is auto, {', '.join(_REQUIREMENTS)}")
    if reason := _missing(name):
        raise DataError(f"the input pipeline {name} does not work here: {reason}, or change --data.pipeline")
    module = import_module(f"fastssl_pipelines.executors.{name}")
    kind: type[Executor] = getattr(module, f"{name.capitalize()}Executor")
    own = {"decode": decode} if name == "dali" else {}
    return kind(
        source,
        mean=mean,
        std=std,
        device=device,
        dtype=dtype,
        workers=workers,
        prefetch=prefetch,
        timeout_s=timeout_s,
        **own,
    )


def _automatic(source: Source, device: torch.device, resident_gib: float) -> str:
    if _decoded_gib(source, np.max) <= resident_gib:
        return "resident"
    return "dali" if device.type == "cuda" and not _missing("dali") else "torchvision"


def _warn_of_outlier(source: Source, name: str, resident_gib: float) -> None:
    """Warn where a few large images alone keep "auto" from choosing "resident"."""
    if name == "resident" or _decoded_gib(source, np.median) > resident_gib:
        return
    largest = int(np.argmax(np.maximum(source.widths, source.heights)))
    message = (
        f"--data.pipeline auto takes {name} and not resident, since {source.describe(largest)} has "
        f"{source.widths[largest]} x {source.heights[largest]} pixels and all {len(source)} images at the size of the "
        f"largest take {_decoded_gib(source, np.max):.1f} GiB; make such images smaller, list them in "
        "--data.quarantine or raise --data.resident-gib"
    )
    _log.warning(printable(message))


def _decoded_gib(source: Source, size: Callable[[NDArray[np.int32]], Any]) -> float:
    """Memory of all decoded images if each has the height `size(heights)` and the width `size(widths)`."""
    return len(source) * float(size(source.heights)) * float(size(source.widths)) * 3 / 2**30


def _missing(name: str) -> str | None:
    module, remedy = _REQUIREMENTS[name]
    try:
        import_module(module)
    except Exception as error:  # A broken installation can fail in any way
        return f"{remedy} ({error})"
    return None
