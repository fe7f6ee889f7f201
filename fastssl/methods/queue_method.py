"""Base of the methods with a momentum encoder and a queue."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastssl_kernels
from fastssl.distributed import gather_rows, local_rows
from fastssl.methods import sharded
from fastssl.methods.base import Method, MethodOutput, TrainProgress
from fastssl.methods.shared_options import EMAConfig, HeadConfig, QueueConfig, ShardableQueueConfig, ShuffledEMAConfig
from fastssl.models.ema import ema_update_, momentum_copy
from fastssl.models.encoders import Encoder
from fastssl.models.heads import build_head
from fastssl.models.norm import inverse_permutation
from fastssl_pipelines.views import ViewSpec


# The last base comes first in config.json: queue size, momentum, head, shuffle, shards
@dataclass(frozen=True, kw_only=True)
class MomentumConfig(ShardableQueueConfig, ShuffledEMAConfig, HeadConfig, EMAConfig, QueueConfig):
    """Options of a queue that a momentum encoder fills."""


class MomentumMethod(Method):
    """A trained query encoder, a momentum encoder that follows it, and a queue of the momentum encoder's keys.

    Order of one step, as in the official MoCo code: query and key forward, loss on the queue as it is, backward,
    optimizer, momentum update, enqueue. The official momentum update comes between the two forwards of the next
    step and uses the same weights. `forward` returns as updates the labels and then one or more tensors of keys.
    """

    number_of_views = 2
    config: MomentumConfig

    def __init__(
        self,
        encoder: Encoder,
        config: MomentumConfig,
        views: tuple[ViewSpec, ...],
        bank_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(encoder, config, views, bank_dtype)
        self.config = config
        hidden_dim = config.hidden_dim or encoder.feature_dim
        self.query_encoder = nn.Sequential(
            encoder, build_head(config.head, encoder.feature_dim, hidden_dim, config.dim)
        )
        self.key_encoder = momentum_copy(self.query_encoder)
        self.queue = config.new_queue(bank_dtype)

    @property
    def losses(self) -> ModuleType:
        """The module with the losses over this queue: `fastssl_kernels`, or `sharded` with the same names."""
        return sharded if self.queue.shards > 1 else fastssl_kernels

    def queries(self, images: Tensor) -> Tensor:
        """Unit rows of the query encoder."""
        return normalize(self.query_encoder(images).float(), dim=1)

    def keys(self, images: Tensor) -> Tensor:
        """Unit rows of the momentum encoder, without gradient."""
        return momentum_rows(self.key_encoder, images, shuffle=self.config.shuffle)

    @torch.no_grad()
    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        ema_update_(self.key_encoder, self.query_encoder, self.config.momentum)
        labels, *keys = output.updates
        all_keys = torch.cat([self.gather_keys(rows) for rows in keys])
        self.queue.enqueue(all_keys, gather_rows(labels).repeat(len(keys)), progress.step)

    def encoder(self) -> nn.Module:
        return self.query_encoder[0]


@torch.no_grad()
def momentum_rows(encoder: nn.Module, images: Tensor, *, shuffle: bool) -> Tensor:
    """Unit rows of a momentum encoder; with `shuffle` each rank computes a random part of the batch of all ranks.

    The permutation comes from torch's generator, which must be in the same state on all ranks.
    """
    if not shuffle:
        return normalize(encoder(images).float(), dim=1)
    all_images = gather_rows(images)
    order = torch.randperm(len(all_images), device=images.device)
    rows = encoder(all_images[local_rows(order)])
    rows = local_rows(gather_rows(rows)[inverse_permutation(order)])
    return normalize(rows.float(), dim=1)
