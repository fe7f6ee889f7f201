"""Top-1 and top-5 accuracy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Accuracy(NamedTuple):
    """Percent of images whose class has the highest score, and whose class is among the five highest."""

    top1: float
    top5: float


def count_hits(scores: Tensor, truth: Tensor) -> Tensor:
    """Count top-1 and top-5 hits: `scores` [..., n, C] and `truth` int64 [n] to int64 [2, ...].

    With fewer than five classes, all are in the top five. A label outside the C classes and a class with score -inf or
    NaN are never hits, so invalid scores do not count as guesses.
    """
    best, ranked = scores.topk(min(5, scores.shape[-1]), dim=-1)
    hit = (ranked == truth[:, None]) & (best > -math.inf)
    return torch.stack([hit[..., 0].sum(-1), hit.any(-1).sum(-1)])


def percent(hits: Tensor, images: int) -> Accuracy:
    """The accuracy of hits, int64 [2], among `images` images."""
    top1, top5 = hits.tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images)
