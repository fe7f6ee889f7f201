"""MixCo (Kim et al., arXiv 2010.06300): mixed images with a soft target over their two keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.distributed import rank
from fastssl.methods.base import MethodConfig, MethodOutput, register_method
from fastssl.methods.mixing import uniform_rows
from fastssl.methods.queue_method import MomentumConfig, MomentumMethod
from fastssl.validation import Temperature, Weight
from fastssl_pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class MixCoConfig(MomentumConfig):
    """Options of MixCo."""

    name: ClassVar[str] = "mixco"
    paper: ClassVar[str] = "arXiv 2010.06300"
    batch_multiple: ClassVar[int] = 2
    whole_batch: ClassVar[bool] = True
    shardable: ClassVar[bool] = True

    mix_temperature: Temperature = 0.05
    """Temperature of the mixed term; 0.05 is the official default, 1.0 that of the ImageNet script."""
    mix_weight: Weight = 1.0
    """Factor of the mixed term."""


@register_method
class MixCo(MomentumMethod):
    """MoCo v2 plus a term for mixed query images, each with two keys of the batch as soft targets.

    Images 2i and 2i + 1 of the query view make one mixed image, w x_2i + (1 - w) x_2i+1 with w uniform. Its bank is the
    keys of the batch and the queue. All 1.5 N images pass the encoder together; each mixed image follows its two
    originals, so that every part of the batch (a batch norm split, a rank) has the same mixture. The official code
    pairs i with i + N/2 and adds only its own GPU's keys to the queue; ours adds those of all ranks.
    """

    Config: ClassVar[type[MethodConfig]] = MixCoConfig
    config: MixCoConfig

    def forward(self, batch: Batch) -> MethodOutput:
        config, images = self.config, batch.views[0]
        pairs = len(images) // 2
        weight = uniform_rows(pairs, images)
        query, mixed = self._queries(images, weight)
        key = self.keys(batch.views[1])
        contrast, accuracy = self.losses.info_nce(
            query, key, self.queue.keys, temperature=config.temperature, return_accuracy=True
        )
        first = len(images) * rank() + 2 * torch.arange(pairs, device=images.device)
        mix = self.losses.mixco(
            mixed,
            self.gather_keys(key),
            self.queue.keys,
            first=first,
            second=first + 1,
            weight=weight,
            temperature=config.mix_temperature,
        )
        metrics = {"contrast_accuracy": accuracy, "mix_loss": mix.detach()}
        return MethodOutput(contrast + config.mix_weight * mix, metrics, (batch.labels, key))

    def _queries(self, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows [N, C] of the images and [N/2, C] of their mixtures."""
        first, second = images[0::2], images[1::2]
        own_weight = weight.to(images.dtype)[:, None, None, None]
        mixed = own_weight * first + (1 - own_weight) * second
        all_images = torch.stack([first, second, mixed], 1).flatten(0, 1)
        all_images = all_images.contiguous(memory_format=torch.channels_last)
        rows = normalize(self.query_encoder(all_images).float(), dim=1).unflatten(0, (-1, 3))
        return rows[:, :2].flatten(0, 1), rows[:, 2].contiguous()
