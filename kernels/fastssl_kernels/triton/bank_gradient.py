"""Gradient of a softmax cross-entropy to its bank: each program holds entries and streams the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import LOG2_E
from . import kind
from .configuration import Configuration, configure, every_input
from .launch import Plan, Tiles, launch, make_plan, pad_columns, processors
from .read import with_unit_stride
from .tiles import dot, load_tile, round_to, rounded_weights

_LOG2_E = tl.constexpr(LOG2_E)
_LARGEST_UPSTREAM = 2.0**12  # For float16: leaves 4 binary orders of magnitude above it and 36 below

# Largest padded C an item serves -> tiles, whose rows are entries of the bank; by bytes per bank element.
TILES: dict[int, dict[int, Tiles]] = {
    2: {128: Tiles(128, 32, 8, 2, True), 256: Tiles(64, 16, 4, 2, True), 512: Tiles(32, 32, 8, 2, True)},
    4: {128: Tiles(32, 32, 8, 2, True), 256: Tiles(32, 16, 8, 2, True), 512: Tiles(16, 16, 8, 2, True)},
}


@triton.jit
def bank_gradient_kernel(
    stream: kind.Elements,  # [rows, features] contiguous
    bank: kind.Elements,  # [entries, features] of the same dtype, last stride 1
    query_labels: kind.Longs,  # [TARGETS, rows] int64
    bank_labels: kind.Longs,  # [entries] int64
    lse: kind.Floats,  # [rows] of each row's logits, natural
    label_weight: kind.Floats,  # [rows]
    upstream: kind.Floats,  # [rows]
    gradient: kind.Floats,  # [splits, entries, features]
    inverse_temperature: kind.Factor,
    rows: kind.Count,
    entries: kind.Entries,
    features: kind.Multiple,
    bank_stride: kind.Multiple,
    split_length: kind.Multiple,  # Rows per split, a multiple of ROWS
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    TARGETS: tl.constexpr,
    SKIP_OWN: tl.constexpr,  # Row i is not compared with entry i: a batch against itself
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_entry = tl.program_id(0) * ENTRIES
    split = tl.program_id(1)
    entry = first_entry + tl.arange(0, ENTRIES)
    stationary = load_tile(bank, first_entry, entries, bank_stride, features, ENTRIES, FEATURES, False)
    scale = inverse_temperature * _LOG2_E
    entry_label = tl.load(bank_labels + entry, mask=entry < entries, other=0)
    total = tl.zeros([ENTRIES, FEATURES], tl.float32)
    for first in range(split * split_length, tl.minimum(split * split_length + split_length, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        tile = load_tile(stream, first, rows, features, features, ROWS, FEATURES, FULL)
        # Beyond the tail these are all zero, and so is the weight
        row_lse = tl.load(lse + row, mask=row < rows, other=0.0) * _LOG2_E
        row_upstream = tl.load(upstream + row, mask=row < rows, other=0.0)
        row_weight = tl.load(label_weight + row, mask=row < rows, other=0.0)
        similarity = dot(stationary, tl.trans(tile), tl.zeros([ENTRIES, ROWS], tl.float32), PRECISION)
        # Folded into the bank, the scale would cost a rounding; here it is free, as one FMA with the LSE
        weight = tl.exp2(similarity * scale - row_lse[None, :])
        for target in tl.static_range(TARGETS):
            label = tl.load(query_labels + target * rows + row, mask=row < rows, other=0)
            weight -= tl.where(entry_label[:, None] == label[None, :], row_weight[None, :], 0.0)
        weight *= row_upstream[None, :]
        if SKIP_OWN:
            weight = tl.where(entry[:, None] == row[None, :], 0.0, weight)
        rounded, seen = rounded_weights(weight, tile.dtype)
        if tile.dtype == tl.bfloat16:  # With its 8 bits alone the error would be 2e-3
            total = dot(round_to(weight - seen, tl.bfloat16), tile, total, PRECISION)
        total = dot(rounded, tile, total, PRECISION)
    column = tl.arange(0, FEATURES)[None, :]
    at = (tl.cast(split, tl.int64) * entries + entry)[:, None] * features + column
    tl.store(gradient + at, total * inverse_temperature, mask=(entry < entries)[:, None] & (column < features))


@pad_columns
def bank_gradient(
    rows: Tensor,
    bank: Tensor,
    row_labels: Tensor,
    bank_labels: Tensor,
    lse: Tensor,
    label_weight: Tensor,
    upstream: Tensor,
    temperature: float,
    skip_own: bool,
) -> Tensor:
    """Sum over rows i of upstream_i (softmax of entry j - label_weight_i * labels they share) rows_i / temperature.

    `rows`: [N, C] and `bank`: [K, C], float32, bfloat16 or float16; C at most 512. Products take both in the wider
    of their dtypes. `row_labels`: int64 [T, N]. `bank_labels`: int64 [K]. `lse` (of a row's logits), `label_weight`
    and `upstream`: [N]. `skip_own` leaves out i == j. Returns float32 [K, C], bitwise the same at every call on one
    GPU.
    """
    # A row enters both products, unlike in the reads: rounded to a bfloat16 bank it would cost 2e-3
    dtype = torch.promote_types(rows.dtype, bank.dtype)
    rows, bank = rows.to(dtype), bank.to(dtype)
    if dtype != torch.float16:
        return _read(rows, bank, row_labels, bank_labels, lse, label_weight, upstream, temperature, skip_own)
    # The range of float16 is 6e-8 to 65504, and a loss scaler may make the weights large
    tiny = torch.finfo(torch.float32).tiny
    gain = _LARGEST_UPSTREAM / upstream.float().abs().amax().clamp(min=_LARGEST_UPSTREAM * tiny)
    scaled = upstream * gain
    return _read(rows, bank, row_labels, bank_labels, lse, label_weight, scaled, temperature, skip_own) / gain


def _read(
    rows: Tensor,
    bank: Tensor,
    row_labels: Tensor,
    bank_labels: Tensor,
    lse: Tensor,
    label_weight: Tensor,
    upstream: Tensor,
    temperature: float,
    skip_own: bool,
) -> Tensor:
    bank, (count, features), entries = with_unit_stride(bank), rows.shape, len(bank)
    table = TILES[bank.dtype.itemsize]
    plan = make_plan(entries, count, features, bank.dtype, table, temperature=1.0, processors=processors(bank.device))
    gradient = torch.empty(plan.splits, entries, features, dtype=torch.float32, device=bank.device)
    launch(
        bank_gradient_kernel, plan.grid(entries),
        rows.contiguous(), bank, row_labels.contiguous(), bank_labels.contiguous(),
        lse.contiguous(), label_weight.contiguous(), upstream.contiguous(), gradient,
        1 / temperature, count, entries, features, bank.stride(0), plan.split_length,
        TARGETS=len(row_labels), SKIP_OWN=skip_own, **_constants(plan), **plan.tiles.options,
    )  # fmt: skip
    return gradient[0] if plan.splits == 1 else gradient.sum(0)


def _constants(plan: Plan) -> dict[str, Any]:
    """The constants of a plan, with rows and entries exchanged: the kernel holds entries and reads rows."""
    return plan.products | {"ROWS": plan.tiles.entries, "ENTRIES": plan.tiles.rows}


def configurations() -> Iterator[Configuration]:
    """Configurations to compile."""
    for inputs in every_input():
        plan = inputs.plan(TILES[inputs.dtype.itemsize])
        constants = _constants(plan) | {"TARGETS": 2, "SKIP_OWN": True}
        yield configure(bank_gradient_kernel, inputs.dtype, constants, plan.tiles)
