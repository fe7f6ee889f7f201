"""The random parameters of a training step: our plan and torchvision's draws; and the first step of an epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torchvision.transforms import ColorJitter, RandomResizedCrop

from bench.micro.sizes import Sizes
from fastssl_pipelines import BatchPlan, SamplePlan, TrainSampler, ViewSpec

VIEW = ViewSpec(size=224, blur=0.5)
WIDTH, HEIGHT = 500, 375


@pytest.mark.parametrize("implementation", ["fastssl", "torchvision"])
def test_step(benchmark: BenchmarkFixture, sizes: Sizes, implementation: str) -> None:
    """Draw the parameters of two views of a batch; torchvision draws only boxes and jitter, image by image."""
    benchmark.group = f"plan of a step: 2 views of {sizes.batch_size} images"
    steps, indices = TrainSampler(_plan(sizes.images), batch_size=sizes.batch_size), itertools.count()

    def ours() -> np.ndarray:
        plan: BatchPlan = steps.at(next(indices) % steps.steps_per_epoch)
        return np.concatenate([view.boxes for view in plan.views])

    image = torch.empty(1).expand(3, HEIGHT, WIDTH)

    def theirs() -> np.ndarray:
        boxes = []
        for _ in range(2 * sizes.batch_size):
            boxes.append(RandomResizedCrop.get_params(image, list(VIEW.scale), list(VIEW.ratio)))
            ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1))
        return np.array(boxes)

    boxes = benchmark(ours if implementation == "fastssl" else theirs)
    area = boxes[:, 2] * boxes[:, 3] / (WIDTH * HEIGHT)
    assert len(boxes) == 2 * sizes.batch_size
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (HEIGHT, WIDTH)).all()
    assert VIEW.scale[0] - 0.01 <= area.min() < area.max() <= VIEW.scale[1]


def test_first_step_of_an_epoch(benchmark: BenchmarkFixture, sizes: Sizes) -> None:
    """The first step shuffles all images."""
    benchmark.group = f"plan of an epoch's first step: {sizes.images} images"
    plan, epochs = _plan(sizes.images), itertools.count()
    ids = benchmark(lambda: plan.batch(next(epochs), 0, sizes.batch_size).ids)
    assert len(set(ids)) == sizes.batch_size
    assert (ids != np.arange(sizes.batch_size)).any()


def _plan(images: int) -> SamplePlan:
    ones = np.ones(images, np.int64)
    return SamplePlan(widths=WIDTH * ones, heights=HEIGHT * ones, labels=0 * ones, views=(VIEW, VIEW), seed=0)
