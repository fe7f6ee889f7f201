"""Executors turn plans into batches; all of them apply the same numbers, so they differ in speed alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from importlib import import_module
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fastssl_kernels.augment import AugmentParameters, augment
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError
from fastssl_pipelines.plan import BatchPlan, ViewPlan
from fastssl_pipelines.sources import Source

_RESIDENT_LIMIT_BYTES = 2 * 2**30
_CONSTANTS = ("mean", "std")
_REQUIREMENTS = {
    "dali": ("nvidia.dali", "install fastssl[dali]"),
    "torchvision": ("torchvision", "install torchvision"),
    "resident": ("torch", "install torch"),
}


class Steps(Protocol):
    """`steps[step]` is the BatchPlan of a step: TrainingSteps or EvaluationSteps."""

    def __getitem__(self, step: int) -> BatchPlan: ...


class Executor(ABC):
    """Decodes, cuts and resizes the images of a plan, augments them and hands over batches on `device`.

    `mean`, `std`: of the normalisation, in units of the [0, 1] range. `dtype`: of the views.
    `workers`: decoding threads or processes. `prefetch`: batches that `stream` prepares ahead.
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
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"{workers} workers and a prefetch of {prefetch} were given; --data.workers must be at"
                " least 0 and prefetch at least 1"
            )
        self.source = source
        self.mean = mean
        self.std = std
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # Every thread has a current GPU of its own, so the stream's thread needs the number.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype
        self.workers = workers
        self.prefetch = prefetch

    @abstractmethod
    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """The boxes of every view, resized: uint8 [B, size, size, 3]; DataError for a broken file."""

    def batch(self, plan: BatchPlan, step: int) -> Batch:
        """The finished batch of one plan."""
        return self._augmented(plan, self.crops(plan), step)

    def stream(self, steps: Steps, first: int, last: int) -> Generator[Batch]:
        """The batches of steps first, ..., last - 1, prepared ahead by one background thread.

        An error of the input path is raised where the consumer asks for the batch it belongs to.
        """
        batches = self._batches(steps, first, last)
        pool = ThreadPoolExecutor(1, thread_name_prefix="fastssl-input", initializer=self._enter_thread)
        pending: deque[Future[Batch]] = deque()
        try:
            for _ in range(first, last):
                pending.append(pool.submit(next, batches))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            batches.close()

    def _batches(self, steps: Steps, first: int, last: int) -> Generator[Batch]:
        for step in range(first, last):
            yield self.batch(steps[step], step)

    def _enter_thread(self) -> None:
        # a second team of OpenMP threads on the training cores was seen to make a step 20 times slower
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _augmented(self, plan: BatchPlan, crops: tuple[Tensor, ...], step: int) -> Batch:
        views = tuple(
            augment(crop.to(self.device, non_blocking=True), self._augment_parameters(view), out_dtype=self.dtype)
            for crop, view in zip(crops, plan.views, strict=True)
        )
        labels, ids = (torch.from_numpy(numbers).to(self.device) for numbers in (plan.labels, plan.ids))
        return Batch(views=views, labels=labels, ids=ids, step=step)

    def _augment_parameters(self, view: ViewPlan) -> AugmentParameters:
        numbers = {
            field.name: torch.from_numpy(getattr(view, field.name)).to(self.device, non_blocking=True)
            for field in fields(AugmentParameters)
            if field.name not in _CONSTANTS
        }
        return AugmentParameters(**numbers, mean=self.mean, std=self.std)


def available_executors() -> dict[str, str | None]:
    """For every executor None if it works here, else what to do about it."""
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
) -> Executor:
    """The executor called `name`: "dali", "torchvision", "resident" or "auto".

    "auto" is "resident" for a data set that decodes to at most 2 GiB; else "dali" for a GPU, where it is
    installed, and "torchvision", which leaves the cores more time to train, for a CPU.
    DataError for an unknown name or one that does not work here; the other arguments are those of Executor.
    """
    if name == "auto":
        name = _automatic(source, torch.device(device))
    if name not in _REQUIREMENTS:
        raise DataError(f"the input pipeline {name} was asked for; --data.pipeline is auto, {', '.join(_REQUIREMENTS)}")
    if reason := _missing(name):
        raise DataError(f"the input pipeline {name} does not work here: {reason}, or change --data.pipeline")
    module = import_module(f"fastssl_pipelines.{name}")
    kind: type[Executor] = getattr(module, f"{name.capitalize()}Executor")
    return kind(source, mean=mean, std=std, device=device, dtype=dtype, workers=workers, prefetch=prefetch)


def _automatic(source: Source, device: torch.device) -> str:
    decoded_bytes = len(source) * int(np.max(source.heights)) * int(np.max(source.widths)) * 3
    if decoded_bytes <= _RESIDENT_LIMIT_BYTES:
        return "resident"
    return "dali" if device.type == "cuda" and not _missing("dali") else "torchvision"


def _missing(name: str) -> str | None:
    module, remedy = _REQUIREMENTS[name]
    try:
        import_module(module)
    except Exception as error:  # a broken installation fails in ways of its own
        return f"{remedy} ({error})"
    return None
