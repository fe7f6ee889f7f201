"""Softplus of LSE of negatives + LSE of negated positives: InfoNCE, UniCon, Un-Mix."""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import LN2, largest_logit, load_row, merge, merge_new, sigmoid, softplus, store_row


@triton.jit
def combine_pairs_kernel(
    query,  # [rows, features] contiguous, as are the keys: unrounded, for the positive pair
    key,
    second_key,  # not read unless MIXED
    weight,  # [rows], of the first key; not read unless MIXED
    negative_lse,  # [splits, rows], base 2
    negative_mean,  # [splits, rows, features]
    positive_lse,  # of the negated logits; not read unless LABELED
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
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    LABELED: tl.constexpr,
    MIXED: tl.constexpr,
    ACCURACY: tl.constexpr,
):
    row = tl.program_id(0)
    # Scaled before the product, as in the reads: equal vectors then have equal logits, not almost.
    q = load_row(query, row, features, FEATURES) * scale
    k = load_row(key, row, features, FEATURES)
    own = tl.sum(q * k, 0)
    lse, mean = merge_new(negative_lse, negative_mean, row, rows, splits, features, SPLITS, FEATURES)
    # The own key is the first positive; without labels it is the only one.
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
