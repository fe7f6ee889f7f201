"""What the methods with a momentum encoder and a queue share; each of them says how it differs."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastssl_kernels
from fastssl.distributed import gather_rows, local_rows, world_size
from fastssl.errors import ConfigError
from fastssl.methods import sharded
from fastssl.methods.base import Method, MethodConfig, MethodOutput, TrainProgress
from fastssl.models.ema import ema_update_, momentum_copy
from fastssl.models.encoders import Encoder
from fastssl.models.heads import build_head
from fastssl.models.norm import inverse_permutation
from fastssl.models.queue import KeyQueue
from fastssl.validation import Decay, Rows, Width
from fastssl_pipelines.views import ViewSpec

SHARDABLE = ("mocov1", "mocov2", "mixco", "unmix", "ressl", "msvq")  # whose losses `sharded` has


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(MethodConfig):
    """Options of a momentum encoder and its queue."""

    queue_size: Rows = 65536
    """Keys that the queue holds (K)."""
    momentum: Decay = 0.999
    """Share of the momentum encoder that survives a step."""
    head: Literal["linear", "mlp", "mlp-bn"] = "mlp"
    """Projection head: one linear layer (v1), linear, ReLU, linear (v2), or the same with batch norm."""
    hidden_dim: Width | None = None
    """Width of the head's hidden layer; by default that of the encoder's features."""
    shuffle: bool = True
    """Shuffle the key batch, so that batch norm groups do not tell a query its key."""
    shard_queue: bool = False
    """Keep on each device a part of the queue alone, for queues of millions of keys; the losses stay the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_room("queue-size", self.queue_size)
        if self.shard_queue and self.name not in SHARDABLE:
            raise ConfigError(
                f"--method.shard-queue was given with {self.name}, whose loss needs the whole queue on every device; "
                f"drop it or take one of {', '.join(SHARDABLE)}"
            )

    @property
    def keys_per_image(self) -> int:
        """Keys of one image that enter the queue in a step."""
        return 1

    def check_batch(self, batch_size: int) -> None:
        super().check_batch(batch_size)
        keys = batch_size * self.keys_per_image
        if self.queue_size < keys:
            raise ConfigError(
                f"--method.queue-size {self.queue_size} was given with --train.batch-size {batch_size}; "
                f"the queue must hold the {keys} keys of at least one batch"
            )


class MomentumMethod(Method):
    """A query encoder that learns, a momentum encoder that follows it, and a queue of the latter's keys.

    Order of one step, as in the official MoCo code: query and key forward, loss on the queue as it is, backward,
    optimizer, momentum update, enqueue. The official momentum update stands between the two forwards of the next
    step and sees the same weights there. `forward` keeps the labels and then one or more tensors of keys.
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
        self.queue = self.new_queue()

    def new_queue(self) -> KeyQueue:
        """A queue of random keys, or this rank's shard of one; ConfigError where it cannot be cut evenly."""
        size, shards = self.config.queue_size, world_size() if self.config.shard_queue else 1
        if size % shards:
            raise ConfigError(
                f"--method.queue-size {size} was given with --method.shard-queue on {shards} devices; "
                f"it must be a multiple of {shards}"
            )
        return KeyQueue(size, self.config.dim, shards=shards, dtype=self.bank_dtype)

    @property
    def losses(self) -> ModuleType:
        """Where the losses over this method's queues are: `fastssl_kernels`, or `sharded` with the same names."""
        return sharded if self.queue.shards > 1 else fastssl_kernels

    def queries(self, images: Tensor) -> Tensor:
        """Unit rows of the encoder that learns."""
        return normalize(self.query_encoder(images).float(), dim=1)

    def keys(self, images: Tensor) -> Tensor:
        """Unit rows of the momentum encoder, without gradient."""
        return momentum_rows(self.key_encoder, images, shuffle=self.config.shuffle)

    @torch.no_grad()
    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        ema_update_(self.key_encoder, self.query_encoder, self.config.momentum)
        labels, *keys = output.kept
        everyone = torch.cat([self.gather_keys(rows) for rows in keys])
        self.queue.enqueue(everyone, gather_rows(labels).repeat(len(keys)), progress.step)

    def encoder(self) -> nn.Module:
        return self.query_encoder[0]


@torch.no_grad()
def momentum_rows(encoder: nn.Module, images: Tensor, *, shuffle: bool) -> Tensor:
    """Unit rows of a momentum encoder; with `shuffle` each rank computes a random part of the batch of all ranks.

    The permutation comes from torch's generator, which must be in the same state on all ranks.
    """
    if not shuffle:
        return normalize(encoder(images).float(), dim=1)
    everything = gather_rows(images)
    order = torch.randperm(len(everything), device=images.device)
    rows = encoder(everything[local_rows(order)])
    rows = local_rows(gather_rows(rows)[inverse_permutation(order)])
    return normalize(rows.float(), dim=1)
