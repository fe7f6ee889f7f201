"""What every combine kernel is made of: one program a row merges the row's splits in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOWEST

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_row(base, row, features, FEATURES: tl.constexpr):
    """One row of a contiguous matrix in float32; zero beyond its features."""
    column = tl.arange(0, FEATURES)
    return tl.load(base + tl.cast(row, tl.int64) * features + column, mask=column < features, other=0.0).to(tl.float32)


@triton.jit
def store_row(base, row, value, features, FEATURES: tl.constexpr):
    """Write one row of a contiguous matrix."""
    column = tl.arange(0, FEATURES)
    tl.store(base + tl.cast(row, tl.int64) * features + column, value, mask=column < features)


@triton.jit
def merge(
    lse,  # [splits, rows], base 2
    mean,  # [splits, rows, features]
    shift,
    total,
    weighted,
    row,
    rows,
    splits,
    features,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Add one row of all splits to an accumulator: total and weighted are relative to 2**shift."""
    column = tl.arange(0, FEATURES)[None, :]
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        at = tl.cast(split, tl.int64) * rows + row
        part = tl.load(lse + at, mask=split < splits, other=LOWEST)
        inside = (split < splits)[:, None] & (column < features)
        tile = tl.load(mean + at[:, None] * features + column, mask=inside, other=0.0)
        higher = tl.maximum(shift, tl.max(part, 0))
        keep = tl.exp2(shift - higher)
        gain = tl.exp2(part - higher)
        total = total * keep + tl.sum(gain, 0)
        weighted = weighted * keep + tl.sum(gain[:, None] * tile, 0)
        shift = higher
    return shift, total, weighted


@triton.jit
def merge_new(lse, mean, row, rows, splits, features, SPLITS: tl.constexpr, FEATURES: tl.constexpr):
    """LSE (base 2) and mean of one row over all splits."""
    empty = tl.zeros([FEATURES], tl.float32)
    shift = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    shift, total, weighted = merge(lse, mean, shift, total, empty, row, rows, splits, features, SPLITS, FEATURES)
    return shift + tl.log2(total), weighted / total


@triton.jit
def largest_logit(largest, row, rows, splits, SPLITS: tl.constexpr):
    """Of one row over all splits."""
    top = tl.full([], LOWEST, tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        part = tl.load(largest + tl.cast(split, tl.int64) * rows + row, mask=split < splits, other=LOWEST)
        top = tl.maximum(top, tl.max(part, 0))
    return top


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where 1 + exp(-|x|) rounds to 1."""
    small = tl.exp(-tl.abs(x))
    sum = 1.0 + small
    return tl.maximum(x, 0.0) + tl.where(
        sum == 1.0, small, tl.log(sum) * (small / tl.where(sum == 1.0, 1.0, sum - 1.0))
    )


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)
