"""Queue read: LSE and softmax-weighted mean of one share of the queue, per query row."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOWEST, absorb, dot, load_stacked_rows, load_tile, store_partial


@triton.jit
def read_kernel(
    query,  # [boundary, features] contiguous
    teacher,  # [rows - boundary, features] contiguous: the rows from `boundary` on
    queue,  # [entries, features], last stride 1
    lse,  # [splits, rows], base 2
    mean,  # [splits, rows, features]
    largest,  # [splits, rows]: the largest logit, base 2; not written unless ACCURACY
    scale,
    teacher_scale,
    boundary,
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
):
    # Neighboring programs differ in their rows and share their part of the queue, so it leaves DRAM once.
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    x = load_stacked_rows(
        query, teacher, boundary, scale, teacher_scale, first_row, rows, features,
        queue.dtype.element_ty, ROWS, FEATURES,
    )  # fmt: skip
    shift = tl.full([ROWS], LOWEST if ONLINE else 0.0, tl.float32)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rounded = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, FEATURES], tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, entries), ENTRIES):
        tile = load_tile(queue, first, entries, queue_stride, features, ENTRIES, FEATURES, FULL)
        logits = dot(x, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
        if not FULL:
            logits = tl.where(first + tl.arange(0, ENTRIES) < entries, logits, float("-inf"))
        if ACCURACY:
            top = tl.maximum(top, tl.max(logits, 1))
        shift, total, rounded, weighted = absorb(
            logits, tile, shift, total, rounded, weighted, ONLINE, ROUNDED, PRECISION
        )
    store_partial(lse, mean, split, first_row, rows, features, shift, total, rounded, weighted, ROWS, FEATURES)
    if ACCURACY:
        row = first_row + tl.arange(0, ROWS)
        tl.store(largest + tl.cast(split, tl.int64) * rows + row, top, mask=row < rows)
