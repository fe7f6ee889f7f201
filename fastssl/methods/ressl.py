"""ReSSL (Zheng et al., arXiv 2107.09282): relations to the queue instead of positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastssl.methods.base import MethodConfig, MethodOutput, register_method
from fastssl.methods.queue_method import MomentumConfig, MomentumMethod
from fastssl.validation import Dim, Rows, Temperature, Width
from fastssl_pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class ReSSLConfig(MomentumConfig):
    """Options of ReSSL, with the defaults for ImageNet."""

    name: ClassVar[str] = "ressl"
    paper: ClassVar[str] = "arXiv 2107.09282"
    shardable: ClassVar[bool] = True

    temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    """Temperature of the teacher's softmax over the queue; below the student's, so that it is sharper."""
    dim: Dim = 512
    queue_size: Rows = 131072
    hidden_dim: Width | None = 4096


@register_method
class ReSSL(MomentumMethod):
    """Cross-entropy between the teacher's and the student's softmax over a queue of teacher rows; no positive pair.

    View 0 is the student's strong view, view 1 the teacher's weak view.
    """

    Config: ClassVar[type[MethodConfig]] = ReSSLConfig
    config: ReSSLConfig

    def forward(self, batch: Batch) -> MethodOutput:
        strong, weak = batch.views
        teacher = self.keys(weak)
        loss = self.losses.soft_cross_entropy(
            self.queries(strong),
            teacher,
            self.queue.keys,
            temperature=self.config.temperature,
            teacher_temperature=self.config.teacher_temperature,
        )
        return MethodOutput(loss, {}, (batch.labels, teacher))
