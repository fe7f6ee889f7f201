"""Merge the splits of a read in a fixed order, one program per row, and apply the closed form of the loss."""

from __future__ import annotations

import triton
import triton.language as tl

from . import kind
from .tiles import LOWEST

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_row(base, row, features, FEATURES: tl.constexpr):
    """Load one row of a contiguous matrix as float32; zero beyond its features."""
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
    """Add one row of all splits to an accumulator; total and weighted are relative to 2**shift."""
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
    """The largest logit of one row over all splits."""
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


@triton.jit
def combine_pairs_kernel(
    query: kind.Floats,  # [rows, features] contiguous, as are the keys: unrounded, for the positive pair
    key: kind.Floats,
    second_key: kind.Floats,  # Not read unless MIXED
    weight: kind.Floats,  # [rows], of the first key; not read unless MIXED
    negative_lse: kind.Floats,  # [splits, rows], base 2
    negative_mean: kind.Floats,  # [splits, rows, features]
    positive_lse: kind.Floats,  # Of the negated logits; not read unless LABELED
    positive_mean: kind.Floats,
    largest: kind.Floats,  # [splits, rows]; not read unless ACCURACY
    loss: kind.Floats,  # [rows]
    gradient: kind.Floats,  # [rows, features]
    accuracy: kind.Floats,  # [rows]; not written unless ACCURACY
    scale: kind.Factor,
    inverse_temperature: kind.Factor,
    rows: kind.Count,
    features: kind.Multiple,
    splits: kind.Count,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    LABELED: tl.constexpr,
    MIXED: tl.constexpr,
    ACCURACY: tl.constexpr,
):
    """Softplus of LSE of negatives + LSE of negated positives: InfoNCE, UniCon, Un-Mix."""
    row = tl.program_id(0)
    # Scaled before the product, as in the reads, so that equal vectors have exactly equal logits
    q = load_row(query, row, features, FEATURES) * scale
    k = load_row(key, row, features, FEATURES)
    own = tl.sum(q * k, 0)
    lse, mean = merge_new(negative_lse, negative_mean, row, rows, splits, features, SPLITS, FEATURES)
    # The own key is the first positive; without labels, the only one
    shift = -own
    total = tl.full([], 1.0, tl.float32)
    positive = k
    if LABELED:
        shift, total, positive = merge(
            positive_lse, positive_mean, shift, total, positive, row, rows, splits, features, SPLITS, FEATURES
        )
    pairs = (lse + shift + tl.log2(total)) * LN2
    value = softplus(pairs)
    slope = sigmoid(pairs) * (mean - positive / total)
    if MIXED:
        w = tl.load(weight + row)
        second = load_row(second_key, row, features, FEATURES)
        pairs = (lse - tl.sum(q * second, 0)) * LN2
        value = w * value + (1.0 - w) * softplus(pairs)
        slope = w * slope + (1.0 - w) * sigmoid(pairs) * (mean - second)
    tl.store(loss + row, value)
    store_row(gradient, row, slope * inverse_temperature, features, FEATURES)
    if ACCURACY:
        top = largest_logit(largest, row, rows, splits, SPLITS)
        tl.store(accuracy + row, ((own >= top) & (value == value)).to(tl.float32))


@triton.jit
def combine_target_kernel(
    query: kind.Floats,  # [rows, features] contiguous, unrounded
    key: kind.Floats,  # [rows, features] contiguous; not read unless OWN
    bank: kind.Elements,  # [*, features] contiguous; TARGET "entries": where the targets lie
    index: kind.Longs,  # [targets, rows] int64, rows of `bank`
    weight: kind.Floats,  # [targets, rows]
    lse: kind.Floats,  # [splits, stacked], base 2; the rows from `rows` on are those of the teachers
    mean: kind.Floats,  # [splits, stacked, features]
    positive_lse: kind.Floats,  # [splits, rows]; TARGET "positives": logarithm of their count
    positive_mean: kind.Floats,
    largest: kind.Floats,  # [splits, rows]; not read unless ACCURACY
    loss: kind.Floats,  # [rows]
    gradient: kind.Floats,  # [rows, features]
    natural_lse: kind.Floats,  # [rows]
    inverse_count: kind.Floats,  # [rows]: 1 / positives; not written unless TARGET is "positives"
    accuracy: kind.Floats,  # [rows]; not written unless ACCURACY
    scale: kind.Factor,
    inverse_temperature: kind.Factor,
    rows: kind.Count,
    bank_rows: kind.Count,
    features: kind.Multiple,
    splits: kind.Count,
    targets: kind.Count,  # Per row: teachers or entries
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    TARGET: tl.constexpr,
    OWN: tl.constexpr,  # The own key is an entry and a positive
    ACCURACY: tl.constexpr,
):
    """LSE - q.target / temperature: SupCon, soft cross-entropy, MixCo, bank cross-entropy."""
    row = tl.program_id(0)
    q = load_row(query, row, features, FEATURES) * scale
    stacked = rows * (1 + targets) if TARGET == "teachers" else rows
    target = tl.zeros([FEATURES], tl.float32)
    inside = True
    if TARGET == "teachers":
        for number in range(targets):
            _, part = merge_new(lse, mean, row + (1 + number) * rows, stacked, splits, features, SPLITS, FEATURES)
            target += part / targets
    if TARGET == "entries":
        for number in range(targets):
            at = tl.cast(number, tl.int64) * rows + row
            entry = tl.load(index + at)
            known = (entry >= 0) & (entry < bank_rows)
            inside = inside & known
            target += tl.load(weight + at) * load_row(bank, tl.where(known, entry, 0), features, FEATURES)
    if TARGET == "positives":
        if OWN:
            target = load_row(key, row, features, FEATURES)
        shift = tl.full([], 0.0, tl.float32)
        count = tl.full([], 1.0 if OWN else 0.0, tl.float32)
        shift, count, target = merge(
            positive_lse, positive_mean, shift, count, target, row, rows, splits, features, SPLITS, FEATURES
        )
        target = target / count
        tl.store(inverse_count + row, tl.exp2(-shift) / count)
    if OWN:
        k = load_row(key, row, features, FEATURES)
        own = tl.sum(q * k, 0)
        shift, total, weighted = merge(
            lse, mean, own, tl.full([], 1.0, tl.float32), k, row, stacked, splits, features, SPLITS, FEATURES
        )
        all_lse = shift + tl.log2(total)
        all_mean = weighted / total
        if ACCURACY:
            top = largest_logit(largest, row, rows, splits, SPLITS)
            tl.store(accuracy + row, ((own >= top) & (all_lse == all_lse)).to(tl.float32))
    else:
        all_lse, all_mean = merge_new(lse, mean, row, stacked, splits, features, SPLITS, FEATURES)
    value = (all_lse - tl.sum(q * target, 0)) * LN2
    # An invalid target must surface; a check on the host would wait for the device
    tl.store(loss + row, tl.where(inside, value, float("nan")))
    tl.store(natural_lse + row, all_lse * LN2)
    store_row(gradient, row, (all_mean - target) * inverse_temperature, features, FEATURES)
