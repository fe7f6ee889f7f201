"""CO2, consistent contrast (Wei et al., arXiv 2010.02217)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastssl.methods.base import register_method
from fastssl.methods.moco import MoCoConfig, MoCoV2
from fastssl.validation import Temperature, Weight
from fastssl_kernels import consistency


@dataclass(frozen=True, kw_only=True)
class CO2Config(MoCoConfig):
    """Options of CO2; the defaults are those on MoCo v2."""

    name: ClassVar[str] = "co2"
    paper: ClassVar[str] = "arXiv 2010.02217"

    consistency_weight: Weight = 0.3
    """Factor of the consistency term (alpha); 0 is MoCo."""
    consistency_temperature: Temperature = 0.05
    """Temperature of the two distributions over the queue."""
    include_positive: bool = False
    """Include the own key in both distributions, as in lightly."""


@register_method
class CO2(MoCoV2):
    """MoCo plus the symmetric KL divergence between the softmax of query and key over the queue.

    The authors' code was never published and the paper's body could not be read, so these are interpretations: the
    distributions cover only the queue, without the own key; weight and temperature are 10 and 0.04 on MoCo v1, 0.3 and
    0.05 on v2.
    """

    Config = CO2Config
    config: CO2Config
    variants: ClassVar = {"alone": {"consistency_weight": 10.0, "consistency_temperature": 0.2}}

    def loss(self, query: Tensor, key: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        contrast, accuracy = super().loss(query, key, labels)
        term = consistency(
            query,
            key,
            self.queue.keys,
            temperature=self.config.consistency_temperature,
            include_positive=self.config.include_positive,
        )
        return contrast + self.config.consistency_weight * term, accuracy
