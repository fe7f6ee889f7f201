"""Top-1 and top-5 accuracy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Accuracy(NamedTuple):
    """Percent of images whose class has the highest score, and one of the five highest."""

    top1: float
    top5: float


def count_hits(scores: Tensor, truth: Tensor) -> Tensor:
    """How many images have their class ranked first, and among the first five: `scores` [..., n, C] to int64 [2, ...].

    `truth` [n]; a label outside of the C classes is never hit. Of fewer than five classes all are among the
    first five. A class whose score is -inf or NaN is never a hit, so broken scores do not count as guesses.
    """
    best, ranked = scores.topk(min(5, scores.shape[-1]), dim=-1)
    hit = (ranked == truth[:, None]) & (best > -math.inf)
    return torch.stack([hit[..., 0].sum(-1), hit.any(-1).sum(-1)])


def percent(hits: Tensor, images: int) -> Accuracy:
    """The accuracy of int64 [2] hits among `images`."""
    top1, top5 = hits.tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images)
