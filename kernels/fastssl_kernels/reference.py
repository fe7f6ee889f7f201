"""Every loss as its paper defines it: the numerical contract of the fast implementations.

Logits are N x K tensors, gradients come from autograd, float64 is computed in float64 and all else in
float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_labels, check_options, check_rows
from .numerics import accumulation_dtype


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the own key (class 0) against the queue; see `fastssl_kernels.info_nce`."""
    check_rows(query, key, queue)
    check_options(temperature, reduction)
    logits = _logits(query, key, queue, temperature)
    own = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return reduce_rows(F.cross_entropy(logits, own, reduction="none"), _accuracy(logits), reduction, return_accuracy)


def unicon(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log(1 + sum over negatives of exp(l) * sum over positives of exp(-l)); see `fastssl_kernels.unicon`."""
    check_rows(query, key, queue)
    check_labels(query, queue, query_labels, queue_labels)
    check_options(temperature, reduction)
    logits = _logits(query, key, queue, temperature)
    same = (query_labels[:, None] == queue_labels) & (query_labels[:, None] != -1)
    positive = torch.cat([torch.ones_like(same[:, :1]), same], dim=1)
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(1)
    positives = (-logits).masked_fill(~positive, -torch.inf).logsumexp(1)
    pairs = negatives + positives
    # logaddexp(x, 0) is softplus(x); F.softplus is cut off at 20, an error of 1e-10 in float64.
    return reduce_rows(torch.logaddexp(pairs, pairs.new_zeros(())), _accuracy(logits), reduction, return_accuracy)


def reduce_rows(
    loss: Tensor, accuracy: Tensor, reduction: str, return_accuracy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Rows of loss and accuracy as the caller asked for them."""
    if reduction == "mean":
        loss = loss.mean()
        accuracy = accuracy.mean() if return_accuracy else accuracy
    return (loss, accuracy.detach()) if return_accuracy else loss


def _logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """[N, 1 + K]: the own key first, then the queue."""
    dtype = accumulation_dtype(query.dtype)
    query, key, queue = query.to(dtype), key.to(dtype), queue.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        return torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature


def _accuracy(logits: Tensor) -> Tensor:
    """1 where no queue entry has a larger logit than the own key."""
    return (logits[:, 1:] <= logits[:, :1]).all(1).float()
