"""Options that several methods share: a queue, a momentum encoder, a projection head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fastssl.distributed import world_size
from fastssl.errors import ConfigError
from fastssl.methods.base import METHODS, MethodConfig
from fastssl.models.queue import KeyQueue
from fastssl.validation import Decay, Rows, Width


@dataclass(frozen=True, kw_only=True)
class QueueConfig(MethodConfig):
    """Options of a queue."""

    queue_size: Rows = 65536
    """Keys that the queue holds (K)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_room("queue-size", self.queue_size)

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

    def new_queue(self, dtype: torch.dtype) -> KeyQueue:
        """A queue of random keys, the same on every rank."""
        return KeyQueue(self.queue_size, self.dim, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class ShardableQueueConfig(QueueConfig):
    """Options of a queue that may be split over the devices."""

    shardable: ClassVar[bool] = False
    """Whether `fastssl.methods.sharded` has the method's loss."""

    shard_queue: bool = False
    """Keep only a part of the queue on each device, for queues of millions of keys; the losses stay the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_queue and not self.shardable:
            others = [name for name, cls in sorted(METHODS.items()) if getattr(cls.Config, "shardable", False)]
            raise ConfigError(
                f"--method.shard-queue was given with {self.name}, whose loss needs the whole queue on every device; "
                f"drop it or use one of {', '.join(others)}"
            )

    def new_queue(self, dtype: torch.dtype) -> KeyQueue:
        """A queue of random keys, or this rank's shard of one; ConfigError if it cannot be split evenly."""
        shards = world_size() if self.shard_queue else 1
        if self.queue_size % shards:
            raise ConfigError(
                f"--method.queue-size {self.queue_size} was given with --method.shard-queue on {shards} devices; "
                f"it must be a multiple of {shards}"
            )
        return KeyQueue(self.queue_size, self.dim, shards=shards, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class EMAConfig(MethodConfig):
    """Options of a momentum encoder."""

    momentum: Decay = 0.999
    """Share of the momentum encoder that survives a step."""


@dataclass(frozen=True, kw_only=True)
class ShuffledEMAConfig(EMAConfig):
    """Options of a momentum encoder with shuffled batch norm (MoCo)."""

    shuffle: bool = True
    """Shuffle the key batch, so that batch norm groups do not reveal which key belongs to a query."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig(MethodConfig):
    """Options of the projection head."""

    head: Literal["linear", "mlp", "mlp-bn"] = "mlp"
    """Projection head: one linear layer (v1), linear, ReLU, linear (v2), or the same with batch norm."""
    hidden_dim: Width | None = None
    """Width of the head's hidden layer; by default that of the encoder's features."""
