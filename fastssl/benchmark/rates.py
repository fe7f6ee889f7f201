"""How fast an input pipeline is, and which of its stages takes how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median

import numpy as np
import torch

from fastssl.benchmark.peer_pipelines import Views
from fastssl.config import Config
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.executors.pixels import Augmentation
from fastssl_pipelines.plan import BatchPlan, SamplePlan
from fastssl_pipelines.sampler import TrainSampler
from fastssl_pipelines.sources.base import Source

STAGES = ("decode", "crops", "batch")
PLANNED_VIEWS = 512


def rate(open_batches: Callable[[], Generator[Views]], *, group: int, seconds: float) -> tuple[float, float]:
    """Seconds from the call to the first batch, and images/s after that for about `seconds`.

    `group`: workers that may deliver at once; batches are counted in multiples of it, lest an arrival of several
    counts at one end of the time only. Everything that was started has ended when it returns.
    """
    started = time.perf_counter()
    with closing(open_batches()) as batches:
        next(batches)
        start_s = time.perf_counter() - started
        for _ in range(2 * group - 1):
            next(batches)
        _wait()
        begun, images = time.perf_counter(), 0
        while not images or time.perf_counter() - begun < seconds:
            images += sum(len(next(batches)[0]) for _ in range(group))
        _wait()
        return start_s, images / (time.perf_counter() - begun)


def stage_times(executor: Executor, steps: TrainSampler, *, seconds: float) -> dict[str, list[float]]:
    """Milliseconds an image of decoding, of that with cutting and resizing, and of a whole batch, for about `seconds`.

    Each of STAGES works alone, on the same images, and the next begins when the device has finished.
    """
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    begun = time.perf_counter()
    for step in count():
        plan = steps[step]
        work: tuple[Callable[[], object], ...] = (
            partial(executor.crops, _decoding_alone(plan)),
            partial(executor.crops, plan),
            partial(executor.batch, plan, step),
        )
        for stage, run in zip(STAGES, work, strict=True):
            started = time.perf_counter()
            run()
            _wait()
            if step:  # the first allocates
                times[stage].append(1e3 * (time.perf_counter() - started) / len(plan.ids))
        if step and time.perf_counter() - begun > seconds:
            break
    return times


def _decoding_alone(plan: BatchPlan) -> BatchPlan:
    """The plan with two views of one pixel, at opposite ends of the part of each image that its views need."""
    boxes = np.stack([view.boxes for view in plan.views])
    start, stop = boxes[:, :, :2].min(0), (boxes[:, :, :2] + boxes[:, :, 2:]).max(0)
    pixels = (np.concatenate([corner, np.ones_like(corner)], axis=1) for corner in (start, stop - 1))
    return replace(plan, views=tuple(replace(plan.views[0], size=1, boxes=pixel) for pixel in pixels))


class NoAugmentation(Augmentation):
    """Hands the crops over as they are, on the device; its dtype is theirs."""

    def __call__(self, plan: BatchPlan, crops: Views) -> Views:
        return tuple(crop.to(self.device, non_blocking=True).permute(0, 3, 1, 2) for crop in crops)


def plan_ms(config: Config, source: Source) -> float:
    """Median milliseconds that Python takes for the plan of a batch with PLANNED_VIEWS views."""
    images = max(1, PLANNED_VIEWS // len(config.views))
    widths, heights = (np.resize(sizes, images) for sizes in (source.widths, source.heights))
    plan = SamplePlan(widths=widths, heights=heights, labels=np.zeros(images, np.int64), views=config.views, seed=0)
    times = []
    for _ in range(101):
        started = time.perf_counter()
        plan.batch(0, 0, images)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
