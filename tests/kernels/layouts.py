"""The layouts in which a caller may hand a tensor over: equal values, other strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def column_major(x: Tensor) -> Tensor:
    """The first axis has the smallest stride."""
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def sliced(x: Tensor) -> Tensor:
    """Columns 3 on of a wider tensor; its other columns hold what must not be read."""
    wide = _poisoned(*x.shape[:-1], x.shape[-1] + 5, like=x)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def every_second_row(x: Tensor) -> Tensor:
    """Each row but the last followed by one that must not be read."""
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
    """The first row everywhere, with a stride of 0: not equal to `x`, whose row i it replaces by row 0."""
    return x[:1].expand_as(x)


def coarse(x: Tensor) -> Tensor:
    """`x`, of numbers below 1, in steps of 1/64: float32 has products of such rows exactly.

    Others a matrix product may round differently from column to column (MKL and OpenBLAS do, on AMD), so that equal
    columns need not tie.
    """
    return (64 * x).round() / 64


def lone(x: Tensor) -> Tensor:
    """The first row alone, with a stride that no second row needs."""
    return _poisoned(x.numel() + 99, like=x).as_strided((1, *x.shape[1:]), (7, *_strides(x)[1:])).copy_(x[:1])


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.new_empty(x.shape).stride()


def _poisoned(*shape: int, like: Tensor) -> Tensor:
    """NaN, or numbers that are no label and no row."""
    wrong = torch.nan if like.is_floating_point() else -99
    return torch.full(shape, wrong, dtype=like.dtype, device=like.device)


SAME_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "column_major": column_major,
    "sliced": sliced,
    "every_second_row": every_second_row,
    "every_second_column": every_second_column,
    "padded_rows": padded_rows,
}
