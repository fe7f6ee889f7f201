"""Two passes over a bank along one direction per row: the moments of a softmax, then the gradient they determine.

x is an entry's logit and d = direction.entry. The first pass computes the softmax of x and its mean of d. TILTED:
the direction leads from the query to the key, so x + d is the key's logit, and the same is taken of its softmax.
The second pass knows both softmaxes: it subtracts two nearly equal weights before it rounds the difference to the
bank's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import LOG2_E
from . import kind
from .tiles import LOWEST, dot, load_tile, round_to

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def load_rows(
    query,
    direction,
    first,
    rows,
    features,
    scale,
    direction_scale,
    dtype: tl.constexpr,
    TILTED: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Load queries and directions, scaled in float32 and rounded once, to `dtype`."""
    x = load_tile(query, first, rows, features, features, ROWS, FEATURES, False).to(tl.float32)
    u = load_tile(direction, first, rows, features, features, ROWS, FEATURES, False).to(tl.float32)
    if TILTED:
        u -= x
    return round_to(x * scale, dtype), round_to(u * direction_scale, dtype)


@triton.jit
def load_products(
    x,
    u,
    bank,
    first,
    entries,
    stride,
    features,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Load a tile of the bank; return it, its logits (base 2, -inf beyond the tail) and its products with `u`."""
    tile = load_tile(bank, first, entries, stride, features, ENTRIES, FEATURES, FULL)
    logits = dot(x, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
    pull = dot(u, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
    if not FULL:
        logits = tl.where(first + tl.arange(0, ENTRIES) < entries, logits, float("-inf"))
    return tile, logits, pull


@triton.jit
def take_weights(logits, shift, ONLINE: tl.constexpr):
    """2**(logit - new shift), the new shift, and the factor that rescales sums relative to the old one."""
    if ONLINE:
        higher = tl.maximum(shift, tl.max(logits, 1))
        return tl.exp2(logits - higher[:, None]), higher, tl.exp2(shift - higher)
    return tl.exp2(logits), shift, tl.full(shift.shape, 1.0, tl.float32)


@triton.jit
def moment_read_kernel(
    query: kind.Floats,  # [rows, features] contiguous, as is direction
    direction: kind.Floats,  # The key if TILTED: the direction is (key - query) / temperature
    bank: kind.Elements,  # [entries, features], last stride 1
    moments: kind.Floats,  # [2; splits, rows]: LSE (base 2), mean of d; 4 if TILTED; 7 if ROUNDED too
    scale: kind.Factor,
    direction_scale: kind.Factor,
    rows: kind.Count,
    entries: kind.Entries,
    features: kind.Multiple,
    bank_stride: kind.Multiple,
    split_length: kind.Multiple,  # Entries per split, a multiple of ENTRIES
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FULL: tl.constexpr,
    ONLINE: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = bank.dtype.element_ty
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    x, u = load_rows(
        query, direction, first_row, rows, features, scale, direction_scale, dtype, TILTED, ROWS, FEATURES
    )  # fmt: skip
    if TILTED and ROUNDED:
        # Rounding error of the tilted logits' row against the key: its effect on the loss is subtracted later
        key = load_tile(direction, first_row, rows, features, features, ROWS, FEATURES, False).to(tl.float32)
        error = round_to(x.to(tl.float32) / _LOG2_E + u.to(tl.float32) - key * direction_scale, dtype)
    shift = tl.full([ROWS], LOWEST if ONLINE else 0.0, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    pulled = tl.zeros([ROWS], tl.float32)
    off = tl.zeros([ROWS], tl.float32)
    tilted_shift = tl.full([ROWS], LOWEST if ONLINE else 0.0, tl.float32)
    tilted_total = tl.zeros([ROWS], tl.float32)
    tilted_pulled = tl.zeros([ROWS], tl.float32)
    tilted_off = tl.zeros([ROWS], tl.float32)
    tilted_pulled_off = tl.zeros([ROWS], tl.float32)
    for first in range(split * split_length, tl.minimum(split * split_length + split_length, entries), ENTRIES):
        tile, logits, pull = load_products(
            x, u, bank, first, entries, bank_stride, features, ROWS, ENTRIES, FEATURES, FULL, PRECISION
        )
        weights, shift, keep = take_weights(logits, shift, ONLINE)
        total = total * keep + tl.sum(weights, 1)
        pulled = pulled * keep + tl.sum(weights * pull, 1)
        if TILTED:
            tilted, tilted_shift, tilted_keep = take_weights(logits + pull * _LOG2_E, tilted_shift, ONLINE)
            tilted_total = tilted_total * tilted_keep + tl.sum(tilted, 1)
            tilted_pulled = tilted_pulled * tilted_keep + tl.sum(tilted * pull, 1)
            if ROUNDED:
                wrong = dot(error, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
                off = off * keep + tl.sum(weights * wrong, 1)
                tilted_off = tilted_off * tilted_keep + tl.sum(tilted * wrong, 1)
                tilted_pulled_off = tilted_pulled_off * tilted_keep + tl.sum(tilted * pull * wrong, 1)
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    size = tl.cast(tl.num_programs(1), tl.int64) * rows
    at = moments + tl.cast(split, tl.int64) * rows + row
    tl.store(at, shift + tl.log2(total), mask=inside)
    tl.store(at + size, pulled / total, mask=inside)
    if TILTED:
        # Not the LSE itself: float32 represents the small difference more precisely than either term
        tl.store(at + 2 * size, tilted_shift - shift + tl.log2(tilted_total / total), mask=inside)
        tl.store(at + 3 * size, tilted_pulled / tilted_total, mask=inside)
        if ROUNDED:
            tl.store(at + 4 * size, off / total, mask=inside)
            tl.store(at + 5 * size, tilted_off / tilted_total, mask=inside)
            tl.store(at + 6 * size, tilted_pulled_off / tilted_total, mask=inside)


@triton.jit
def moment_gradient_kernel(
    query: kind.Floats,  # [rows, features] contiguous, as is direction
    direction: kind.Floats,  # The key if TILTED
    bank: kind.Elements,  # [entries, features], last stride 1
    lse: kind.Floats,  # [rows], base 2: of the whole bank
    bias: kind.Floats,  # [rows]
    tilt: kind.Floats,  # [rows], base 2: the tilted LSE - lse; not read unless TILTED
    gradient: kind.Floats,  # [splits, rows, features]: sum of (softmax * (bias - d) - tilted softmax) * entry
    scale: kind.Factor,
    direction_scale: kind.Factor,
    gradient_scale: kind.Factor,
    rows: kind.Count,
    entries: kind.Entries,
    features: kind.Multiple,
    bank_stride: kind.Multiple,
    split_length: kind.Multiple,  # Entries per split, a multiple of ENTRIES
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FULL: tl.constexpr,
    TILTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = bank.dtype.element_ty
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    x, u = load_rows(
        query, direction, first_row, rows, features, scale, direction_scale, dtype, TILTED, ROWS, FEATURES
    )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    row_lse = tl.load(lse + row, mask=row < rows, other=0.0)[:, None]
    row_bias = tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    if TILTED:
        row_tilt = tl.load(tilt + row, mask=row < rows, other=0.0)[:, None]
    weighted = tl.zeros([ROWS, FEATURES], tl.float32)
    for first in range(split * split_length, tl.minimum(split * split_length + split_length, entries), ENTRIES):
        tile, logits, pull = load_products(
            x, u, bank, first, entries, bank_stride, features, ROWS, ENTRIES, FEATURES, FULL, PRECISION
        )
        logits -= row_lse
        weights = tl.exp2(logits) * (row_bias - pull)
        if TILTED:
            weights -= tl.exp2(logits + (pull * _LOG2_E - row_tilt))
        weighted = dot(round_to(weights, dtype), tile, weighted, PRECISION)
    column = tl.arange(0, FEATURES)[None, :]
    at = (tl.cast(split, tl.int64) * rows + row)[:, None] * features + column
    tl.store(gradient + at, weighted * gradient_scale, mask=(row < rows)[:, None] & (column < features))
