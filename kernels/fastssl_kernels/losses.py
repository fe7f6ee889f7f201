"""The public losses: checks, choice of backend, and one custom op per loss that returns its gradient too."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import requested, resolve
from .checks import check_labels, check_options, check_rows, check_unit_rows
from .numerics import accumulation_dtype

_RowTensors = tuple[Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], accuracy [N] or empty


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrastive loss of each query's own key against a queue of negatives (MoCo, arXiv 1911.05722).

    Row loss: log(exp(q.k / t) + sum over the queue of exp(q.m / t)) - q.k / t.

    `query`, `key`: [N, C]. `queue`: [K, C]. Rows are L2-normalised; dtypes float32, bfloat16 or float16 in
    any mixture, or all float64. Products with the queue take both operands in the queue's dtype (blockwise:
    in float32) and accumulate in float32; the positive pair is multiplied in float32. Autocast changes
    nothing. Only `query` gets a gradient. It is computed in the forward pass, so the queue may be overwritten
    before backward.

    Returns float32 (float64 for float64): a scalar for reduction "mean", [N] for "none". With
    `return_accuracy`, (loss, accuracy): the share of rows, or per row 0 or 1, in which no queue entry is
    nearer than the own key; a tie within rounding may go either way.

    Raises TypeError or ValueError for inputs outside this contract; with FASTSSL_DEBUG=1 also for rows that
    are not unit vectors.
    """
    backend = requested()
    if backend == "reference":
        return reference.info_nce(
            query, key, queue, temperature=temperature, reduction=reduction, return_accuracy=return_accuracy
        )
    check_rows(query, key, queue)
    check_options(temperature, reduction)
    loss, _, accuracy = _info_nce(query, key, queue, float(temperature), return_accuracy, backend)
    return reference.reduce_rows(loss, accuracy, reduction, return_accuracy)


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
    """Contrastive loss with queue entries of the query's class as positives too (UniMoCo, arXiv 2103.10773).

    Row loss: log(1 + sum over negatives of exp(q.m / t) * sum over positives of exp(-q.m / t)).

    `query_labels`: int64 [N]. `queue_labels`: int64 [K]. -1 is unknown. A queue entry is positive where its
    label is known and equals the query's, else negative, so for an unlabelled query this is `info_nce`. A row
    without negatives has loss 0. All else as in `info_nce`; accuracy is that of the own key, as in MoCo.
    """
    backend = requested()
    if backend == "reference":
        return reference.unicon(
            query,
            key,
            queue,
            query_labels=query_labels,
            queue_labels=queue_labels,
            temperature=temperature,
            reduction=reduction,
            return_accuracy=return_accuracy,
        )
    check_rows(query, key, queue)
    check_labels(query, queue, query_labels, queue_labels)
    check_options(temperature, reduction)
    loss, _, accuracy = _unicon(
        query, key, queue, query_labels, queue_labels, float(temperature), return_accuracy, backend
    )
    return reference.reduce_rows(loss, accuracy, reduction, return_accuracy)


@torch.library.custom_op("fastssl::info_nce", mutates_args=())
def _info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_unit_rows(query, key, queue)
    with torch.autocast(query.device.type, enabled=False):
        return _implementation(backend, query, queue).info_nce_rows(query, key, queue, temperature, return_accuracy)


@torch.library.custom_op("fastssl::unicon", mutates_args=())
def _unicon(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_unit_rows(query, key, queue)
    with torch.autocast(query.device.type, enabled=False):
        return _implementation(backend, query, queue).unicon_rows(
            query, key, queue, query_labels, queue_labels, temperature, return_accuracy
        )


@_info_nce.register_fake
def _(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool, backend: str
) -> _RowTensors:
    return _fake_rows(query, return_accuracy)


@_unicon.register_fake
def _(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
    backend: str,
) -> _RowTensors:
    return _fake_rows(query, return_accuracy)


def _implementation(backend: str, query: Tensor, queue: Tensor) -> ModuleType:
    if resolve(backend, query, queue) == "triton":
        from .triton import launch  # Triton exists on Linux only

        return launch
    from . import blockwise

    return blockwise


def _fake_rows(query: Tensor, return_accuracy: bool) -> _RowTensors:
    rows, features = query.shape
    dtype = accumulation_dtype(query.dtype)
    return (
        query.new_empty(rows, dtype=dtype),
        query.new_empty((rows, features), dtype=dtype),
        query.new_empty(rows if return_accuracy else 0, dtype=torch.float32),
    )


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: _RowTensors) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])
    ctx.constants = len(inputs) - 1


def _scale_gradient(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    constants = (None,) * ctx.constants
    if upstream is None:
        return None, *constants
    query, gradient = ctx.saved_tensors
    return _OnceDifferentiable.apply((upstream[:, None] * gradient).to(query.dtype), query), *constants


class _OnceDifferentiable(torch.autograd.Function):
    """Ties the gradient to the query: a second derivative raises, where it would silently lack a term."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, query: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError('the fused losses have no second derivative; use_backend("reference") has')


for _op in (_info_nce, _unicon):
    _op.register_autograd(_scale_gradient, setup_context=_keep_gradient)
