"""After each reading of CO2's loss: merge the splits in a fixed order, then what the row's closed form needs."""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import load_row, store_row
from .tiles import LOWEST, round_to


@triton.jit
def load_splits(base, row, rows, splits, beyond, SPLITS: tl.constexpr):
    """One row's values, one per split."""
    split = tl.arange(0, SPLITS)
    return tl.load(base + tl.cast(split, tl.int64) * rows + row, mask=split < splits, other=beyond)


@triton.jit
def log_sum(parts):
    """The LSE of base-2 logarithms, and each one's share of it, both as logarithms."""
    highest = tl.max(parts, 0)
    rest = tl.log2(tl.sum(tl.exp2(parts - highest), 0))
    return highest + rest, parts - highest - rest


@triton.jit
def log_one_plus(x):
    """log2(1 + 2**x) without overflow."""
    return tl.maximum(x, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(x)))


@triton.jit
def combine_moments_kernel(
    query,  # [rows, features] contiguous, as is key: unrounded, for the positive pair
    key,
    moments,  # [4 or 7, splits, rows], as moment_read_kernel writes them
    loss,  # [rows]
    lse,  # [rows], base 2, less log2(weight_scale); the next three are read by moment_gradient_kernel
    bias,
    tilt,
    pair,  # [rows]: the factor of the key in the gradient; not written unless POSITIVE
    scale,
    inverse_temperature,
    weight_scale,
    rows,
    features,
    splits,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    POSITIVE: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    row = tl.program_id(0)
    size = tl.cast(splits, tl.int64) * rows
    row_lse, share = log_sum(load_splits(moments, row, rows, splits, LOWEST, SPLITS))
    # The tilted softmax is kept relative to the other, for the loss lives in their difference.
    row_tilt, tilted_share = log_sum(share + load_splits(moments + 2 * size, row, rows, splits, 0.0, SPLITS))
    if POSITIVE:
        # The pair's logit is the same from either side: it takes a share of both softmaxes but pulls nowhere.
        own = tl.sum(load_row(query, row, features, FEATURES) * scale * load_row(key, row, features, FEATURES), 0)
        own -= row_lse
        tilted_own = own - row_tilt
        grown = log_one_plus(own)
        tilted_grown = log_one_plus(tilted_own)
        share -= grown
        tilted_share -= tilted_grown
        row_lse += grown
        row_tilt += tilted_grown - grown
    weight = tl.exp2(share)
    tilted = tl.exp2(tilted_share)
    in_query = tl.sum(weight * load_splits(moments + size, row, rows, splits, 0.0, SPLITS), 0)
    in_key = tl.sum(tilted * load_splits(moments + 3 * size, row, rows, splits, 0.0, SPLITS), 0)
    value = in_key - in_query
    if ROUNDED:
        off = tl.sum(weight * load_splits(moments + 4 * size, row, rows, splits, 0.0, SPLITS), 0)
        tilted_off = tl.sum(tilted * load_splits(moments + 5 * size, row, rows, splits, 0.0, SPLITS), 0)
        tilted_pulled_off = tl.sum(tilted * load_splits(moments + 6 * size, row, rows, splits, 0.0, SPLITS), 0)
        value -= tilted_pulled_off + (1.0 - in_key) * tilted_off - off
    if POSITIVE:
        factor = tl.exp2(own - grown) * in_query - tl.exp2(tilted_own - tilted_grown) * in_key
        tl.store(pair + row, 0.5 * inverse_temperature * factor)
    tl.store(loss + row, 0.5 * value)
    tl.store(lse + row, row_lse - tl.log2(weight_scale))
    tl.store(bias + row, 1.0 + in_query)
    tl.store(tilt + row, row_tilt)


@triton.jit
def combine_gradients_kernel(
    query,  # [rows, features] contiguous, as is key
    key,
    partial,  # [splits, rows, features], as moment_gradient_kernel writes them
    pair,  # [rows]; not read unless POSITIVE
    loss,  # [rows], corrected in place
    gradient,  # [rows, features]
    scale,
    inverse_scale,
    rows,
    features,
    splits,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    DTYPE: tl.constexpr,  # of the queue
    POSITIVE: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, FEATURES)[None, :]
    value = tl.zeros([FEATURES], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        at = (tl.cast(split, tl.int64) * rows + row) * features + column
        value += tl.sum(tl.load(partial + at, mask=(split < splits) & (column < features), other=0.0), 0)
    # To first order, the loss of the query itself and not of its rounding.
    q = load_row(query, row, features, FEATURES)
    rounded = round_to(q * scale, DTYPE).to(tl.float32) * inverse_scale
    tl.store(loss + row, tl.load(loss + row) - tl.sum(value * (rounded - q), 0))
    if POSITIVE:
        value += tl.load(pair + row) * load_row(key, row, features, FEATURES)
    store_row(gradient, row, value, features, FEATURES)
