"""The full linear protocol: a linear layer on the frozen encoder, trained on random crops (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastssl.errors import TrainingError
from fastssl.evaluate.features import encode, evaluation_plan
from fastssl.evaluate.linear import MOMENTUM, Recipe
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.sampler import TrainSampler
from fastssl_pipelines.views import ViewSpec


def crop_view(size: int) -> ViewSpec:
    """torchvision's RandomResizedCrop and a flip, without other augmentation."""
    return ViewSpec(size=size, scale=(0.08, 1.0), jitter_probability=0.0, grayscale=0.0)


def train_on_crops(
    encoder: nn.Module,
    train: Executor,
    *,
    size: int,
    lr: float,
    recipe: Recipe,
    dtype: torch.dtype,
    info: Callable[[str], None],
) -> nn.Linear:
    """Train a linear layer on crops of the labeled images; drops the incomplete last batch of an epoch.

    The encoder is frozen, in eval mode, and its features are not scaled. `info` gets a line per epoch. TrainingError
    for a non-finite loss.
    """
    plan = evaluation_plan(train.source, crop_view(size), seed=recipe.seed, shuffle=True)
    steps = TrainSampler(plan, batch_size=recipe.batch_size)
    encoder.eval()
    classifier = _linear_layer(encoder, train, size, classes=int(plan.labels.max()) + 1, seed=recipe.seed, dtype=dtype)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=MOMENTUM)
    total, started = torch.zeros((), device=train.device), time.perf_counter()
    for batch in train.stream(steps, 0, recipe.epochs * steps.steps_per_epoch):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(lr, batch.step, steps.steps_per_epoch)
        logits = classifier(encode(encoder, batch.views[0], dtype=dtype))
        loss = cross_entropy(logits, batch.labels, ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        epoch, rest = divmod(batch.step + 1, steps.steps_per_epoch)
        if rest == 0:
            mean = float(total) / steps.steps_per_epoch
            if not math.isfinite(mean):
                raise TrainingError(
                    f"the loss of the linear layer is {mean} in epoch {epoch}; lower --lr, which is {lr:g}"
                )
            speed = (batch.step + 1) * steps.batch_size / (time.perf_counter() - started)
            info(f"epoch {epoch}/{recipe.epochs}: loss {mean:.4f}, {speed:.0f} images/s")
            total.zero_()
    return classifier


def _linear_layer(
    encoder: nn.Module, train: Executor, size: int, *, classes: int, seed: int, dtype: torch.dtype
) -> nn.Linear:
    width = encode(encoder, torch.zeros(1, 3, size, size, device=train.device), dtype=dtype).shape[1]
    layer = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)  # As in MoCo's main_lincls.py
    nn.init.zeros_(layer.bias)
    return layer.to(train.device)
