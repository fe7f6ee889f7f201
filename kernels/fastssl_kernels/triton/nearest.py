"""Nearest entries of a bank: each program keeps the best of its split, and torch merges the splits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kind
from .configuration import Configuration, configure, every_input
from .launch import Tiles, launch, make_plan, pad_columns, processors
from .read import with_unit_stride
from .tiles import dot, load_tile, round_to

_AT_ONCE = 16  # Entries found in one pass over the bank: more would not fit in registers
_LAST = tl.constexpr(0x7FFFFFFF)  # The largest int32: all bits but the sign

# Largest padded C an item serves -> tiles; by bytes per bank element.
TILES: dict[int, dict[int, Tiles]] = {
    2: {128: Tiles(128, 64, 8, 2, True), 256: Tiles(64, 64, 8, 2, True), 512: Tiles(32, 64, 8, 2, True)},
    4: {128: Tiles(32, 64, 8, 2, True), 256: Tiles(32, 32, 8, 2, True), 512: Tiles(16, 32, 8, 2, True)},
}


@triton.jit
def key_of(similarity, entry):
    """int64 that orders entries by similarity and, among equal ones, puts the earlier higher."""
    bits = similarity.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & _LAST)  # As integers, negative floats are in reverse order
    return (bits.to(tl.int64) << 32) | (entry ^ _LAST).to(tl.int64)


@triton.jit
def similarity_of(key):
    """The similarity in a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def any_better(similarity, lowest):
    """Whether any row of the tile has an entry above the lowest that it keeps."""
    # As a column: Triton 3.6 cannot reduce a row of maxima that come from the tensor memory of sm_100
    return tl.max((tl.max(similarity, 1)[:, None] > similarity_of(lowest)[:, None]).to(tl.int32)) > 0


@triton.jit
def keep(best, lowest, similarity, first, ENTRIES: tl.constexpr):
    """Replace each row's lowest by a better entry of the tile, one at a time, until none is better."""
    column = tl.arange(0, ENTRIES)
    while any_better(similarity, lowest):
        highest = tl.max(similarity, 1)
        at = tl.argmax(similarity, 1)
        better = highest > similarity_of(lowest)
        replaced = (best == lowest[:, None]) & better[:, None]
        best = tl.where(replaced, key_of(highest, first + at)[:, None], best)
        lowest = tl.min(best, 1)
        similarity = tl.where(column[None, :] == at[:, None], float("-inf"), similarity)
    return best, lowest


@triton.jit
def nearest_kernel(
    query: kind.Floats,  # [rows, features] contiguous
    bank: kind.Elements,  # [entries, features], last stride 1
    limit: kind.Longs,  # [rows] int64: only entries with lower keys count; not read unless LIMITED
    kept: kind.Longs,  # [rows, splits, COUNT] int64 keys, unordered
    rows: kind.Count,
    entries: kind.Entries,
    features: kind.Multiple,
    bank_stride: kind.Multiple,
    split_length: kind.Multiple,  # Entries per split, a multiple of ENTRIES
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    COUNT: tl.constexpr,
    FULL: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, ENTRIES)
    slot = tl.arange(0, COUNT)
    x = load_tile(query, first_row, rows, features, features, ROWS, FEATURES, False)
    x = round_to(x.to(tl.float32), bank.dtype.element_ty)
    if LIMITED:
        below = tl.load(limit + row, mask=row < rows, other=0)
    # An empty slot loses against every entry, and holds a valid index
    best = key_of(tl.full([ROWS, COUNT], float("-inf"), tl.float32), tl.broadcast_to(slot[None, :], [ROWS, COUNT]))
    lowest = tl.min(best, 1)
    for first in range(split * split_length, tl.minimum(split * split_length + split_length, entries), ENTRIES):
        tile = load_tile(bank, first, entries, bank_stride, features, ENTRIES, FEATURES, FULL)
        similarity = dot(x, tl.trans(tile), tl.zeros([ROWS, ENTRIES], tl.float32), PRECISION)
        # A NaN counts as nearest, as in `topk`: comparisons with it are false and would hide it
        similarity = tl.where(similarity == similarity, similarity, float("inf"))
        if not FULL:
            similarity = tl.where(first + column < entries, similarity, float("-inf"))
        if LIMITED:
            similarity = tl.where(key_of(similarity, first + column) < below[:, None], similarity, float("-inf"))
        # Loads are prefetched in a loop with a branch, but not in one with an inner loop
        if any_better(similarity, lowest):
            best, lowest = keep(best, lowest, similarity, first, ENTRIES)
    place = (tl.cast(row, tl.int64)[:, None] * tl.num_programs(1) + split) * COUNT + slot[None, :]
    tl.store(kept + place, best, mask=(row < rows)[:, None])


@pad_columns
def nearest(rows: Tensor, bank: Tensor, count: int) -> Tensor:
    """The `count` entries of the bank with the largest dot product with each row, the largest first.

    `rows`: [N, C] and `bank`: [K, C], float32, bfloat16 or float16; C at most 512. Products take both in the bank's
    dtype. 1 <= `count` <= K; the bank is read once per 16 of them. Of equal entries the earlier comes first.
    Returns int64 [N, count].
    """
    rows, bank = rows.contiguous(), with_unit_stride(bank)
    found: list[Tensor] = []
    for start in range(0, count, _AT_ONCE):
        kept = _read(rows, bank, min(_AT_ONCE, count - start), found[-1][:, -1].contiguous() if found else None)
        found.append(kept.topk(min(_AT_ONCE, count - start)).values)
    return (torch.cat(found, 1) & _LAST.value) ^ _LAST.value


def _read(rows: Tensor, bank: Tensor, count: int, limit: Tensor | None) -> Tensor:
    """Keys [N, candidates] that include the `count` highest below `limit` [N]."""
    (queries, features), entries = rows.shape, len(bank)
    table = TILES[bank.dtype.itemsize]
    plan = make_plan(queries, entries, features, bank.dtype, table, temperature=1.0, processors=processors(bank.device))
    slots = triton.next_power_of_2(count)
    kept = torch.empty(queries, plan.splits, slots, dtype=torch.int64, device=bank.device)
    launch(
        nearest_kernel, plan.grid(queries),
        rows, bank, kept if limit is None else limit, kept,
        queries, entries, features, bank.stride(0), plan.split_length,
        COUNT=slots, LIMITED=limit is not None, **plan.products, **plan.tiles.options,
    )  # fmt: skip
    return kept.flatten(1)


def configurations() -> Iterator[Configuration]:
    """Configurations to compile: as many entries as one pass finds."""
    for inputs in every_input():
        plan = inputs.plan(TILES[inputs.dtype.itemsize])
        constants = plan.products | {"COUNT": _AT_ONCE, "LIMITED": True}
        yield configure(nearest_kernel, inputs.dtype, constants, plan.tiles)
