"""SupCon (Khosla et al., arXiv 2004.11362) with MoCo's queue, as a baseline for UniMoCo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from fastssl.methods.base import register_method
from fastssl.methods.moco import MoCoConfig, MoCoV2
from fastssl_kernels import sup_con


@dataclass(frozen=True, kw_only=True)
class SupConConfig(MoCoConfig):
    """Options of SupCon over the queue."""

    name: ClassVar[str] = "supcon"
    paper: ClassVar[str] = "arXiv 2004.11362"


@register_method
class SupCon(MoCoV2):
    """MoCo v2 with the supervised contrastive loss: the mean over all positives of the queue, outside the logarithm.

    An interpretation: the paper uses a queue only in one ImageNet run, whose settings could not be read. Positives are
    the own key and every queue entry with the query's label; for an unlabeled row the loss is exactly InfoNCE.
    """

    Config = SupConConfig
    uses_labels = True

    def loss(self, query: Tensor, key: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result = sup_con(
            query,
            key,
            self.queue.keys,
            query_labels=labels,
            queue_labels=self.queue.labels,
            temperature=self.config.temperature,
            return_accuracy=True,
        )
        return cast(tuple[Tensor, Tensor], result)
