"""One `torch.library` op per loss, derived from its implementation; its fake and its autograd formula.

The op of a loss returns the gradient together with the loss; backward scales it by the upstream gradient, row by
row. Backward reads a bank again only if the bank gets a gradient too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import GenericAlias, ModuleType
from typing import Any

import torch
from torch import Tensor

from .autograd import keep_gradient, once, scale_gradient
from .backend import resolve
from .blockwise import losses as blockwise
from .contract import check_index_values, check_label_values, check_unit_rows
from .rows import accumulation_dtype

_LossRows = tuple[Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], accuracy [N] or empty
_BankRows = tuple[Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], LSE [N]
_BatchRows = tuple[Tensor, Tensor, Tensor, Tensor]  # loss [N], gradient [N, C], LSE [N], 1 / positives [N]

_Call = Callable[[], object]
_watch: tuple[_Call, _Call] | None = None


@contextmanager
def watch_losses(before: _Call, after: _Call) -> Iterator[None]:
    """Call `before` and `after` around every op that runs inside the `with` block, in compiled code too; for timing."""
    global _watch
    previous, _watch = _watch, (before, after)
    try:
        yield
    finally:
        _watch = previous


def _op(
    function: Callable[..., Any],
    *,
    unit: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    indices: Mapping[str, str] = {},
) -> Any:
    """`function` as op fastssl::<its name>: with autocast disabled, on the device of its first argument, a tensor.

    Tensors arrive contiguous, whatever the caller's layout. Checked first: `unit` rows (in debug mode), `labels`,
    and `indices`, each with the argument that it indexes.
    """
    names = list(inspect.signature(function).parameters)

    def check(named: dict[str, Any]) -> None:
        check_unit_rows(**{name: named[name] for name in unit})
        check_label_values(**{name: named[name] for name in labels})
        for name, bank in indices.items():
            check_index_values(bank, named[bank], **{name: named[name]})

    @functools.wraps(function)
    def guarded(*given: Any) -> Any:
        before, after = _watch or (None, None)
        if before:
            before()
        # Triton launches on the current device, wherever the tensors are
        with torch.autocast(given[0].device.type, enabled=False), torch.cuda.device_of(given[0]):
            given = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in given)
            check(dict(zip(names, given, strict=True)))
            result = function(*given)
        if after:
            after()
        return result

    return torch.library.custom_op(f"fastssl::{function.__name__}", guarded, mutates_args=())


def _dispatch(implementation: Callable[..., Any], *banks: str) -> Callable[..., Any]:
    """`implementation` with one more argument, the backend; `banks` are the arguments whose dtype and width decide.

    `implementation` is that of `blockwise`; `triton.losses` has one of the same name and signature.
    """
    signature = inspect.signature(implementation, eval_str=True)
    at = [list(signature.parameters).index(name) for name in banks]

    def run(*given: Any) -> Any:
        *arguments, backend = given
        module = _implementation(backend, *(arguments[i] for i in at))
        return getattr(module, implementation.__name__)(*arguments)

    returned = signature.return_annotation
    if fields := getattr(returned, "_fields", None):  # An op returns a plain tuple for a named one
        returned = GenericAlias(tuple, (Tensor,) * len(fields))
    backend = inspect.Parameter("backend", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
    run.__name__ = implementation.__name__.removesuffix("_rows")
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*signature.parameters.values(), backend], return_annotation=returned
    )
    return run


def _implementation(backend: str, *banks: Tensor) -> ModuleType:
    if resolve(backend, *banks) == "triton":
        from .triton import losses  # Triton exists on Linux only

        return losses
    return blockwise


def _row_loss(implementation: Callable[..., Any], *banks: str, **checked: Any) -> Any:
    """An op that returns `_LossRows` and whose first argument alone gets a gradient."""
    op = _op(_dispatch(implementation, *banks), **checked)
    names = list(inspect.signature(implementation).parameters)

    def fake(*given: Any) -> _LossRows:
        query, accuracy = given[0], dict(zip(names, given, strict=False)).get("return_accuracy", False)
        return (
            *_fake_loss_and_gradient(query),
            query.new_empty(len(query) if accuracy else 0, dtype=torch.float32),
        )

    op.register_fake(fake)
    op.register_autograd(scale_gradient, setup_context=keep_gradient)
    return op


_PAIR = ("query", "key", "queue")
_LABELS = ("query_labels", "queue_labels")

info_nce = _row_loss(blockwise.info_nce_rows, "queue", unit=_PAIR)
unicon = _row_loss(blockwise.unicon_rows, "queue", unit=_PAIR, labels=_LABELS)
sup_con = _row_loss(blockwise.sup_con_rows, "queue", unit=_PAIR, labels=_LABELS)
soft_cross_entropy = _row_loss(blockwise.soft_cross_entropy_rows, "queue", unit=("query", "teacher", "queue"))
consistency = _row_loss(blockwise.consistency_rows, "queue", unit=_PAIR)
mixco = _row_loss(
    blockwise.mixco_rows, "keys", "queue", unit=("query", "keys", "queue"), indices={"first": "keys", "second": "keys"}
)
unmix = _row_loss(blockwise.unmix_rows, "queue", unit=("query", "first_key", "second_key", "queue"))
mean_shift = _row_loss(blockwise.mean_shift_rows, "queue", unit=_PAIR)

bank_cross_entropy = _op(
    _dispatch(blockwise.bank_cross_entropy_rows, "bank"), unit=("prediction", "bank"), indices={"target": "bank"}
)
bank_gradient = _op(_dispatch(blockwise.bank_gradient, "bank"))
queue_read = _op(_dispatch(blockwise.queue_read, "bank"), unit=("query", "bank"))
queue_read_gradient = _op(_dispatch(blockwise.queue_read_gradient, "bank"))
nearest = _op(_dispatch(blockwise.nearest, "bank"))


@functools.partial(_op, unit=("rows",), labels=("labels",))
def nt_xent(rows: Tensor, labels: Tensor, temperature: float, backend: str) -> _BatchRows:
    if not labels.is_cpu:
        rows = rows.masked_fill((labels < -1)[:, None], torch.nan)  # Reaches every row
    return _implementation(backend, rows).nt_xent_rows(rows, _classes(labels), temperature)


def _classes(labels: Tensor) -> Tensor:
    """Labels [2N] of both views; the two views of an unlabeled image form a separate class, below -1."""
    own = torch.arange(len(labels), device=labels.device) % (len(labels) // 2)
    return torch.where(labels == -1, -2 - own, labels)


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
    # A constant bank is not kept, so it may be overwritten before backward
    ctx.save_for_backward(prediction, gradient, *((bank, target, lse) if ctx.needs_input_grad[1] else ()))


def _both_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 5
    prediction, gradient, *kept = ctx.saved_tensors
    of_prediction = once((upstream[:, None] * gradient).to(prediction.dtype), prediction)
    if not kept:
        return of_prediction, None, None, None, None
    bank, target, lse = kept
    own, label_weight = torch.arange(len(bank), device=bank.device), torch.full_like(lse, 1 / len(target))
    of_bank = bank_gradient(
        prediction, bank, target, own, lse, label_weight, upstream, ctx.temperature, False, ctx.backend
    )
    return of_prediction, once(of_bank.to(bank.dtype), bank), None, None, None


def _keep_batch(ctx: Any, inputs: tuple[Any, ...], output: _BatchRows) -> None:
    rows, labels, ctx.temperature, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, labels, *output[1:])


def _batch_gradient(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 4
    rows, labels, gradient, lse, label_weight = ctx.saved_tensors
    labels = _classes(labels)
    as_bank = bank_gradient(
        rows, rows, labels[None], labels, lse, label_weight, upstream, ctx.temperature, True, ctx.backend
    )
    return once((upstream[:, None] * gradient + as_bank).to(rows.dtype), rows), None, None, None


def _keep_query(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, bank, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(query, bank)


def _read_gradient(ctx: Any, lse: Tensor, mean: Tensor) -> tuple[Tensor | None, ...]:
    query, bank = ctx.saved_tensors
    gradient = queue_read_gradient(query, bank, lse, mean, ctx.temperature, ctx.backend)
    return once(gradient.to(query.dtype), query), None, None, None


bank_cross_entropy.register_autograd(_both_gradients, setup_context=_keep_bank)
nt_xent.register_autograd(_batch_gradient, setup_context=_keep_batch)
queue_read.register_autograd(_read_gradient, setup_context=_keep_query)
