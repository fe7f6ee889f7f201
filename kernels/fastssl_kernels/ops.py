"""One `torch.library` op per loss: the fused implementation, its fake, its autograd formula.

An op of a loss returns the gradient next to the loss; backward scales it by the upstream gradient, row by
row. Only where a bank gets a gradient too does backward read it again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .autograd import keep_gradient, once, scale_gradient
from .backend import resolve
from .contract import check_index_values, check_label_values, check_unit_rows
from .rows import accumulation_dtype

_LossRows = tuple[Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], accuracy [N] or empty
_BankRows = tuple[Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], lse [N]
_BatchRows = tuple[Tensor, Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], lse [N], 1 / positives [N]


_Call = Callable[[], object]
_watch: tuple[_Call, _Call] | None = None


@contextmanager
def watch_losses(before: _Call, after: _Call) -> Iterator[None]:
    """Call `before` and `after` around every op that runs inside the `with` block, in compiled code too; for clocks."""
    global _watch
    previous, _watch = _watch, (before, after)
    try:
        yield
    finally:
        _watch = previous


def _op(function: Callable[..., Any]) -> Any:
    """`function` as op fastssl::<its name>: deaf to autocast, on the device of its first argument, a tensor.

    Its tensors are contiguous, whatever the caller's: an implementation need not know of other layouts.
    """

    @functools.wraps(function)
    def guarded(*given: Any) -> Any:
        before, after = _watch or (None, None)
        if before:
            before()
        # Triton launches on the current device, wherever the tensors are.
        with torch.autocast(given[0].device.type, enabled=False), torch.cuda.device_of(given[0]):
            result = function(*(x.contiguous() if isinstance(x, Tensor) else x for x in given))
        if after:
            after()
        return result

    return torch.library.custom_op(f"fastssl::{function.__name__}", guarded, mutates_args=())


def _row_loss(function: Callable[..., Any]) -> Any:
    """An op that returns `_LossRows` and whose first argument alone gets a gradient."""
    op = _op(function)
    names = list(inspect.signature(function).parameters)

    def fake(*given: Any) -> _LossRows:
        query, accuracy = given[0], dict(zip(names, given, strict=True)).get("return_accuracy", False)
        return (
            *_fake_loss_and_gradient(query),
            query.new_empty(len(query) if accuracy else 0, dtype=torch.float32),
        )

    op.register_fake(fake)
    op.register_autograd(scale_gradient, setup_context=keep_gradient)
    return op


@_row_loss
def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool, backend: str
) -> _LossRows:
    check_unit_rows(query=query, key=key, queue=queue)
    return _implementation(backend, queue).info_nce_rows(query, key, queue, temperature, return_accuracy)


@_row_loss
def unicon(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
    backend: str,
) -> _LossRows:
    check_unit_rows(query=query, key=key, queue=queue)
    check_label_values(query_labels=query_labels, queue_labels=queue_labels)
    return _implementation(backend, queue).unicon_rows(
        query, key, queue, query_labels, queue_labels, temperature, return_accuracy
    )


@_row_loss
def sup_con(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
    backend: str,
) -> _LossRows:
    check_unit_rows(query=query, key=key, queue=queue)
    check_label_values(query_labels=query_labels, queue_labels=queue_labels)
    return _implementation(backend, queue).sup_con_rows(
        query, key, queue, query_labels, queue_labels, temperature, return_accuracy
    )


@_row_loss
def soft_cross_entropy(
    query: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float, backend: str
) -> _LossRows:
    check_unit_rows(query=query, teacher=teacher, queue=queue)
    return _implementation(backend, queue).soft_cross_entropy_rows(
        query, teacher, queue, temperature, teacher_temperature
    )


@_row_loss
def consistency(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, include_positive: bool, backend: str
) -> _LossRows:
    check_unit_rows(query=query, key=key, queue=queue)
    return _implementation(backend, queue).consistency_rows(query, key, queue, temperature, include_positive)


@_row_loss
def mixco(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    temperature: float,
    backend: str,
) -> _LossRows:
    check_unit_rows(query=query, keys=keys, queue=queue)
    check_index_values("keys", keys, first=first, second=second)
    return _implementation(backend, keys, queue).mixco_rows(query, keys, queue, first, second, weight, temperature)


@_row_loss
def unmix(
    query: Tensor,
    first_key: Tensor,
    second_key: Tensor,
    queue: Tensor,
    weight: Tensor,
    temperature: float,
    backend: str,
) -> _LossRows:
    check_unit_rows(query=query, first_key=first_key, second_key=second_key, queue=queue)
    return _implementation(backend, queue).unmix_rows(query, first_key, second_key, queue, weight, temperature)


@_row_loss
def mean_shift(query: Tensor, key: Tensor, queue: Tensor, k: int, backend: str) -> _LossRows:
    check_unit_rows(query=query, key=key, queue=queue)
    return _implementation(backend, queue).mean_shift_rows(query, key, queue, k)


@_op
def bank_cross_entropy(prediction: Tensor, bank: Tensor, target: Tensor, temperature: float, backend: str) -> _BankRows:
    check_unit_rows(prediction=prediction, bank=bank)
    check_index_values("bank", bank, target=target)
    return _implementation(backend, bank).bank_cross_entropy_rows(prediction, bank, target, temperature)


@_op
def nt_xent(rows: Tensor, labels: Tensor, temperature: float, backend: str) -> _BatchRows:
    check_unit_rows(rows=rows)
    check_label_values(labels=labels)
    if not labels.is_cpu:
        rows = rows.masked_fill((labels < -1)[:, None], torch.nan)  # which every row sees
    return _implementation(backend, rows).nt_xent_rows(rows, _classes(labels), temperature)


@_op
def bank_gradient(
    rows: Tensor,
    bank: Tensor,
    row_labels: Tensor,
    bank_labels: Tensor,
    lse: Tensor,
    label_weight: Tensor,
    upstream: Tensor,
    temperature: float,
    skip_own: bool,
    backend: str,
) -> Tensor:
    return _implementation(backend, bank).bank_gradient(
        rows, bank, row_labels, bank_labels, lse, label_weight, upstream, temperature, skip_own
    )


@_op
def queue_read(query: Tensor, bank: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor]:
    check_unit_rows(query=query, bank=bank)
    return _implementation(backend, bank).queue_read(query, bank, temperature)


@_op
def queue_read_gradient(
    query: Tensor, bank: Tensor, lse_upstream: Tensor, mean_upstream: Tensor, temperature: float, backend: str
) -> Tensor:
    return _implementation(backend, bank).queue_read_gradient(query, bank, lse_upstream, mean_upstream, temperature)


@_op
def nearest(rows: Tensor, bank: Tensor, count: int, backend: str) -> Tensor:
    return _implementation(backend, bank).nearest(rows, bank, count)


def _classes(labels: Tensor) -> Tensor:
    """Labels [2N] of both views in which the views of an unlabeled image are a class of their own, below -1."""
    own = torch.arange(len(labels), device=labels.device) % (len(labels) // 2)
    return torch.where(labels == -1, -2 - own, labels)


def _implementation(backend: str, *banks: Tensor) -> ModuleType:
    if resolve(backend, *banks) == "triton":
        from .triton import losses  # Triton exists on Linux only

        return losses
    from .blockwise import losses as blockwise

    return blockwise


def _fake_loss_and_gradient(query: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty(len(query), dtype=dtype), query.new_empty(query.shape, dtype=dtype)


@bank_cross_entropy.register_fake
def _(prediction: Tensor, bank: Tensor, target: Tensor, temperature: float, backend: str) -> _BankRows:
    loss, gradient = _fake_loss_and_gradient(prediction)
    return loss, gradient, torch.empty_like(loss)


@nt_xent.register_fake
def _(rows: Tensor, labels: Tensor, temperature: float, backend: str) -> _BatchRows:
    loss, gradient = _fake_loss_and_gradient(rows)
    return loss, gradient, torch.empty_like(loss), torch.empty_like(loss)


@bank_gradient.register_fake
def _(rows: Tensor, bank: Tensor, *_: Any) -> Tensor:
    return bank.new_empty(bank.shape, dtype=accumulation_dtype(rows.dtype))


@queue_read.register_fake
def _(query: Tensor, bank: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor]:
    return _fake_loss_and_gradient(query)


@queue_read_gradient.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return _fake_loss_and_gradient(query)[1]


@nearest.register_fake
def _(rows: Tensor, bank: Tensor, count: int, backend: str) -> Tensor:
    return rows.new_empty((len(rows), count), dtype=torch.int64)


def _keep_bank(ctx: Any, inputs: tuple[Any, ...], output: _BankRows) -> None:
    prediction, bank, target, ctx.temperature, ctx.backend = inputs
    _, gradient, lse = output
    ctx.mark_non_differentiable(gradient, lse)
    ctx.set_materialize_grads(False)
    # A constant bank is not kept: it may then be overwritten before backward.
    ctx.save_for_backward(prediction, gradient, *((bank, target, lse) if ctx.needs_input_grad[1] else ()))


def _bank_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 5
    prediction, gradient, *kept = ctx.saved_tensors
    of_prediction = once((upstream[:, None] * gradient).to(prediction.dtype), prediction)
    if not kept:
        return of_prediction, None, None, None, None
    bank, target, lse = kept
    own, share = torch.arange(len(bank), device=bank.device), torch.full_like(lse, 1 / len(target))
    of_bank = bank_gradient(prediction, bank, target, own, lse, share, upstream, ctx.temperature, False, ctx.backend)
    return of_prediction, once(of_bank.to(bank.dtype), bank), None, None, None


def _keep_batch(ctx: Any, inputs: tuple[Any, ...], output: _BatchRows) -> None:
    rows, labels, ctx.temperature, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, labels, *output[1:])


def _batch_gradient(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 4
    rows, labels, gradient, lse, share = ctx.saved_tensors
    labels = _classes(labels)
    as_bank = bank_gradient(rows, rows, labels[None], labels, lse, share, upstream, ctx.temperature, True, ctx.backend)
    return once((upstream[:, None] * gradient + as_bank).to(rows.dtype), rows), None, None, None


def _keep_query(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, bank, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(query, bank)


def _read_gradient(ctx: Any, lse: Tensor, mean: Tensor) -> tuple[Tensor | None, ...]:
    query, bank = ctx.saved_tensors
    gradient = queue_read_gradient(query, bank, lse, mean, ctx.temperature, ctx.backend)
    return once(gradient.to(query.dtype), query), None, None, None


bank_cross_entropy.register_autograd(_bank_gradients, setup_context=_keep_bank)
nt_xent.register_autograd(_batch_gradient, setup_context=_keep_batch)
queue_read.register_autograd(_read_gradient, setup_context=_keep_query)
