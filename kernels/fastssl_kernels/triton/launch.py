"""Run the kernels: tile sizes, splits of the queue, buffers. Same interface as `blockwise`."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..blockwise import Rows
from ..numerics import fits_unshifted
from .combine import combine_kernel
from .labelled_read import labelled_read_kernel
from .read import read_kernel

_MIN_TILES = 4  # per split: below, partial results cost more than the parallelism gains
COMBINE_ROWS = 4


class Tiles(NamedTuple):
    """How a read kernel is cut: query rows and queue entries per tile, warps, pipeline stages."""

    rows: int
    entries: int
    warps: int
    stages: int


# Largest padded C an entry serves -> tiles; by (labelled, bytes per queue element). Nothing spills on sm_90;
# on sm_80 24 bytes do in the labelled 16-bit kernel with the online maximum.
TILES: dict[tuple[bool, int], dict[int, Tiles]] = {
    (False, 2): {128: Tiles(128, 64, 8, 2), 256: Tiles(64, 64, 8, 2), 512: Tiles(32, 32, 8, 2)},
    (False, 4): {128: Tiles(32, 32, 8, 2), 256: Tiles(32, 16, 8, 2), 512: Tiles(16, 16, 8, 2)},
    (True, 2): {128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 2), 512: Tiles(16, 32, 8, 2)},
    (True, 4): {128: Tiles(16, 32, 8, 2), 256: Tiles(16, 16, 8, 2), 512: Tiles(16, 16, 8, 2)},
}


class Plan(NamedTuple):
    """One launch of a read kernel."""

    tiles: Tiles
    splits: int
    share: int
    constants: dict[str, Any]


def info_nce_rows(query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool) -> Rows:
    """InfoNCE; arguments as in `fastssl_kernels.info_nce`."""
    return _rows(query, key, queue, None, temperature, return_accuracy)


def unicon_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    """UniCon; arguments as in `fastssl_kernels.unicon`."""
    labels = (query_labels.contiguous(), queue_labels.contiguous())
    return _rows(query, key, queue, labels, temperature, return_accuracy)


def make_plan(
    rows: int,
    entries: int,
    features: int,
    dtype: torch.dtype,
    *,
    labelled: bool,
    temperature: float,
    accuracy: bool,
    processors: int,
) -> Plan:
    """Cut [rows] x [entries] so that the programs fill the processors and each has a few tiles."""
    padded = max(16, triton.next_power_of_2(features))
    table = TILES[labelled, dtype.itemsize]
    tiles = table[min(size for size in table if size >= padded)]
    count = triton.cdiv(entries, tiles.entries)
    wanted = max(1, min(processors // triton.cdiv(rows, tiles.rows), count // _MIN_TILES))
    share = triton.cdiv(count, wanted) * tiles.entries
    constants = {
        "ROWS": tiles.rows,
        "ENTRIES": tiles.entries,
        "FEATURES": padded,
        "FULL": entries % tiles.entries == 0 and features == padded,
        # float16 weights need the maximum at any temperature: they hold nothing above 65504 or below 6e-8.
        "ONLINE": dtype == torch.float16 or not fits_unshifted(temperature, entries, torch.float32),
        "ROUNDED": dtype.itemsize == 2,
        "ACCURACY": accuracy,
        "PRECISION": _precision(padded),
    }
    return Plan(tiles, triton.cdiv(entries, share), share, constants)


def _rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    query, key = query.contiguous(), key.contiguous()
    queue = queue if queue.stride(1) == 1 else queue.contiguous()
    (rows, features), entries = query.shape, len(queue)
    plan = make_plan(
        rows,
        entries,
        features,
        queue.dtype,
        labelled=labels is not None,
        temperature=temperature,
        accuracy=return_accuracy,
        processors=_processors(query.device),
    )
    scale = math.log2(math.e) / temperature
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    sides = 2 if labels is not None else 1
    lse, mean = empty(sides, plan.splits, rows), empty(sides, plan.splits, rows, features)
    largest = empty(plan.splits, rows) if return_accuracy else lse
    sizes = (scale, rows, entries, features, queue.stride(0), plan.share)
    grid = (triton.cdiv(rows, plan.tiles.rows), plan.splits)
    options = {"num_warps": plan.tiles.warps, "num_stages": plan.tiles.stages, **plan.constants}
    if labels is None:
        read_kernel[grid](query, queue, lse, mean, largest, *sizes, **options)
    else:
        labelled_read_kernel[grid](query, queue, *labels, lse[0], mean[0], lse[1], mean[1], largest, *sizes, **options)
    out = Rows(empty(rows), empty(rows, features), empty(rows if return_accuracy else 0))
    combine_kernel[(triton.cdiv(rows, COMBINE_ROWS),)](
        query, key, lse[0], mean[0], lse[-1], mean[-1], largest, *out,
        scale, 1 / temperature, rows, features, plan.splits,
        ROWS=COMBINE_ROWS,
        FEATURES=plan.constants["FEATURES"],
        LABELLED=labels is not None,
        ACCURACY=return_accuracy,
    )  # fmt: skip
    return out


def _precision(features: int) -> str:
    """How float32 products are taken: TF32 only where the user allowed it, as for torch's own."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if features <= 128 else "ieee"  # three TF32 products of wider tiles spill


@functools.cache
def _processors(device: torch.device) -> int:
    # The interpreter has none; 16 lets small tests split the queue.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
