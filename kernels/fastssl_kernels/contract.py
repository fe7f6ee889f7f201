"""What the losses accept; every error says what was given and what is allowed."""

from __future__ import annotations

import os
from numbers import Integral, Real

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "none")
TEMPERATURES = (1e-3, 1e3)  # Loss and gradient are finite within, in every dtype and on every backend
_UNIT_TOLERANCE = 1e-2  # More than rounding a unit row to bfloat16 changes its norm


def check_rows(gradient: tuple[str, ...] = (), /, **matrices: Tensor) -> None:
    """Require non-empty floating-point matrices on one device, with as many columns as the first.

    Only the first and those that `gradient` names may require grad.
    """
    for name, given in matrices.items():
        check_tensor(name, given)
    lead, *others = matrices
    rows = matrices[lead]
    _check_matrix(lead, rows, lead, rows)
    for name in others:
        other = matrices[name]
        _check_matrix(name, other, lead, rows)
        if other.shape[1] != rows.shape[1]:
            raise ValueError(
                f"{name} has shape {list(other.shape)}; it must be [K, {rows.shape[1]}], one vector per row, "
                f"for a {lead} of shape {list(rows.shape)}"
            )
        if other.requires_grad and name not in gradient:
            raise ValueError(f"{name} requires grad, but only {lead} gets a gradient; pass {name}.detach()")


def check_pairs(query: Tensor, queue: Tensor, **keys: Tensor) -> None:
    """Require one key per query in each of `keys`, and a queue."""
    check_rows(query=query)
    for name, rows in keys.items():
        check_tensor(name, rows)
        if rows.shape != query.shape:
            raise ValueError(f"{name} has shape {list(rows.shape)}; it must have the query's, {list(query.shape)}")
    check_rows(query=query, **keys, queue=queue)


def check_teacher(query: Tensor, teacher: Tensor, queue: Tensor) -> None:
    """Require one teacher row per query, [N, C], or T of them, [T, N, C]."""
    check_tensor("query", query)
    check_tensor("teacher", teacher)
    if teacher.ndim != 3:
        check_pairs(query, queue, teacher=teacher)
        return
    if len(teacher) == 0 or teacher.shape[1:] != query.shape:
        raise ValueError(
            f"teacher has shape {list(teacher.shape)}; for a query of shape {list(query.shape)} "
            "it must have the same or, with T teachers, one more dimension in front"
        )
    check_rows(query=query, teacher=teacher.flatten(0, 1), queue=queue)


def check_targets(prediction: Tensor, bank: Tensor, target: Tensor) -> None:
    """Require targets [N] or, with T targets per row, [T, N]: int64 indices into the bank."""
    check_rows(("bank",), prediction=prediction, bank=bank)
    _check_integers("target", target, prediction)
    if target.ndim not in (1, 2) or target.numel() == 0 or target.shape[-1] != len(prediction):
        raise ValueError(
            f"target has shape {list(target.shape)}; it must be [{len(prediction)}] or [T, {len(prediction)}], "
            "one entry per row and target"
        )


def check_views(first: Tensor, second: Tensor, labels: Tensor | None) -> None:
    """Require two matrices of one shape and dtype, and one int64 label per row, or None."""
    check_tensor("first", first)
    check_tensor("second", second)
    if second.shape != first.shape or second.dtype != first.dtype:
        raise ValueError(
            f"second has shape {list(second.shape)} and dtype {second.dtype}; "
            f"it must have those of first, {list(first.shape)} and {first.dtype}"
        )
    check_rows(("second",), first=first, second=second)
    if labels is not None:
        _check_row_labels("labels", labels, first)


def check_labels(query: Tensor, queue: Tensor, query_labels: Tensor, queue_labels: Tensor) -> None:
    """Require one int64 label per row, on the rows' device."""
    _check_row_labels("query_labels", query_labels, query)
    _check_row_labels("queue_labels", queue_labels, queue)


def check_index(query: Tensor, **index: Tensor) -> None:
    """Require one int64 index per query."""
    for name, values in index.items():
        _check_integers(name, values, query)
        if values.shape != query.shape[:1]:
            raise ValueError(f"{name} has shape {list(values.shape)}; it must be [{len(query)}], one per query")


def check_label_values(**labels: Tensor) -> None:
    """Refuse labels below -1 on a CPU; elsewhere checking would wait for the device."""
    for name, values in labels.items():
        if _host_may_read(values) and (lowest := values.amin().item()) < -1:
            raise ValueError(f"{name} holds {lowest}; a label is -1 (unknown) or the index of a class, from 0 on")


def check_index_values(bank: str, rows: Tensor, **index: Tensor) -> None:
    """Refuse indices outside `rows`, called `bank`, on a CPU; elsewhere checking would wait for the device."""
    for name, values in index.items():
        if not _host_may_read(values):
            continue
        lowest, highest = (x.item() for x in values.aminmax())
        if lowest < 0 or highest >= len(rows):
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"{name} holds {wrong}; it must hold indices into {bank}, from 0 to {len(rows) - 1}")


def check_weight(query: Tensor, weight: float | Tensor) -> None:
    """Require a number in [0, 1], or a tensor of one or N of them that gets no gradient."""
    if not isinstance(weight, Tensor):
        _check_share("weight", weight)
        return
    check_tensor("weight", weight)
    _check_floating("weight", weight)
    if weight.shape not in (torch.Size([]), query.shape[:1]):
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [] or [{len(query)}], one per query")
    if weight.device != query.device:
        raise ValueError(f"weight is on {weight.device} and query on {query.device}; move them to one device")
    if weight.requires_grad:
        raise ValueError("weight requires grad, but only query gets a gradient; pass weight.detach()")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Require a number within `TEMPERATURES`."""
    if isinstance(temperature, Tensor):
        raise TypeError(f"{name} is a tensor; it must be a number, because it gets no gradient")
    _check_number(name, temperature)
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise ValueError(f"{name} is {temperature}; it must lie between {lowest:g} and {highest:g}")


def check_momentum(features: Tensor, momentum: float | Tensor) -> None:
    """Require a number in [0, 1], or a tensor of one; its value is not checked, which would wait for the device."""
    if not isinstance(momentum, Tensor):
        _check_share("momentum", momentum)
        return
    check_tensor("momentum", momentum)
    _check_floating("momentum", momentum)
    if momentum.ndim:
        raise ValueError(f"momentum has shape {list(momentum.shape)}; it must be a number or a tensor of one, []")
    if momentum.device not in (features.device, torch.device("cpu")):
        raise ValueError(f"momentum is on {momentum.device} and features on {features.device}; move it there")
    if momentum.requires_grad:
        raise ValueError("momentum requires grad, but only features gets a gradient; pass momentum.detach()")


def check_neighbors(queue: Tensor, k: int) -> None:
    """Require a whole number between 1 and the entries of the queue."""
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k is of type {type(k).__name__}; it must be a whole number")
    if not 1 <= k <= len(queue):
        raise ValueError(f"k is {k}; it must lie between 1 and the queue's {len(queue)} entries")


def check_switch(**switches: bool) -> None:
    """Require True or False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be True or False")


def check_reduction(reduction: str) -> None:
    """Require a known reduction."""
    if not isinstance(reduction, str):
        raise TypeError(f'reduction is of type {type(reduction).__name__}; it must be "mean" or "none"')
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction is "{reduction}"; it must be "mean" or "none"')


def check_tensor(name: str, value: Tensor) -> None:
    """Require a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a torch.Tensor")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor; it must be dense, with rows of one length")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; it must be dense, pass {name}.to_dense()")


def check_unit_rows(**matrices: Tensor) -> None:
    """Refuse rows that are not L2-normalized in debug mode (FASTSSL_DEBUG=1), which waits for the device."""
    if os.environ.get("FASTSSL_DEBUG") != "1":
        return
    for name, rows in matrices.items():
        error = (torch.linalg.vector_norm(rows.float(), dim=-1) - 1).abs().max().item()
        if not error < _UNIT_TOLERANCE:
            raise ValueError(f"{name} has a row whose norm is off 1 by {error:.3g}; use F.normalize(rows, dim=1)")


def _check_share(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1]")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a real number")


def _check_floating(name: str, values: Tensor) -> None:
    if values.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {values.dtype}; allowed are float64, float32, bfloat16 and float16")


def _host_may_read(values: Tensor) -> bool:
    return values.is_cpu and not torch.compiler.is_compiling()


def _check_matrix(name: str, rows: Tensor, lead: str, like: Tensor) -> None:
    _check_floating(name, rows)
    if (rows.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(f"{name} has dtype {rows.dtype} and {lead} {like.dtype}; float64 does not mix, convert all")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{name} has shape {list(rows.shape)}; it must be a non-empty matrix with one vector per row")
    if rows.device != like.device:
        raise ValueError(f"{name} is on {rows.device} and {lead} on {like.device}; move them to one device")


def _check_integers(name: str, values: Tensor, rows: Tensor) -> None:
    check_tensor(name, values)
    if values.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {values.dtype}; it must be int64")
    if values.device != rows.device:
        raise ValueError(f"{name} is on {values.device} and its rows on {rows.device}; move them to one device")


def _check_row_labels(name: str, labels: Tensor, rows: Tensor) -> None:
    _check_integers(name, labels, rows)
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"{name} has shape {list(labels.shape)}; it must be [{len(rows)}], one per row")
