"""Merge the splits in a fixed order, then softplus(LSE of negatives + LSE of negated positives)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOWEST, load_tile

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge(
    lse,
    mean,
    shift,
    total,
    weighted,
    split,
    first,
    rows,
    features,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Add one split's (lse, mean) to an accumulator."""
    row = first + tl.arange(0, ROWS)
    start = tl.cast(split, tl.int64) * rows
    part = tl.load(lse + start + row, mask=row < rows, other=LOWEST)
    tile = load_tile(mean + start * features, first, rows, features, features, ROWS, FEATURES, False)
    higher = tl.maximum(shift, part)
    keep = tl.exp2(shift - higher)
    gain = tl.exp2(part - higher)
    return higher, total * keep + gain, weighted * keep[:, None] + tile * gain[:, None]


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, also where 1 + x rounds to 1."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def combine_kernel(
    query,  # [rows, features] contiguous, as is key: unrounded, for the positive pair
    key,
    negative_lse,  # [splits, rows], base 2
    negative_mean,  # [splits, rows, features]
    positive_lse,  # of the negated logits; not read unless LABELLED
    positive_mean,
    largest,  # [splits, rows]; not read unless ACCURACY
    loss,  # [rows]
    gradient,  # [rows, features]
    accuracy,  # [rows]; not written unless ACCURACY
    scale,
    inverse_temperature,
    rows,
    features,
    splits,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    LABELLED: tl.constexpr,
    ACCURACY: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    # Scaled before the product, as in the reads: equal vectors then have equal logits, not almost.
    q = load_tile(query, first, rows, features, features, ROWS, FEATURES, False).to(tl.float32) * scale
    k = load_tile(key, first, rows, features, features, ROWS, FEATURES, False).to(tl.float32)
    own = tl.sum(q * k, 1)

    shift = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    negative = tl.zeros([ROWS, FEATURES], tl.float32)
    top = tl.full([ROWS], LOWEST, tl.float32)
    for split in range(splits):
        shift, total, negative = merge(
            negative_lse, negative_mean, shift, total, negative, split, first, rows, features, ROWS, FEATURES
        )
        if ACCURACY:
            top = tl.maximum(top, tl.load(largest + tl.cast(split, tl.int64) * rows + row, mask=row < rows, other=0.0))
    pairs = shift + tl.log2(total)
    negative = negative / total[:, None]

    # The own key is the first positive; without labels it is the only one.
    shift = -own
    total = tl.full([ROWS], 1.0, tl.float32)
    positive = k
    if LABELLED:
        for split in range(splits):
            shift, total, positive = merge(
                positive_lse,
                positive_mean,
                shift,
                total,
                positive,
                split,
                first,
                rows,
                features,
                ROWS,
                FEATURES,
            )
    pairs = (pairs + shift + tl.log2(total)) * LN2
    positive = positive / total[:, None]

    small = tl.exp(-tl.abs(pairs))
    sigmoid = tl.where(pairs > 0, 1.0, small) / (1.0 + small)
    tl.store(loss + row, tl.maximum(pairs, 0.0) + log1p(small), mask=row < rows)
    column = tl.arange(0, FEATURES)[None, :]
    at = tl.cast(row, tl.int64)[:, None] * features + column
    value = (sigmoid * inverse_temperature)[:, None] * (negative - positive)
    tl.store(gradient + at, value, mask=(row < rows)[:, None] & (column < features))
    if ACCURACY:
        tl.store(accuracy + row, (own >= top).to(tl.float32), mask=row < rows)
