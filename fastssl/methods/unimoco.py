"""UniMoCo (Dai et al., arXiv 2103.10773): one loss for unlabeled, partly labeled and labeled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from fastssl.methods.base import register_method
from fastssl.methods.moco import MoCoConfig, MoCoV2
from fastssl_kernels import unicon


@dataclass(frozen=True, kw_only=True)
class UniMoCoConfig(MoCoConfig):
    """Options of UniMoCo."""

    name: ClassVar[str] = "unimoco"
    paper: ClassVar[str] = "arXiv 2103.10773"


@register_method
class UniMoCo(MoCoV2):
    """MoCo v2 with the UniCon loss over a queue that stores labels.

    Positives of a query are its own key and every queue entry with its label. Label -1 means unknown and matches
    nothing, so for an unlabeled row the loss is exactly InfoNCE. Entries of unknown label are negatives, as in the
    official code.
    """

    Config = UniMoCoConfig
    uses_labels = True
    variants: ClassVar = {"symmetric": {"symmetric": True}}

    def loss(self, query: Tensor, key: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result = unicon(
            query,
            key,
            self.queue.keys,
            query_labels=labels,
            queue_labels=self.queue.labels,
            temperature=self.config.temperature,
            return_accuracy=True,
        )
        return cast(tuple[Tensor, Tensor], result)
