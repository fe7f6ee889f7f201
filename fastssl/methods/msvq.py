"""MSVQ (Peng et al.): self-supervised learning with multiple sample views and queues."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from fastssl.distributed import gather_rows
from fastssl.methods.base import MethodConfig, MethodOutput, TrainProgress, register_method
from fastssl.methods.queue_method import MomentumConfig, MomentumMethod, momentum_rows
from fastssl.models.ema import ema_update_, momentum_copy
from fastssl.models.encoders import Encoder
from fastssl.validation import Decay, Rows, Temperature, Width
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class MSVQConfig(MomentumConfig):
    """Options of MSVQ, with the defaults for CIFAR-10. `momentum` is that of the first teacher."""

    name: ClassVar[str] = "msvq"
    paper: ClassVar[str] = "arXiv 2305.05370"
    shardable: ClassVar[bool] = True

    temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    """Temperature of the teachers' softmax over their queue."""
    queue_size: Rows = 4096
    momentum: Decay = 0.99
    second_momentum: Decay = 0.95
    """Share of the second teacher that survives a step."""
    hidden_dim: Width | None = 2048


@register_method
class MSVQ(MomentumMethod):
    """ReSSL's loss with two teachers of different momentum, a queue for each, and four views.

    View 0 is the student's strong view, views 1 and 2 are weak views of the first teacher and view 3 is one of the
    second: (ce(z2, Q1) + ce(z3, Q1) + ce(z4, Q2)) / 3. z2 enters Q1, z4 enters Q2, z3 neither. The official queues hold
    raw projections and normalize them when read; ours hold unit rows, which is equivalent.
    """

    Config: ClassVar[type[MethodConfig]] = MSVQConfig
    config: MSVQConfig
    number_of_views = 4

    def __init__(
        self,
        encoder: Encoder,
        config: MSVQConfig,
        views: tuple[ViewSpec, ...],
        bank_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(encoder, config, views, bank_dtype)
        self.second_key_encoder = momentum_copy(self.query_encoder)
        self.second_queue = config.new_queue(bank_dtype)

    def forward(self, batch: Batch) -> MethodOutput:
        config = self.config
        loss = partial(
            self.losses.soft_cross_entropy,
            temperature=config.temperature,
            teacher_temperature=config.teacher_temperature,
        )
        student = self.queries(batch.views[0])
        z2, z3 = self.keys(batch.views[1]), self.keys(batch.views[2])
        z4 = momentum_rows(self.second_key_encoder, batch.views[3], shuffle=config.shuffle)
        first = loss(student, torch.stack([z2, z3]), self.queue.keys)
        second = loss(student, z4, self.second_queue.keys)
        return MethodOutput((2 * first + second) / 3, {}, (batch.labels, z2, z4))

    @torch.no_grad()
    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        labels, z2, z4 = output.updates
        all_labels = gather_rows(labels)
        ema_update_(self.key_encoder, self.query_encoder, self.config.momentum)
        ema_update_(self.second_key_encoder, self.query_encoder, self.config.second_momentum)
        self.queue.enqueue(self.gather_keys(z2), all_labels, progress.step)
        self.second_queue.enqueue(self.gather_keys(z4), all_labels, progress.step)
