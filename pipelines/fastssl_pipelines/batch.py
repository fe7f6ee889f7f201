"""The batch that a method sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Views of one batch of images, on the training device.

    `views`: one tensor a view, [B, 3, H, W], channels_last, normalised, in the training dtype.
    `labels`: [B] int64, -1 where the label is unknown. `ids`: [B] int64, position in the source.
    `step`: the training step that this batch belongs to.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    ids: Tensor
    step: int
