"""How a bank is streamed: blocks of entries against chunks of rows.

A block's logits are [entries, rows] and the sums [features, rows]: the bank then enters both products as it
lies in memory, and sums over entries run along whole rows. Logits are in base 2, because `exp2` is cheaper
than `exp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..rows import LOG2_E, accumulation_dtype

_CPU_ROWS = 256
# Of each thread: its 4 MiB of float32 stay in a cache between passes, and blocks are few. At each operation the
# threads wait for each other, which is what costs on a busy machine.
_CPU_LOGITS = 2**20
_DEVICE_LOGITS = 2**25  # elsewhere a block must outweigh its launches
_MAX_BLOCK = 2**14  # bounds the float32 copy of a block
_CENTERED = 2**10


class Bank:
    """Entries less a center, about their mean, in the dtype of products with `rows`.

    A center moves all logits of a row by one amount, which no loss sees. But the less entries have in common,
    the fewer digits are lost in differences of logits and of means.
    """

    def __init__(self, rows: Tensor, *parts: Tensor) -> None:
        self._parts = parts
        self._dtype = accumulation_dtype(rows.dtype)
        # What is not finite stays in its entry: in the center it would hide which entries are.
        self.center = parts[-1][:_CENTERED].to(self._dtype).mean(0).nan_to_num(0, 0, 0)
        """[C]"""

    def centered(self, entries: Tensor) -> Tensor:
        """Entries of another origin as if they were this bank's."""
        return entries.to(self._dtype) - self.center

    def whole(self, rows: Tensor) -> Tensor | None:
        """[K, C]: the entries, not centered, where they lie on a CPU as one matrix of the products' dtype."""
        (first, *others) = self._parts
        usable = rows.is_cpu and not others and first.dtype == self._dtype and first.is_contiguous()
        return first if usable else None

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Where in its part each block lies, and the block; `rows` are those that it will be multiplied with."""
        size = _block_length(rows)
        buffer = rows.new_empty(size, rows.shape[1], dtype=self._dtype)
        for part in self._parts:
            for here in _slices(len(part), size):
                yield here, torch.sub(part[here], self.center, out=buffer[: here.stop - here.start])


class Products:
    """Products of blocks with a chunk of rows, in one buffer: the next product overwrites the last."""

    def __init__(self, rows: Tensor) -> None:
        self._columns = rows.T.contiguous()
        self._buffer = rows.new_empty(_block_length(rows), len(rows))

    def __call__(self, block: Tensor) -> Tensor:
        """[entries, rows]"""
        return torch.mm(block, self._columns, out=self._buffer[: len(block)])


def in_base_2(rows: Tensor, temperature: float) -> Tensor:
    """Rows whose products with an entry are logits in base 2."""
    return rows.to(accumulation_dtype(rows.dtype)) * (LOG2_E / temperature)


def row_chunks(rows: Tensor) -> list[slice]:
    """All rows at once, except where a block of logits must fit a cache."""
    return _slices(len(rows), _chunk_length(rows))


def by_chunks(rows: Tensor, compute: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `compute` returns for chunks of the rows, joined to what it would return for all."""
    parts = [compute(chunk) for chunk in row_chunks(rows)]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def matches(entry_labels: Tensor, row_labels: Tensor) -> Tensor | None:
    """[entries, rows]: whether the labels agree; None where it is cheap to see that none do."""
    # Elsewhere than on the CPU looking would wait for the device.
    if row_labels.is_cpu and not torch.isin(entry_labels, row_labels).any():
        return None
    return entry_labels[:, None] == row_labels


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _chunk_length(rows: Tensor) -> int:
    return _CPU_ROWS if rows.is_cpu else len(rows)


def _block_length(rows: Tensor) -> int:
    """Entries at a time, for these rows or a chunk of them."""
    logits = _CPU_LOGITS * torch.get_num_threads() if rows.is_cpu else _DEVICE_LOGITS
    return max(1, min(logits // min(len(rows), _chunk_length(rows)), _MAX_BLOCK))
