"""Launches of the read kernels: tile sizes, precision and splits of the bank; or recording them without running."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..rows import Rows, exp_is_safe

_MIN_TILES = 4  # Per split: with fewer, partial results cost more than parallelism gains
_WIDTH = 16  # Columns: 32 bytes of 16-bit rows
_MASKED_LOGITS = 4096  # Per tile: masks take registers, and the largest tiles leave none
_EFFICIENCY = 0.95  # Relative to the best split: fewer splits mean fewer partial results
_COMBINED = 2048  # Elements held by a combine program at once


class Tiles(NamedTuple):
    """Tiling of a kernel: rows and entries per tile, warps, pipeline stages."""

    rows: int
    entries: int
    warps: int
    stages: int
    limited: bool = False
    """Whether to allow 255 registers, the hardware's limit, so that ptxas does not spill to fit one more program."""

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages} | ({"maxnreg": 255} if self.limited else {})


# Largest padded C an item serves -> tiles; by (labeled, bytes per queue element). `fastssl_kernels.aot` checks them.
TILES: dict[tuple[bool, int], dict[int, Tiles]] = {
    (False, 2): {128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2), 512: Tiles(32, 32, 8, 2)},
    (False, 4): {128: Tiles(32, 32, 8, 2), 256: Tiles(32, 16, 8, 2), 512: Tiles(16, 16, 8, 1)},
    (True, 2): {128: Tiles(32, 32, 4, 2), 256: Tiles(16, 32, 4, 2), 512: Tiles(16, 32, 8, 2)},
    (True, 4): {128: Tiles(16, 32, 8, 2), 256: Tiles(16, 16, 8, 2), 512: Tiles(16, 16, 8, 1)},
}


_Note = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_note: _Note | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel; inside `noted_launches` only record it."""
    if _note is None:
        kernel[grid](*arguments, **options)
    else:
        _note(kernel, arguments, options)


@contextmanager
def noted_launches(note: _Note) -> Iterator[None]:
    """Inside the `with` block launch nothing and call `note` with each kernel, its arguments and its options.

    The losses then run without a GPU on any device, "meta" included, and their results are meaningless.
    """
    global _note
    previous, _note = _note, note
    try:
        yield
    finally:
        _note = previous


class Plan(NamedTuple):
    """One launch of a read kernel."""

    tiles: Tiles
    splits: int
    split_length: int
    """Entries per split."""
    constants: dict[str, Any]

    @property
    def products(self) -> dict[str, Any]:
        """The constants for a kernel that sums no exponentials."""
        return {name: self.constants[name] for name in ("ROWS", "ENTRIES", "FEATURES", "FULL", "PRECISION")}

    def grid(self, rows: int) -> tuple[int, int]:
        """Grid: blocks of rows x splits."""
        return triton.cdiv(rows, self.tiles.rows), self.splits


def make_plan(
    rows: int,
    entries: int,
    features: int,
    dtype: torch.dtype,
    table: dict[int, Tiles],
    *,
    temperature: float,
    processors: int,
) -> Plan:
    """Partition [rows] x [entries] so that the programs fill the processors and each has a few tiles."""
    padded = pad_features(features)
    tiles = table[min(size for size in table if size >= padded)]
    masked = entries % tiles.entries != 0 or features != padded
    if masked and tiles.rows * tiles.entries >= _MASKED_LOGITS:
        tiles = tiles._replace(entries=tiles.entries // 2)
    count = triton.cdiv(entries, tiles.entries)
    split_length = triton.cdiv(count, choose_splits(triton.cdiv(rows, tiles.rows), count, processors))
    constants = {
        "ROWS": tiles.rows,
        "ENTRIES": tiles.entries,
        "FEATURES": padded,
        "FULL": entries % tiles.entries == 0 and features == padded,
        # float16 weights need the maximum at any temperature: their range is 6e-8 to 65504
        "ONLINE": dtype == torch.float16 or not exp_is_safe(temperature, entries),
        "ROUNDED": dtype.itemsize == 2,
        "PRECISION": precision(padded),
    }
    return Plan(tiles, triton.cdiv(count, split_length), split_length * tiles.entries, constants)


@functools.cache
def choose_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """The fewest splits of a bank of `tiles` that keep the processors nearly as busy as the best split."""
    candidates = range(1, max(1, min(tiles // _MIN_TILES, 2 * processors)) + 1)
    efficiency = [wave_efficiency(row_blocks, tiles, splits, processors) for splits in candidates]
    enough = _EFFICIENCY * max(efficiency)
    return next(splits for splits, reached in zip(candidates, efficiency, strict=True) if reached >= enough)


def wave_efficiency(row_blocks: int, tiles: int, splits: int, processors: int) -> float:
    """Fraction of the processors' time spent working, if each runs one program at a time."""
    split_length = triton.cdiv(tiles, splits)
    programs = row_blocks * triton.cdiv(tiles, split_length)
    return row_blocks * tiles / (triton.cdiv(programs, processors) * processors * split_length)


def pad_columns(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of rows [..., C] to pad C with zeros to a multiple of 16, which changes no product.

    Loads of 16 bytes need it; otherwise they are scalar and some tiles spill.
    """

    @functools.wraps(function)
    def run(rows: Tensor, *given: Any) -> Any:
        features = rows.shape[1]
        width = triton.cdiv(features, _WIDTH) * _WIDTH
        if width == features:
            return function(rows, *given)

        def widen(value: Any) -> Any:
            is_rows = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
            return F.pad(value, (0, width - features)) if is_rows else value

        def narrow(value: Tensor) -> Tensor:
            return value[:, :features].contiguous() if value.is_floating_point() and value.ndim > 1 else value

        result = function(*map(widen, (rows, *given)))
        if isinstance(result, Tensor):
            return narrow(result)
        return Rows(*map(narrow, result)) if isinstance(result, Rows) else tuple(map(narrow, result))

    return run


def pad_features(features: int) -> int:
    """Width of a tile: a power of two, at least 16, as products need."""
    return max(16, triton.next_power_of_2(features))


def splits_at_once(splits: int, features: int) -> int:
    """Partial rows that a combine program loads at once."""
    return min(triton.next_power_of_2(splits), _COMBINED // pad_features(features))


TF32_MAX_FEATURES = 256
H100_PROCESSORS = 132


def precision(features: int) -> str:
    """Precision of float32 products: TF32 only if the user allowed it for torch, and up to 256 features.

    With Triton 3.8, TF32 on wider tiles needs more shared memory than sm_120 has.
    """
    if features <= TF32_MAX_FEATURES and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if features <= 128 else "ieee"  # Three TF32 products of wider tiles spill


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 16 for the interpreter, so that small tests split the queue."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return H100_PROCESSORS if device.type == "meta" else 16
