"""Un-Mix (Shen et al., arXiv 2003.05438): image mixtures with known similarity to both sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastssl.methods.base import MethodConfig, MethodOutput, register_method
from fastssl.methods.mixing import swap_neighbors
from fastssl.methods.moco import MoCoConfig, MoCoV2
from fastssl.validation import Share
from fastssl_pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class UnMixConfig(MoCoConfig):
    """Options of Un-Mix on MoCo."""

    name: ClassVar[str] = "unmix"
    paper: ClassVar[str] = "arXiv 2003.05438"
    batch_multiple: ClassVar[int] = 2
    shardable: ClassVar[bool] = True

    global_probability: Share = 0.5
    """Probability that a step mixes whole images (Mixup) rather than pasting a box of one into the other (CutMix)."""


@register_method
class UnMix(MoCoV2):
    """MoCo plus w InfoNCE(mixed, own key) + (1 - w) InfoNCE(mixed, partner's key), all on the same queue.

    View 0 is mixed, with one weight w per batch from the uniform distribution, which is Beta(1, 1), and passes the
    encoder separately. The partner is the neighbor in the batch; the official code reverses the batch. Symmetric: both
    directions use the same mixtures of view 0 against the keys of either view; the official code computes them twice.
    """

    Config: ClassVar[type[MethodConfig]] = UnMixConfig
    config: UnMixConfig
    variants: ClassVar = {
        "global": {"global_probability": 1.0},
        "region": {"global_probability": 0.0},
        "symmetric": {"symmetric": True},
    }

    def forward(self, batch: Batch) -> MethodOutput:
        images = batch.views[0]
        mask, weight = mixing_masks(images, self.config.global_probability)
        mixed = self.queries(mask * images + (1 - mask) * swap_neighbors(images))
        output = super().forward(batch)
        _, *keys = output.updates
        mix = torch.stack([self._mixed_loss(mixed, key, weight) for key in keys]).sum()
        return MethodOutput(output.loss + mix, {**output.metrics, "mix_loss": mix.detach()}, output.updates)

    def _mixed_loss(self, mixed: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        partner = swap_neighbors(key)
        return self.losses.unmix(
            mixed, key, partner, self.queue.keys, weight=weight, temperature=self.config.temperature
        )


def mixing_masks(images: Tensor, global_probability: float) -> tuple[Tensor, Tensor]:
    """Share of each pixel that stays, [H, W] in the images' dtype, and its mean over the image, [] float32.

    Global: one weight w for all pixels. Region (CutMix): 0 in a box around a uniform center, which covers 1 - w of the
    area and is clipped at the border, and 1 elsewhere. Each step draws one of the two, without waiting for the device.
    """
    height, width = images.shape[2:]
    chance, weight, center_y, center_x = torch.rand(4, device=images.device).unbind()
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = _span(y, height, center_y, weight)[:, None] & _span(x, width, center_x, weight)
    mask = torch.where(chance < global_probability, weight, (~inside).float())
    return mask.to(images.dtype), mask.mean()


def _span(position: Tensor, length: int, center: Tensor, weight: Tensor) -> Tensor:
    """Which of `length` positions lie inside the box along one axis; whole pixels, as in the official code."""
    middle, side = (center * length).floor(), ((1 - weight).sqrt() * length).floor()
    return (position >= middle - (side / 2).floor()) & (position < middle + (side / 2).floor())
