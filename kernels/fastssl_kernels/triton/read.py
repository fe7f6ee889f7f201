"""Read a bank: the kernels, and their launches with one partial result per split, for `combine` to merge."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import LOG2_E
from . import kind
from .configuration import Configuration, configure, every_input
from .launch import TILES, launch, make_plan, processors
from .tiles import LOWEST, absorb, dot, load_scaled_query, load_stacked_rows, load_tile, store_partial


@triton.jit
def read_kernel(
    query: kind.Floats,  # [boundary, features] contiguous
    teacher: kind.Floats,  # [rows - boundary, features] contiguous: the rows from `boundary` on
    queue: kind.Elements,  # [entries, features], last stride 1
    lse: kind.Floats,  # [splits, rows], base 2
    mean: kind.Floats,  # [splits, rows, features]
    largest: kind.Floats,  # [splits, rows]: the largest logit, base 2; not written unless ACCURACY
    scale: kind.Factor,
    teacher_scale: kind.Factor,
    boundary: kind.Count,
    rows: kind.Count,
    entries: kind.Entries,
    features: kind.Multiple,
    queue_stride: kind.Multiple,
    split_length: kind.Multiple,  # Entries per split, a multiple of ENTRIES
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FULL: tl.constexpr,
    ONLINE: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACCURACY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """LSE and softmax-weighted mean of one split of the queue, per row."""
    # Neighboring programs have different rows and the same part of the queue, so it is read from DRAM once
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
    for first in range(split * split_length, tl.minimum(split * split_length + split_length, entries), ENTRIES):
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


@triton.jit
def labeled_read_kernel(
    query: kind.Floats,  # [rows, features] contiguous
    queue: kind.Elements,  # [entries, features], last stride 1
    query_labels: kind.Longs,  # [rows] int64, -1 unknown
    queue_labels: kind.Longs,  # [entries] int64, -1 unknown
    first_lse: kind.Floats,  # [splits, rows], base 2: of the negatives or of all
    first_mean: kind.Floats,  # [splits, rows, features]
    positive_lse: kind.Floats,
    positive_mean: kind.Floats,
    largest: kind.Floats,  # [splits, rows]: the largest logit, base 2; not written unless ACCURACY
    scale: kind.Factor,
    rows: kind.Count,
    entries: kind.Entries,
    features: kind.Multiple,
    queue_stride: kind.Multiple,
    split_length: kind.Multiple,  # Entries per split, a multiple of ENTRIES
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FULL: tl.constexpr,
    ONLINE: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACCURACY: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIRS: tl.constexpr,
    SKIP_OWN: tl.constexpr,  # Row i is not compared with entry i: a batch against itself
):
    """Two accumulators over one split of the queue, per row.

    PAIRS (UniCon): the negatives, and the negated positives. Otherwise (SupCon): all entries, and the positives
    with equal weights, so that their LSE is the logarithm of their count.
    """
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    # A batch's rows already have the dtype: the scale would round them again, and differently from `bank_gradient`
    folded = 1.0 if SKIP_OWN else scale
    x = load_scaled_query(query, first_row, rows, features, folded, queue.dtype.element_ty, ROWS, FEATURES)
    row_label = tl.load(query_labels + row, mask=row < rows, other=-1)
    top = tl.full([ROWS], LOWEST, tl.float32)
    shift = tl.full([ROWS], LOWEST if ONLINE else 0.0, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rounded = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, FEATURES], tl.float32)
    # Equal weights of 1 need no maximum
    positive_shift = tl.full([ROWS], LOWEST if ONLINE and PAIRS else 0.0, tl.float32)
    positive_total = tl.zeros([ROWS], tl.float32)
    positive_rounded = tl.zeros([ROWS], tl.float32)
    positive = tl.zeros([ROWS, FEATURES], tl.float32)
    lowest_label = tl.full([ENTRIES], -1, tl.int64)
    for first in range(split * split_length, tl.minimum(split * split_length + split_length, entries), ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        tile = load_tile(queue, first, entries, queue_stride, features, ENTRIES, FEATURES, FULL)
        entry_label = tl.load(queue_labels + entry, mask=entry < entries, other=-1)
        lowest_label = tl.minimum(lowest_label, entry_label)
        logits = dot(x, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
        # Beyond the tail the label is -1, which matches nothing
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
        # With few labels or many classes most tiles have no positive
        if tl.max(tl.max(same.to(tl.int32), 1), 0) > 0:
            positive_shift, positive_total, positive_rounded, positive = absorb(
                tl.where(same, -logits if PAIRS else 0.0, float("-inf")),
                tile, positive_shift, positive_total, positive_rounded, positive,
                ONLINE and PAIRS, ROUNDED and PAIRS, PRECISION,
            )  # fmt: skip
    if not SKIP_OWN:  # Otherwise the views of an unlabeled image form a class below -1
        # An invalid label must surface; a check on the host would wait for the device
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


class Partials(NamedTuple):
    """Partial results of the splits."""

    lse: Tensor
    """[splits, rows], base 2."""
    mean: Tensor
    """[splits, rows, features]"""
    largest: Tensor
    """[splits, rows], base 2; undefined unless requested."""


def read_banks(
    query: Tensor,
    *banks: Tensor,
    temperature: float,
    teacher: Tensor | None = None,
    teacher_temperature: float = 1.0,
    accuracy: bool = False,
) -> Partials:
    """Read several banks as one; the teacher's rows [R, C], if any, follow the query's."""
    query = query.contiguous()
    teacher = query if teacher is None else teacher.contiguous()
    stacked = len(query) if teacher is query else len(query) + len(teacher)
    lowest = temperature if teacher is query else min(temperature, teacher_temperature)
    banks = tuple(with_unit_stride(bank) for bank in banks)
    plans = [
        make_plan(
            stacked,
            len(bank),
            bank.shape[1],
            bank.dtype,
            TILES[False, bank.dtype.itemsize],
            temperature=lowest,
            processors=processors(bank.device),
        )
        for bank in banks
    ]
    out = empty_partials(query, sum(plan.splits for plan in plans), stacked, accuracy)
    first = 0
    for bank, plan in zip(banks, plans, strict=True):
        launch(
            read_kernel, plan.grid(stacked),
            query, teacher, bank, *(part[first:] for part in out),
            LOG2_E / temperature, LOG2_E / teacher_temperature,
            len(query), stacked, *bank.shape, bank.stride(0), plan.split_length,
            ACCURACY=accuracy, **plan.constants, **plan.tiles.options,
        )  # fmt: skip
        first += plan.splits
    return out


def read_labeled(
    query: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    *,
    pairs: bool,
    skip_own: bool = False,
    accuracy: bool = False,
) -> tuple[Partials, Partials]:
    """Read negatives (`pairs`) or all entries, and positives; see `labeled_read_kernel`."""
    query, queue = query.contiguous(), with_unit_stride(queue)
    rows, (entries, features) = len(query), queue.shape
    plan = make_plan(
        rows,
        entries,
        features,
        queue.dtype,
        TILES[True, queue.dtype.itemsize],
        temperature=temperature,
        processors=processors(query.device),
    )
    first = empty_partials(query, plan.splits, rows, accuracy)
    positives = empty_partials(query, plan.splits, rows, accuracy=False)
    launch(
        labeled_read_kernel, plan.grid(rows),
        query, queue, query_labels.contiguous(), queue_labels.contiguous(),
        first.lse, first.mean, positives.lse, positives.mean, first.largest,
        LOG2_E / temperature, rows, entries, features, queue.stride(0), plan.split_length,
        PAIRS=pairs, SKIP_OWN=skip_own, ACCURACY=accuracy, **plan.constants, **plan.tiles.options,
    )  # fmt: skip
    return first, positives


def with_unit_stride(bank: Tensor) -> Tensor:
    """The bank, copied unless the kernels can load it 16 bytes at a time; a view of a wider matrix may qualify."""
    row_bytes = bank.stride(0) * bank.element_size()
    loadable = bank.stride(1) == 1 and row_bytes % 16 == 0 and bank.data_ptr() % 16 == 0
    return bank if loadable else bank.clone(memory_format=torch.contiguous_format)


def empty_partials(query: Tensor, splits: int, rows: int, accuracy: bool) -> Partials:
    """Uninitialized results of `splits` x `rows`."""
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    lse = empty(splits, rows)
    return Partials(lse, empty(splits, rows, query.shape[1]), empty(splits, rows) if accuracy else lse)


def configurations() -> Iterator[Configuration]:
    """Configurations to compile."""
    for inputs in every_input():
        accuracy = {"ACCURACY": inputs.accuracy}
        plan = inputs.plan(TILES[False, inputs.dtype.itemsize])
        yield configure(read_kernel, inputs.dtype, plan.constants | accuracy, plan.tiles)
        plan = inputs.plan(TILES[True, inputs.dtype.itemsize])
        unicon = {"PAIRS": True, "SKIP_OWN": False}
        yield configure(labeled_read_kernel, inputs.dtype, plan.constants | unicon | accuracy, plan.tiles)
        if inputs.features == 128 and inputs.accuracy:
            nt_xent = {"PAIRS": False, "SKIP_OWN": True, "ACCURACY": False}
            yield configure(labeled_read_kernel, inputs.dtype, plan.constants | nt_xent, plan.tiles)
