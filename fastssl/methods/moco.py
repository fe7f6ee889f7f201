"""MoCo v1 (He et al., arXiv 1911.05722) and v2 (Chen et al., arXiv 2003.04297)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.errors import ConfigError
from fastssl.methods.base import Method, MethodConfig, MethodOutput
from fastssl.models.encoders import Encoder
from fastssl.models.heads import build_head
from fastssl.models.momentum import ema_update_, momentum_copy
from fastssl.models.norm import inverse_permutation
from fastssl.models.queue import KeyQueue
from fastssl_kernels import info_nce
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MethodConfig):
    """Options of the MoCo family."""

    queue_size: int = 65536
    """Keys that the queue holds (K)."""
    momentum: float = 0.999
    """Share of the momentum encoder that survives a step."""
    head: Literal["linear", "mlp", "mlp-bn"] = "mlp"
    """Projection head: one linear layer (v1), linear, ReLU, linear (v2), or the same with batch norm."""
    shuffle: bool = True
    """Shuffle the key batch, so that batch norm groups do not tell a query its key."""

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.queue_size < 1:
            raise ConfigError(f"--method.queue-size {self.queue_size} was given; it must be at least 1")
        if not 0 <= self.momentum <= 1:
            raise ConfigError(f"--method.momentum {self.momentum} was given; it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class MoCoV2Config(MoCoConfig):
    """Options of MoCo v2."""

    name: ClassVar[str] = "mocov2"
    paper: ClassVar[str] = "arXiv 2003.04297"


@dataclass(frozen=True, kw_only=True)
class MoCoV1Config(MoCoConfig):
    """Options of MoCo v1."""

    name: ClassVar[str] = "mocov1"
    paper: ClassVar[str] = "arXiv 1911.05722"

    temperature: float = 0.07
    head: Literal["linear", "mlp", "mlp-bn"] = "linear"


class MoCoV2(Method):
    """InfoNCE of each query against its key and a queue of earlier keys of a momentum encoder.

    Order of one step, as in the official code: query and key forward, loss on the queue as it is, backward, optimiser,
    momentum update, enqueue. The official momentum update stands between the two forwards of the next step and sees
    the same weights there.
    """

    Config: ClassVar[type[MethodConfig]] = MoCoV2Config
    number_of_views = 2

    def __init__(self, encoder: Encoder, config: MethodConfig, views: tuple[ViewSpec, ...]):
        super().__init__(encoder, config, views)
        assert isinstance(config, MoCoConfig)
        self.config = config
        head = build_head(config.head, encoder.feature_dim, encoder.feature_dim, config.dim)
        self.query_encoder = nn.Sequential(encoder, head)
        self.key_encoder = momentum_copy(self.query_encoder)
        self.queue = KeyQueue(config.queue_size, config.dim)

    def forward(self, batch: Batch) -> MethodOutput:
        query = normalize(self.query_encoder(batch.views[0]).float(), dim=1)
        key = self._keys(batch.views[1])
        loss, accuracy = self.loss(query, key, batch.labels)
        return MethodOutput(loss, {"contrast_accuracy": accuracy}, key, batch.labels)

    def loss(self, query: Tensor, key: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and contrast accuracy of unit rows against the queue."""
        result = info_nce(query, key, self.queue.keys, temperature=self.config.temperature, return_accuracy=True)
        return cast(tuple[Tensor, Tensor], result)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        if not self.config.shuffle:
            return normalize(self.key_encoder(images).float(), dim=1)
        order = torch.randperm(len(images), device=images.device)
        keys = self.key_encoder(images[order])[inverse_permutation(order)]
        return normalize(keys.float(), dim=1)

    @torch.no_grad()
    def after_step(self, output: MethodOutput, step: int) -> None:
        ema_update_(self.key_encoder, self.query_encoder, self.config.momentum)
        self.queue.enqueue(output.keys, output.labels, step)

    def encoder(self) -> nn.Module:
        return self.query_encoder[0]


class MoCoV1(MoCoV2):
    """MoCo v1: the same step with a linear head and temperature 0.07."""

    Config = MoCoV1Config
