"""Features of a frozen encoder on the labeled images of a split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.distributed import gather_uneven_rows, rank, world_size
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.plan import SamplePlan
from fastssl_pipelines.sampler import EvaluationSampler
from fastssl_pipelines.sources.base import Source
from fastssl_pipelines.views import ViewSpec

BATCH_SIZE = 256


class Features(NamedTuple):
    """`rows` float32 [n, F], as the encoder outputs them; `labels` int64 [n], at least 0."""

    rows: Tensor
    labels: Tensor


def evaluation_plan(source: Source, view: ViewSpec, *, seed: int = 0, shuffle: bool = False) -> SamplePlan:
    """A plan for one view of the images with their true labels; drops the unlabeled images at the end of `source`."""
    known = np.flatnonzero(source.labels >= 0)
    count = int(known[-1]) + 1 if len(known) else 0
    return SamplePlan(
        widths=source.widths[:count],
        heights=source.heights[:count],
        labels=source.labels[:count],
        views=(view,),
        seed=seed,
        shuffle=shuffle,
    )


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Float32 features [B, F] of images [B, 3, H, W], computed under autocast to `dtype`."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return encoder(images).float().flatten(1)


def extract_features(encoder: nn.Module, executor: Executor, view: ViewSpec, *, dtype: torch.dtype) -> Features:
    """The features of all labeled images of an executor, with batch norm in eval mode; ValueError if there are none.

    Each rank computes a part, and every rank gets all features, in image order. They are independent of the seed only
    for a `view` with a center crop.
    """
    steps = EvaluationSampler(evaluation_plan(executor.source, view), batch_size=BATCH_SIZE)
    if not len(steps):
        raise ValueError(f"{executor.source.name} has no labeled images, and features need some")
    was_training = encoder.training
    encoder.eval()
    divided = len(steps) >= world_size()  # Else there are so few that each rank computes all
    first, last = (len(steps) * r // world_size() for r in (rank(), rank() + 1)) if divided else (0, len(steps))
    room, rows, labels = (last - first) * BATCH_SIZE, torch.empty(0), []
    filled = 0
    for batch in executor.stream(steps, first, last):
        known = batch.labels >= 0
        found = encode(encoder, batch.views[0], dtype=dtype)[known]
        if not filled:
            # Allocated once: concatenating the features of millions of images would double the memory
            rows = found.new_empty(room, found.shape[1])
        rows[filled : filled + len(found)] = found
        filled += len(found)
        labels.append(batch.labels[known])
    encoder.train(was_training)
    features = Features(rows[:filled], torch.cat(labels))
    return Features(*map(gather_uneven_rows, features)) if divided else features
