"""Building blocks of the read kernels: masked loads, products, a softmax accumulator and its result."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(-1e30)  # Log of an empty sum: finite, so that the difference of two is 0 and not NaN


@triton.jit
def load_tile(base, first, count, stride, features, ROWS: tl.constexpr, FEATURES: tl.constexpr, FULL: tl.constexpr):
    """Load [ROWS, FEATURES] of a row-major matrix from row `first`; zero beyond its edges."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, FEATURES)[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + row * stride + column
    if FULL:
        return tl.load(pointers)
    return tl.load(pointers, mask=(row < count - first) & (column < features), other=0.0)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to the nearest value of `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:  # The interpreter truncates, a bias of 0.3 %
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def rounded_weights(x, dtype: tl.constexpr):
    """Weights rounded to `dtype`, and the rounded weights in float32; NaN may become zero."""
    if dtype == tl.bfloat16:
        # With integers, ties away from zero: a conversion back is scalar, at a quarter of the speed
        near = ((x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return near.to(dtype), near
    rounded = round_to(x, dtype)
    return rounded, rounded.to(tl.float32)


@triton.jit
def load_scaled_query(
    query, first, rows, features, scale, dtype: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr
):
    """Load queries, scaled by log2(e) / temperature in float32 and rounded once, to `dtype`."""
    tile = load_tile(query, first, rows, features, features, ROWS, FEATURES, False)
    return round_to(tile.to(tl.float32) * scale, dtype)


@triton.jit
def load_stacked_rows(
    query,  # [boundary, features] contiguous
    teacher,  # [rows - boundary, features] contiguous
    boundary,
    scale,
    teacher_scale,
    first,
    rows,
    features,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Like `load_scaled_query`, but rows from `boundary` on are the teacher's, with `teacher_scale`."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, FEATURES)[None, :]
    of_query = query + tl.cast(row, tl.int64) * features + column
    of_teacher = teacher + tl.cast(row - boundary, tl.int64) * features + column
    own = tl.load(of_query, mask=(row < boundary) & (column < features), other=0.0).to(tl.float32)
    other = tl.load(of_teacher, mask=(row >= boundary) & (row < rows) & (column < features), other=0.0).to(tl.float32)
    return round_to(own * scale + other * teacher_scale, dtype)


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr):
    """a @ b + sum in float32."""
    if INTERPRETED:  # The interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def absorb(
    logits,
    tile,
    shift,
    total,
    rounded,
    weighted,
    ONLINE: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile's 2**logit to `total` and its 2**logit * entry to `weighted`, both relative to 2**shift.

    `rounded` sums the weights as rounded for the product, so that weighted / rounded is a true mean; the LSE needs
    the exact `total`.
    """
    if ONLINE:
        higher = tl.maximum(shift, tl.max(logits, 1))
        keep = tl.exp2(shift - higher)
        total *= keep
        rounded *= keep
        weighted *= keep[:, None]
        shift = higher
        logits -= higher[:, None]
    weights = tl.exp2(logits)
    total += tl.sum(weights, 1)
    weights, seen = rounded_weights(weights, tile.dtype)
    rounded = rounded + tl.sum(seen, 1) if ROUNDED else total
    return shift, total, rounded, dot(weights, tile, weighted, PRECISION)


@triton.jit
def store_partial(
    lse,
    mean,
    split,
    first,
    rows,
    features,
    shift,
    total,
    rounded,
    weighted,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Write one accumulator to lse [splits, rows] and mean [splits, rows, features]."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, FEATURES)[None, :]
    at = tl.cast(split, tl.int64) * rows + row
    filled = total != 0  # True for NaN
    tl.store(lse + at, tl.where(filled, shift + tl.log2(tl.where(filled, total, 1.0)), LOWEST), mask=row < rows)
    value = weighted / tl.where(filled, rounded, 1.0)[:, None]
    value = tl.where((total == total)[:, None], value, total[:, None])  # NaN that `rounded_weights` lost
    tl.store(mean + at[:, None] * features + column, value, mask=(row < rows)[:, None] & (column < features))
