"""Compact list of strings, for the names of millions of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


class PackedStrings:
    """Strings packed into one block of bytes: small in memory, and fast to pickle, compare and save.

    `blob`: the concatenated strings in UTF-8 (surrogateescape, as for file names). `ends`: int64 [n], end offsets.
    """

    __slots__ = ("blob", "ends")

    def __init__(self, blob: bytes, ends: NDArray[np.int64]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> PackedStrings:
        encoded = [os.fsencode(name) for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(b"".join(encoded), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.blob[start : self.ends[index]])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield os.fsdecode(self.blob[start:end])
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedStrings) and self.blob == other.blob and np.array_equal(self.ends, other.ends)

    __hash__ = None  # type: ignore[assignment]
