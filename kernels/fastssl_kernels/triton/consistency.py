"""Reads of a bank along a direction: CO2's consistency loss, and the gradient of `queue_read`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import LOG2_E, Rows
from . import kind
from .combine import load_row, store_row
from .configuration import Configuration, configure, every_input
from .launch import Plan, Tiles, launch, make_plan, pad_columns, pad_features, processors, splits_at_once
from .moment_read import moment_gradient_kernel, moment_read_kernel
from .read import with_unit_stride
from .tiles import LOWEST, round_to

# As launch.TILES: largest padded C an item serves -> tiles; by bytes per bank element. The first pass sums along rows
# all the time, which takes fewer exchanges with few warps.
MOMENT_TILES: dict[int, dict[int, Tiles]] = {
    2: {128: Tiles(64, 64, 4, 2), 256: Tiles(32, 64, 4, 2), 512: Tiles(16, 32, 4, 2)},
    4: {128: Tiles(16, 64, 8, 2), 256: Tiles(32, 32, 8, 2), 512: Tiles(16, 16, 8, 2)},
}
GRADIENT_TILES: dict[int, dict[int, Tiles]] = {
    2: {128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 32, 8, 2)},
    4: {128: Tiles(16, 16, 4, 2), 256: Tiles(16, 16, 8, 2), 512: Tiles(8, 16, 8, 1)},
}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def load_splits(base, row, rows, splits, beyond, SPLITS: tl.constexpr):
    """Load one row's values, one per split."""
    split = tl.arange(0, SPLITS)
    return tl.load(base + tl.cast(split, tl.int64) * rows + row, mask=split < splits, other=beyond)


@triton.jit
def log_sum(parts):
    """LSE of base-2 logarithms, and the logarithm of each one's weight in it."""
    highest = tl.max(parts, 0)
    rest = tl.log2(tl.sum(tl.exp2(parts - highest), 0))
    return highest + rest, parts - highest - rest


@triton.jit
def log_one_plus(x):
    """log2(1 + 2**x) without overflow."""
    return tl.maximum(x, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(x)))


@triton.jit
def combine_moments_kernel(
    query: kind.Floats,  # [rows, features] contiguous, as is key: unrounded, for the positive pair
    key: kind.Floats,
    moments: kind.Floats,  # [4 or 7, splits, rows], as moment_read_kernel writes them
    loss: kind.Floats,  # [rows]
    lse: kind.Floats,  # [rows], base 2, less log2(weight_scale); the next three are read by moment_gradient_kernel
    bias: kind.Floats,
    tilt: kind.Floats,
    pair: kind.Floats,  # [rows]: the factor of the key in the gradient; not written unless POSITIVE
    scale: kind.Factor,
    inverse_temperature: kind.Factor,
    weight_scale: kind.Factor,
    rows: kind.Count,
    features: kind.Multiple,
    splits: kind.Count,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    POSITIVE: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Merge the splits of the first pass, in a fixed order: the loss, and what the second pass needs."""
    row = tl.program_id(0)
    size = tl.cast(splits, tl.int64) * rows
    row_lse, log_weight = log_sum(load_splits(moments, row, rows, splits, LOWEST, SPLITS))
    # The tilted softmax is kept relative to the other, because the loss is in their difference
    row_tilt, tilted_log_weight = log_sum(log_weight + load_splits(moments + 2 * size, row, rows, splits, 0.0, SPLITS))
    if POSITIVE:
        # The pair's logit is the same for query and key: it has a share in both softmaxes, but no direction
        own = tl.sum(load_row(query, row, features, FEATURES) * scale * load_row(key, row, features, FEATURES), 0)
        own -= row_lse
        tilted_own = own - row_tilt
        grown = log_one_plus(own)
        tilted_grown = log_one_plus(tilted_own)
        log_weight -= grown
        tilted_log_weight -= tilted_grown
        row_lse += grown
        row_tilt += tilted_grown - grown
    weight = tl.exp2(log_weight)
    tilted = tl.exp2(tilted_log_weight)
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
    query: kind.Floats,  # [rows, features] contiguous, as is key
    key: kind.Floats,
    partial: kind.Floats,  # [splits, rows, features], as moment_gradient_kernel writes them
    pair: kind.Floats,  # [rows]; not read unless POSITIVE
    loss: kind.Floats,  # [rows], corrected in place
    gradient: kind.Floats,  # [rows, features]
    scale: kind.Factor,
    inverse_scale: kind.Factor,
    rows: kind.Count,
    features: kind.Multiple,
    splits: kind.Count,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    DTYPE: tl.constexpr,  # Of the queue
    POSITIVE: tl.constexpr,
):
    """Merge the splits of the second pass, in a fixed order: the gradient, and the loss corrected for rounding."""
    row = tl.program_id(0)
    column = tl.arange(0, FEATURES)[None, :]
    value = tl.zeros([FEATURES], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        at = (tl.cast(split, tl.int64) * rows + row) * features + column
        value += tl.sum(tl.load(partial + at, mask=(split < splits) & (column < features), other=0.0), 0)
    # Correct the loss, to first order, for the rounding of the query
    q = load_row(query, row, features, FEATURES)
    rounded = round_to(q * scale, DTYPE).to(tl.float32) * inverse_scale
    tl.store(loss + row, tl.load(loss + row) - tl.sum(value * (rounded - q), 0))
    if POSITIVE:
        value += tl.load(pair + row) * load_row(key, row, features, FEATURES)
    store_row(gradient, row, value, features, FEATURES)


class _Reader(NamedTuple):
    """Rows, their directions, and the bank; see `moment_read` for its two passes."""

    query: Tensor
    direction: Tensor
    bank: Tensor
    temperature: float
    tilted: bool

    def moments(self) -> Tensor:
        """[2, 4 or 7; splits, rows]: the results of the first pass for each split."""
        plan = self._plan(MOMENT_TILES)
        out = self.empty((7 if plan.constants["ROUNDED"] else 4) if self.tilted else 2, plan.splits, len(self.query))
        launch(
            moment_read_kernel, plan.grid(len(self.query)),
            self.query, self.direction, self.bank, out, *self._scales(), *self._sizes(), plan.split_length,
            TILTED=self.tilted, **plan.constants, **plan.tiles.options,
        )  # fmt: skip
        return out

    def gradients(self, lse: Tensor, bias: Tensor, tilt: Tensor, scale: float) -> Tensor:
        """[splits, rows, features]: scale * sum of (softmax * (bias - d) - tilted softmax) * entry."""
        plan = self._plan(GRADIENT_TILES)
        out = self.empty(plan.splits, *self.query.shape)
        launch(
            moment_gradient_kernel, plan.grid(len(self.query)),
            self.query, self.direction, self.bank, lse, bias, tilt, out,
            *self._scales(), scale, *self._sizes(), plan.split_length,
            TILTED=self.tilted, **plan.products, **plan.tiles.options,
        )  # fmt: skip
        return out

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.bank.device)

    def _plan(self, tables: dict[int, dict[int, Tiles]]) -> Plan:
        entries, features = self.bank.shape
        return make_plan(
            len(self.query),
            entries,
            features,
            self.bank.dtype,
            tables[self.bank.dtype.itemsize],
            temperature=self.temperature,
            processors=processors(self.bank.device),
        )

    def _scales(self) -> tuple[float, float]:
        return LOG2_E / self.temperature, 1 / self.temperature if self.tilted else 1.0

    def _sizes(self) -> tuple[int, ...]:
        return (len(self.query), *self.bank.shape, self.bank.stride(0))


@pad_columns
def consistency_rows(query: Tensor, key: Tensor, queue: Tensor, temperature: float, include_positive: bool) -> Rows:
    """CO2's consistency loss; arguments as in `fastssl_kernels.consistency`."""
    query, key = query.contiguous(), key.contiguous()
    rows, features = query.shape
    scale, weight_scale = LOG2_E / temperature, _weight_scale(2 + 4 / temperature)
    reader = _Reader(query, key, with_unit_stride(queue), temperature, tilted=True)
    moments = reader.moments()
    loss, lse, bias, tilt, pair = (reader.empty(rows) for _ in range(5))
    launch(
        combine_moments_kernel, (rows,),
        query, key, moments, loss, lse, bias, tilt, pair,
        scale, 1 / temperature, weight_scale, rows, features, moments.shape[1],
        SPLITS=triton.next_power_of_2(moments.shape[1]),
        FEATURES=pad_features(features),
        POSITIVE=include_positive,
        ROUNDED=len(moments) == 7,
    )  # fmt: skip
    parts = reader.gradients(lse, bias, tilt, 0.5 / (temperature * weight_scale))
    gradient = reader.empty(rows, features)
    launch(
        combine_gradients_kernel, (rows,),
        query, key, parts, pair, loss, gradient, scale, 1 / scale, rows, features, len(parts),
        SPLITS=splits_at_once(len(parts), features),
        FEATURES=pad_features(features),
        DTYPE=_TRITON_DTYPES[queue.dtype],
        POSITIVE=include_positive,
    )  # fmt: skip
    return Rows(loss, gradient, reader.empty(0))


@pad_columns
def queue_read_gradient(
    query: Tensor, bank: Tensor, lse_upstream: Tensor, mean_upstream: Tensor, temperature: float
) -> Tensor:
    """[N, C]: gradient of `fastssl_kernels.queue_read` with respect to the query, from those of lse and mean."""
    mean_upstream = mean_upstream.contiguous()
    # At most 1 in each row: a loss scaler may have moved the upstream out of the range of a 16-bit bank
    length = torch.maximum(mean_upstream.norm(dim=1), lse_upstream.abs()).clamp_min(torch.finfo(torch.float32).tiny)
    direction = -mean_upstream / length[:, None]
    reader = _Reader(query.contiguous(), direction, with_unit_stride(bank), temperature, tilted=False)
    lse, expected = reader.moments()
    weight_scale = _weight_scale(3)
    lse = lse / LOG2_E
    bias = lse_upstream / length + (torch.softmax(lse, 0) * expected).sum(0)
    whole = torch.logsumexp(lse, 0) * LOG2_E - math.log2(weight_scale)
    return reader.gradients(whole, bias, whole, 1 / (temperature * weight_scale)).sum(0) * length[:, None]


def _weight_scale(largest: float) -> float:
    """Power of 2 that scales weights up to `largest` to the upper end of float16, which underflows early."""
    return 2.0 ** math.floor(math.log2(2**15 / largest))


def configurations() -> Iterator[Configuration]:
    """Configurations to compile."""
    for inputs in every_input():
        # Without the tilt the same tiles do less
        for tilted in (True, False) if inputs.features == 128 and inputs.accuracy else (True,):
            moments = inputs.plan(MOMENT_TILES[inputs.dtype.itemsize])
            constants = moments.constants | {"TILTED": tilted}
            yield configure(moment_read_kernel, inputs.dtype, constants, moments.tiles)
            gradients = inputs.plan(GRADIENT_TILES[inputs.dtype.itemsize])
            constants = gradients.products | {"TILTED": tilted}
            yield configure(moment_gradient_kernel, inputs.dtype, constants, gradients.tiles)
    common = {"FEATURES": 512, "POSITIVE": True}
    yield configure(combine_moments_kernel, torch.float32, common | {"SPLITS": 256, "ROUNDED": True})
    for dtype in _TRITON_DTYPES.values():
        constants = common | {"SPLITS": splits_at_once(256, 512), "DTYPE": dtype}
        yield configure(combine_gradients_kernel, torch.float32, constants)
