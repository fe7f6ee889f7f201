"""What reads a bank along a direction: CO2's consistency loss, and the gradient of a queue read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import LOG2_E
from ..rows import Rows
from .combine_consistency import combine_gradients_kernel, combine_moments_kernel
from .configuration import Configuration, configure, every_input
from .launch import Plan, Tiles, launch, make_plan, pad_columns, pad_features, processors, splits_at_once
from .moment_read import moment_gradient_kernel, moment_read_kernel
from .reads import with_unit_stride

# As launch.TILES: largest padded C an entry serves -> tiles; by bytes per bank element. The first reading sums along
# rows all the time, which few warps do with fewer exchanges.
MOMENT_TILES: dict[int, dict[int, Tiles]] = {
    2: {128: Tiles(64, 64, 4, 2), 256: Tiles(32, 64, 4, 2), 512: Tiles(16, 32, 4, 2)},
    4: {128: Tiles(16, 64, 8, 2), 256: Tiles(32, 32, 8, 2), 512: Tiles(16, 16, 8, 2)},
}
GRADIENT_TILES: dict[int, dict[int, Tiles]] = {
    2: {128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 32, 8, 2)},
    4: {128: Tiles(16, 16, 4, 2), 256: Tiles(16, 16, 8, 2), 512: Tiles(8, 16, 8, 1)},
}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Reader(NamedTuple):
    """Rows, their directions, and the bank that is read twice; see `moment_read`."""

    query: Tensor
    direction: Tensor
    bank: Tensor
    temperature: float
    tilted: bool

    def moments(self) -> Tensor:
        """[2, 4 or 7; splits, rows]: what the splits saw at the first reading."""
        plan = self._plan(MOMENT_TILES)
        out = self.empty((7 if plan.constants["ROUNDED"] else 4) if self.tilted else 2, plan.splits, len(self.query))
        launch(
            moment_read_kernel, plan.grid(len(self.query)),
            self.query, self.direction, self.bank, out, *self._scales(), *self._sizes(), plan.share,
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
            *self._scales(), scale, *self._sizes(), plan.share,
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
    """[N, C]: the gradient of lse [N] and mean [N, C] of `fastssl_kernels.queue_read` with respect to the query."""
    mean_upstream = mean_upstream.contiguous()
    # At most 1 in each row: a loss scaler may have lifted the upstream out of the range of a 16-bit bank.
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
    """The power of 2 that lifts weights up to `largest` to the upper end of float16, which drops small ones."""
    return 2.0 ** math.floor(math.log2(2**15 / largest))


def configurations() -> Iterator[Configuration]:
    """What the kernels here are compiled for."""
    for inputs in every_input():
        # Without the tilt the same tiles have less to do.
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
