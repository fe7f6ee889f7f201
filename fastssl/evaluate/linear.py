"""Linear probe on features that are computed once, trained at several learning rates in parallel.

It differs from the probes of the papers, which train on random crops and report the best test epoch:

- MoCo (arXiv 1911.05722): rate 30, 100 epochs, times 0.1 at 60 and 80, batch 256; see `linear_crops.py`.
- MSVQ (arXiv 2305.05370, linear_eval.py): rate 1, cosine over 100 epochs, Nesterov momentum, batch 256.

Here images are not augmented and momentum is plain. The rate is chosen on held-out training images; a probe trained at
that rate on all training images is tested after its last epoch. Nothing is chosen on the test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from fastssl.config import OptimConfig
from fastssl.errors import ConfigError, TrainingError
from fastssl.evaluate.accuracy import Accuracy, count_hits, percent
from fastssl.evaluate.features import Features
from fastssl.schedule import learning_rate

MOMENTUM = 0.9
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # For features of mean norm 1
HELD_OUT = 10  # Every tenth training image of a class is held out to choose the rate
_CHUNK = 4096

Schedule = Literal["cosine", "step"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with momentum 0.9, no weight decay; schedule "cosine" (to 0) or "step" (times 0.1 at 60 and 80 %)."""

    epochs: int = 100
    batch_size: int = 256
    schedule: Schedule = "cosine"
    seed: int = 0

    def learning_rate(self, start: float, step: int, steps_per_epoch: int) -> float:
        """The learning rate at `step` for an initial rate of `start`."""
        milestones = round(0.6 * self.epochs), round(0.8 * self.epochs)
        optim = OptimConfig(lr=start, schedule=self.schedule, milestones=milestones)
        total_steps = self.epochs * steps_per_epoch
        return learning_rate(optim, step, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


class Classifiers(NamedTuple):
    """R linear classifiers of C classes: `weight` [R, C, F], `bias` [R, C]."""

    weight: Tensor
    bias: Tensor

    def hits(self, features: Features) -> Tensor:
        """`count_hits` for each classifier, [2, R]."""
        hits = torch.zeros(2, len(self.bias), dtype=torch.int64, device=self.bias.device)
        for rows, truth in zip(features.rows.split(_CHUNK), features.labels.split(_CHUNK), strict=True):
            hits += count_hits(rows @ self.weight.transpose(1, 2) + self.bias[:, None], truth)
        return hits

    def finite(self) -> bool:
        """Whether all weights and biases are finite."""
        return bool(self.weight.isfinite().all() & self.bias.isfinite().all())


class Probe(NamedTuple):
    """A trained probe: the chosen rate, and one classifier for features divided by `scale`.

    `held_out_top1`: held-out accuracy in percent by rate; empty if only one rate was given.
    """

    lr: float
    held_out_top1: dict[float, float]
    scale: float
    classifiers: Classifiers

    def test(self, features: Features) -> Accuracy:
        """The accuracy on test features, unscaled."""
        scaled = Features(features.rows / self.scale, features.labels)
        return percent(self.classifiers.hits(scaled)[:, 0], len(features.labels))


def train_probe(features: Features, rates: Sequence[float], recipe: Recipe) -> Probe:
    """Train a linear probe at the one of `rates` with the best accuracy on a held-out tenth of the training images.

    Features are first divided by their mean norm: the best rate is proportional to the inverse square of their scale,
    so one list of rates serves all encoders. Ties go to the lowest rate. TrainingError if the probe diverges.
    """
    scale = float(features.rows.norm(dim=1).mean()) or 1.0
    scaled = Features(features.rows / scale, features.labels)
    classes = int(features.labels.max()) + 1
    rates, held_out_top1 = sorted(set(rates)), {}
    if len(rates) > 1:
        held_out_top1 = _held_out_top1(scaled, rates, classes, recipe)
        rates = [max(rates, key=held_out_top1.__getitem__)]
    classifiers = train_classifiers(scaled, rates, classes, recipe)
    if not classifiers.finite():
        raise TrainingError(f"the linear classifier diverged at learning rate {rates[0]:g}; lower --lr")
    return Probe(rates[0], held_out_top1, scale, classifiers)


def _held_out_top1(features: Features, rates: Sequence[float], classes: int, recipe: Recipe) -> dict[float, float]:
    held = held_out(features.labels)
    kept, judge = (Features(features.rows[part], features.labels[part]) for part in (~held, held))
    classifiers = train_classifiers(kept, rates, classes, recipe)
    hits = classifiers.hits(judge)  # 0 for a classifier that diverged
    return {rate: percent(hits[:, index], len(judge.labels)).top1 for index, rate in enumerate(rates)}


def held_out(labels: Tensor) -> Tensor:
    """Mask, bool [n], of every tenth image in class order, or the last of fewer; ConfigError for fewer than two."""
    if len(labels) < 2:
        raise ConfigError(
            f"{len(labels)} labeled training images were given, and choosing a learning rate on held-out images takes "
            "at least 2; give one rate with --lr, or more images"
        )
    order = labels.argsort(stable=True)
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held[order[min(HELD_OUT, len(order)) - 1 :: HELD_OUT]] = True
    return held


@torch.no_grad()
def train_classifiers(features: Features, rates: Sequence[float], classes: int, recipe: Recipe) -> Classifiers:
    """Train one classifier per rate, all on the same batches and from zero weights (the problem is convex).

    Together they are a linear layer of R * C outputs, with a learning rate for each row.
    """
    rows, labels = features
    count, device = len(labels), rows.device
    lr = torch.tensor(rates, dtype=torch.float32, device=device).repeat_interleave(classes)
    weight = torch.zeros(len(lr), rows.shape[1], device=device)
    bias = torch.zeros(len(lr), device=device)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    steps_per_epoch = -(-count // recipe.batch_size)
    order = torch.Generator().manual_seed(recipe.seed)
    for epoch in range(recipe.epochs):
        batches = torch.randperm(count, generator=order).to(device).split(recipe.batch_size)
        for index, batch in enumerate(batches):
            x, truth = rows[batch], one_hot(labels[batch], classes)
            logits = linear(x, weight, bias).unflatten(1, (len(rates), classes))
            # Gradient of the mean cross-entropy with respect to the logits
            error = ((logits.softmax(2) - truth[:, None]) / len(batch)).flatten(1)
            weight_velocity.addmm_(error.T, x, beta=MOMENTUM)
            bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
            step_lr = lr * recipe.learning_rate(1.0, epoch * steps_per_epoch + index, steps_per_epoch)
            weight.addcmul_(weight_velocity, step_lr[:, None], value=-1)
            bias.addcmul_(bias_velocity, step_lr, value=-1)
    shape = len(rates), classes
    return Classifiers(weight.unflatten(0, shape), bias.unflatten(0, shape))
