"""Labeled queue read: two accumulators over one share of the queue, for UniCon and SupCon.

PAIRS (UniCon): the negatives, and the negated positives. Otherwise (SupCon): all entries, and the positives
with equal weights, so that their LSE is the logarithm of their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOWEST, absorb, dot, load_scaled_query, load_tile, store_partial


@triton.jit
def labeled_read_kernel(
    query,  # [rows, features] contiguous
    queue,  # [entries, features], last stride 1
    query_labels,  # [rows] int64, -1 unknown
    queue_labels,  # [entries] int64, -1 unknown
    first_lse,  # [splits, rows], base 2: of the negatives or of all
    first_mean,  # [splits, rows, features]
    positive_lse,
    positive_mean,
    largest,  # [splits, rows]: the largest logit, base 2; not written unless ACCURACY
    scale,
    rows,
    entries,
    features,
    queue_stride,
    share,  # entries per split, a multiple of ENTRIES
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FULL: tl.constexpr,
    ONLINE: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACCURACY: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIRS: tl.constexpr,
    SKIP_OWN: tl.constexpr,  # row i does not see entry i: a batch against itself
):
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    # A batch's rows have the dtype already: the scale would round them once more, and not as `bank_gradient` does.
    folded = 1.0 if SKIP_OWN else scale
    x = load_scaled_query(query, first_row, rows, features, folded, queue.dtype.element_ty, ROWS, FEATURES)
    row_label = tl.load(query_labels + row, mask=row < rows, other=-1)
    top = tl.full([ROWS], LOWEST, tl.float32)
    shift = tl.full([ROWS], LOWEST if ONLINE else 0.0, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rounded = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, FEATURES], tl.float32)
    # Equal weights of 1 need no maximum.
    positive_shift = tl.full([ROWS], LOWEST if ONLINE and PAIRS else 0.0, tl.float32)
    positive_total = tl.zeros([ROWS], tl.float32)
    positive_rounded = tl.zeros([ROWS], tl.float32)
    positive = tl.zeros([ROWS, FEATURES], tl.float32)
    lowest_label = tl.full([ENTRIES], -1, tl.int64)
    for first in range(split * share, tl.minimum(split * share + share, entries), ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        tile = load_tile(queue, first, entries, queue_stride, features, ENTRIES, FEATURES, FULL)
        entry_label = tl.load(queue_labels + entry, mask=entry < entries, other=-1)
        lowest_label = tl.minimum(lowest_label, entry_label)
        logits = dot(x, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
        # Beyond the tail the label is -1, which matches nothing.
        same = (row_label[:, None] == entry_label[None, :]) & (row_label != -1)[:, None]
        if SKIP_OWN:
            logits *= scale
            own = row[:, None] == entry[None, :]
            same = same & ~own
            logits = tl.where(own, float("-inf"), logits)
        if not FULL:
            logits = tl.where(entry < entries, logits, float("-inf"))
        if ACCURACY:
            top = tl.maximum(top, tl.max(logits, 1))
        shift, total, rounded, weighted = absorb(
            tl.where(same, float("-inf"), logits) if PAIRS else logits,
            tile, shift, total, rounded, weighted, ONLINE, ROUNDED, PRECISION,
        )  # fmt: skip
        # Few labels or many classes leave most tiles without a positive.
        if tl.max(tl.max(same.to(tl.int32), 1), 0) > 0:
            positive_shift, positive_total, positive_rounded, positive = absorb(
                tl.where(same, -logits if PAIRS else 0.0, float("-inf")),
                tile, positive_shift, positive_total, positive_rounded, positive,
                ONLINE and PAIRS, ROUNDED and PAIRS, PRECISION,
            )  # fmt: skip
    if not SKIP_OWN:  # there the views of an unlabeled image are a class below -1
        # A label that is none must be seen; looking on the host would wait for the device.
        wrong = (row_label < -1) | (tl.min(lowest_label, 0) < -1)
        total = tl.where(wrong, float("nan"), total)
    store_partial(
        first_lse, first_mean, split, first_row, rows, features, shift, total, rounded, weighted, ROWS, FEATURES
    )
    store_partial(
        positive_lse, positive_mean, split, first_row, rows, features,
        positive_shift, positive_total, positive_rounded, positive, ROWS, FEATURES,
    )  # fmt: skip
    if ACCURACY:
        tl.store(largest + tl.cast(split, tl.int64) * rows + row, top, mask=row < rows)
