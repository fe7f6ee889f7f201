"""MoCo v1 (He et al., arXiv 1911.05722) and v2 (Chen et al., arXiv 2003.04297)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastssl.methods.base import MethodConfig, MethodOutput, register_method
from fastssl.methods.queue_method import MomentumConfig, MomentumMethod
from fastssl.validation import Temperature
from fastssl_pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MomentumConfig):
    """Options of the MoCo family."""

    symmetric: bool = False
    """Use each view as query and as key, and add the two losses, as in the authors' CIFAR-10 notebook."""

    @property
    def keys_per_image(self) -> int:
        return 2 if self.symmetric else 1


@dataclass(frozen=True, kw_only=True)
class MoCoV2Config(MoCoConfig):
    """Options of MoCo v2."""

    name: ClassVar[str] = "mocov2"
    paper: ClassVar[str] = "arXiv 2003.04297"
    shardable: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class MoCoV1Config(MoCoConfig):
    """Options of MoCo v1."""

    name: ClassVar[str] = "mocov1"
    paper: ClassVar[str] = "arXiv 1911.05722"
    shardable: ClassVar[bool] = True

    temperature: Temperature = 0.07
    head: Literal["linear", "mlp", "mlp-bn"] = "linear"


@register_method
class MoCoV2(MomentumMethod):
    """InfoNCE of each query against its key and a queue of earlier keys from a momentum encoder.

    Symmetric: both directions read the same queue and their losses are added, not averaged; the keys of both
    views are enqueued (facebookresearch/moco, branch colab-notebook).
    """

    Config: ClassVar[type[MethodConfig]] = MoCoV2Config
    config: MoCoConfig
    variants: ClassVar = {
        "symmetric": {"symmetric": True},
        "head with batch norm": {"head": "mlp-bn", "hidden_dim": 20},
    }

    def forward(self, batch: Batch) -> MethodOutput:
        first, second = batch.views
        second_keys = self.keys(second)
        loss, accuracy = self.loss(self.queries(first), second_keys, batch.labels)
        if not self.config.symmetric:
            return MethodOutput(loss, {"contrast_accuracy": accuracy}, (batch.labels, second_keys))
        first_keys = self.keys(first)
        other_loss, other_accuracy = self.loss(self.queries(second), first_keys, batch.labels)
        metrics = {"contrast_accuracy": (accuracy + other_accuracy) / 2}
        return MethodOutput(loss + other_loss, metrics, (batch.labels, first_keys, second_keys))

    def loss(self, query: Tensor, key: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and contrast accuracy of unit rows against the queue."""
        temperature = self.config.temperature
        return self.losses.info_nce(query, key, self.queue.keys, temperature=temperature, return_accuracy=True)


@register_method
class MoCoV1(MoCoV2):
    """MoCo v1: the step of MoCo v2 with a linear head and temperature 0.07."""

    Config = MoCoV1Config
