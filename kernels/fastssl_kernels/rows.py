"""Rows of a loss: the dtype they are computed in, what an implementation returns, and their reduction."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .contract import check_reduction

LOG2_E = math.log2(math.e)  # Converts natural logits to base 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of logits, sums, loss and gradient rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exp_is_safe(temperature: float, entries: int) -> bool:
    """Whether a sum of `entries` terms exp(logit) of unit rows can neither overflow nor vanish in float32.

    Logits lie within 1 / temperature of 0. The margin, 0.7 in the exponent, covers rows whose norm was rounded away
    from 1.
    """
    return 1 / temperature + math.log(entries + 1) < math.floor(math.log(torch.finfo(torch.float32).max))


class Rows(NamedTuple):
    """What a fast implementation of a loss returns; backward only scales the gradient."""

    loss: Tensor
    """[N]"""
    gradient: Tensor
    """[N, C]: of each row's loss with respect to its query."""
    accuracy: Tensor
    """[N] float32: 1 where the own key has the largest logit; empty unless requested."""


class QueueRead(NamedTuple):
    """What `queue_read` returns."""

    lse: Tensor
    """[N]: logsumexp of the logits."""
    mean: Tensor
    """[N, C]: mean of the bank's rows, weighted by the softmax of the logits."""


def float_rows(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` in the accumulation dtype of `like`."""
    return rows.to(accumulation_dtype(like.dtype))


@overload
def reduce_rows(loss: Tensor, reduction: str) -> Tensor: ...


@overload
def reduce_rows(loss: Tensor, reduction: str, accuracy: Tensor | None) -> Tensor | tuple[Tensor, Tensor]: ...


def reduce_rows(loss: Tensor, reduction: str, accuracy: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Reduce rows of loss, and of accuracy if there is one."""
    check_reduction(reduction)
    if reduction == "mean":
        loss = loss.mean()
        accuracy = None if accuracy is None else accuracy.mean()
    return loss if accuracy is None else (loss, accuracy.detach())


def stack_teachers(teacher: Tensor) -> Tensor:
    """[T, N, C], with T = 1 for one teacher's [N, C]."""
    return teacher if teacher.ndim == 3 else teacher[None]


def stack_targets(target: Tensor) -> Tensor:
    """[T, N], with T = 1 for one target's [N]."""
    return target if target.ndim == 2 else target[None]


def wrong_labels(labels: Tensor, bank_labels: Tensor) -> Tensor:
    """bool [N]: rows whose loss is NaN because their label, or any of the bank's, is below -1."""
    return (labels < -1) | (bank_labels < -1).any()


def two_rows(rows: Tensor) -> Tensor:
    """`rows`, a single one twice: a matrix-vector product may round equal entries differently."""
    return torch.cat([rows, rows]) if len(rows) == 1 else rows


def row_weights(query: Tensor, weight: float | Tensor) -> Tensor:
    """Expand a number or a tensor of weights to [N] on the query's device."""
    dtype = accumulation_dtype(query.dtype)
    if isinstance(weight, Tensor):
        return weight.to(dtype).expand(len(query))
    return torch.full((len(query),), float(weight), dtype=dtype, device=query.device)
