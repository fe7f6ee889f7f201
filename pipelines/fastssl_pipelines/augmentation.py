"""Step 3 of the walk of a batch, for the crops of a plan."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastssl_kernels.augment import AugmentParameters, augment
from fastssl_pipelines.plan import BatchPlan, ViewPlan

_CONSTANTS = ("mean", "std")


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Colour, blur, flip and normalisation of crops with the numbers of their plan; worker processes can have it.

    `mean`, `std`: of the normalisation, in units of the [0, 1] range. `dtype`: of the views, on `device`.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype

    def __call__(self, plan: BatchPlan, crops: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Views [B, 3, size, size], channels_last, of uint8 crops [B, size, size, 3]."""
        return tuple(
            augment(crop.to(self.device, non_blocking=True), self._parameters(view), out_dtype=self.dtype)
            for crop, view in zip(crops, plan.views, strict=True)
        )

    def _parameters(self, view: ViewPlan) -> AugmentParameters:
        numbers: dict[str, Any] = {
            field.name: torch.from_numpy(getattr(view, field.name)).to(self.device, non_blocking=True)
            for field in fields(AugmentParameters)
            if field.name not in _CONSTANTS
        }
        if not view.blur_sigma.any():
            numbers["blur_sigma"] = None  # spares a GPU the launch
        return AugmentParameters(**numbers, mean=self.mean, std=self.std)
