"""LSE - q.target / temperature: SupCon, soft cross-entropy, MixCo, group cross-entropy."""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import LN2, largest_logit, load_row, merge, merge_new, store_row


@triton.jit
def combine_target_kernel(
    query,  # [rows, features] contiguous, unrounded
    key,  # [rows, features] contiguous; not read unless OWN
    bank,  # [*, features] contiguous; TARGET "entries": where the targets lie
    index,  # [targets, rows] int64, rows of `bank`
    weight,  # [targets, rows]
    lse,  # [splits, stacked], base 2; the rows from `rows` on are those of the teachers
    mean,  # [splits, stacked, features]
    positive_lse,  # [splits, rows]; TARGET "positives": logarithm of their number
    positive_mean,
    largest,  # [splits, rows]; not read unless ACCURACY
    loss,  # [rows]
    gradient,  # [rows, features]
    natural_lse,  # [rows]
    inverse_count,  # [rows]: 1 / positives; not written unless TARGET is "positives"
    accuracy,  # [rows]; not written unless ACCURACY
    scale,
    inverse_temperature,
    rows,
    bank_rows,
    features,
    splits,
    targets,  # per row: teachers or entries
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    TARGET: tl.constexpr,
    OWN: tl.constexpr,  # the own key is an entry and a positive
    ACCURACY: tl.constexpr,
):
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
    # A target that is not there must be seen; looking on the host would wait for the device.
    tl.store(loss + row, tl.where(inside, value, float("nan")))
    tl.store(natural_lse + row, all_lse * LN2)
    store_row(gradient, row, (all_mean - target) * inverse_temperature, features, FEATURES)
