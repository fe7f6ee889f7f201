"""Layouts of a tensor argument: equal values, different strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def column_major(x: Tensor) -> Tensor:
    """The first axis has the smallest stride."""
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def sliced(x: Tensor) -> Tensor:
    """Columns of a wider tensor, from the fourth on; its other columns must not be read."""
    wide = _poisoned(*x.shape[:-1], x.shape[-1] + 5, like=x)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def every_second_row(x: Tensor) -> Tensor:
    """Rows interleaved with rows that must not be read."""
    wide = _poisoned(2 * len(x), *x.shape[1:], like=x)
    wide[::2] = x
    return wide[::2]


def every_second_column(x: Tensor) -> Tensor:
    """Strides of 2 in the last axis."""
    wide = _poisoned(*x.shape[:-1], 2 * x.shape[-1], like=x)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def padded_rows(x: Tensor) -> Tensor:
    """Every row begins 13 elements after the end of the last."""
    padded = x.numel() // max(1, len(x)) + 13
    out = _poisoned(len(x) * padded, like=x).as_strided(x.shape, (padded, *_strides(x)[1:]))
    return out.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first row, repeated with a stride of 0: other values than `x`."""
    return x[:1].expand_as(x)


def coarse(x: Tensor) -> Tensor:
    """`x`, of values below 1, rounded to steps of 1/64: products of such rows are exact in float32.

    Others a matrix product may round differently from column to column (MKL and OpenBLAS do, on AMD), so that equal
    columns need not tie.
    """
    return (64 * x).round() / 64


def lone(x: Tensor) -> Tensor:
    """Only the first row, with an arbitrary row stride."""
    return _poisoned(x.numel() + 99, like=x).as_strided((1, *x.shape[1:]), (7, *_strides(x)[1:])).copy_(x[:1])


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.new_empty(x.shape).stride()


def _poisoned(*shape: int, like: Tensor) -> Tensor:
    """NaN, or integers that are neither labels nor indices."""
    wrong = torch.nan if like.is_floating_point() else -99
    return torch.full(shape, wrong, dtype=like.dtype, device=like.device)


SAME_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "column_major": column_major,
    "sliced": sliced,
    "every_second_row": every_second_row,
    "every_second_column": every_second_column,
    "padded_rows": padded_rows,
}
