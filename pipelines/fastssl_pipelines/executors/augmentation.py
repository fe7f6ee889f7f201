"""Step 3 of the walk of a batch, for the crops of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastssl_kernels import AugmentParameters, augment
from fastssl_pipelines.executors.transfer import to_device
from fastssl_pipelines.plan import BatchPlan, ViewPlan

_PER_IMAGE = tuple(field.name for field in fields(AugmentParameters) if field.name not in ("mean", "std"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Color, blur, flip and normalization of crops with the numbers of their plan; worker processes can have it.

    `mean`, `std`: of the normalization, in units of the [0, 1] range. `dtype`: of the views, on `device`.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype

    def __call__(self, plan: BatchPlan, crops: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Views [B, 3, size, size], channels_last, of uint8 crops [B, size, size, 3] on `device`."""
        return tuple(
            augment(crop, numbers, out_dtype=self.dtype)
            for crop, numbers in zip(crops, self._parameters(plan.views), strict=True)
        )

    def _parameters(self, views: Sequence[ViewPlan]) -> Iterator[AugmentParameters]:
        """Those of each view, all of which come to the device in one copy."""
        copied = iter(to_device([getattr(view, name) for view in views for name in _PER_IMAGE], self.device))
        for view in views:
            numbers: dict[str, Any] = dict(zip(_PER_IMAGE, copied, strict=False))
            if not view.blur_sigma.any():
                numbers["blur_sigma"] = None  # spares a GPU the launch
            yield AugmentParameters(**numbers, mean=self.mean, std=self.std)
