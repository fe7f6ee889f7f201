"""Measures the throughput of an input pipeline and the time of its stages."""

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
    """Seconds from the call to the first batch, and images/s measured after that for about `seconds`.

    `group`: workers that may deliver at the same time; batches are counted in multiples of it, so that a burst is not
    half counted. All workers have ended when it returns.
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
    """Milliseconds per image of decoding, of decoding with cropping and resizing, and of a whole batch.

    Each of STAGES runs alone on the same images, and waits for the device. Takes about `seconds`.
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
            if step:  # The first one allocates memory
                times[stage].append(1e3 * (time.perf_counter() - started) / len(plan.ids))
        if step and time.perf_counter() - begun > seconds:
            break
    return times


def _decoding_alone(plan: BatchPlan) -> BatchPlan:
    """The plan with two one-pixel views at opposite corners of the region that its views need of each image."""
    boxes = np.stack([view.boxes for view in plan.views])
    start, stop = boxes[:, :, :2].min(0), (boxes[:, :, :2] + boxes[:, :, 2:]).max(0)
    pixels = (np.concatenate([corner, np.ones_like(corner)], axis=1) for corner in (start, stop - 1))
    return replace(plan, views=tuple(replace(plan.views[0], size=1, boxes=pixel) for pixel in pixels))


class NoAugmentation(Augmentation):
    """Moves the crops to the device and changes nothing else."""

    def __call__(self, plan: BatchPlan, crops: Views) -> Views:
        return tuple(crop.to(self.device, non_blocking=True).permute(0, 3, 1, 2) for crop in crops)


def plan_ms(config: Config, source: Source) -> float:
    """Median milliseconds to plan a batch with PLANNED_VIEWS views."""
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
