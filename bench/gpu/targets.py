"""The targets on a GPU, and how each follows from the results of a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Numbers = Mapping[str, Any]

SMALL, LARGE = "256x65536x128", ("1024x65536x128", "4096x65536x128")


class Target(NamedTuple):
    """A limit; `measured` takes it from a part's results, None if it is missing there."""

    text: str
    part: str
    limit: float
    unit: str
    measured: Callable[[Numbers], float | None]
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def margin(self, value: float) -> float:
        """How much better than the limit the value is, as a fraction of the limit; negative if it is worse."""
        return (value - self.limit) / self.limit * (-1 if self.at_most else 1)


def _rows(numbers: Numbers, shapes: Sequence[str], column: str) -> Iterator[Numbers]:
    """The row of each measured shape, for replayed graphs with the queue in L2, as the targets require."""
    for shape in shapes:
        for row in numbers.get(shape, {}).get("rows", ()):
            mode = row["column"], row["launch"], row["cache"], row["loss"]
            if mode == (column, "graph", "warm", "info_nce") and row["median_ms"] is not None:
                yield row


def _small_us(numbers: Numbers) -> float | None:
    return next((1e3 * row["median_ms"] for row in _rows(numbers, [SMALL], "fastssl")), None)


def _matmul_share(numbers: Numbers) -> float | None:
    """Rate of the two N x K x C products in percent of a large matrix product's, measured in the same process."""

    def share(row: Numbers) -> float:
        operations = 4 * math.prod(map(int, row["shape"].split("x")))
        return 100 * operations / (1e-3 * row["median_ms"]) / (1e12 * numbers[row["shape"]]["matmul_tflops"])

    return min(map(share, _rows(numbers, LARGE, "fastssl")), default=None)


def _times_faster_than(column: str) -> Callable[[Numbers], float | None]:
    return lambda numbers: min((row["ratio_to_ours"] for row in _rows(numbers, LARGE, column)), default=None)


def _memory_mb(numbers: Numbers) -> float | None:
    return max((row["memory_bytes"] / 1e6 for row in _rows(numbers, (SMALL, *LARGE), "fastssl")), default=None)


def _number(*path: str) -> Callable[[Numbers], float | None]:
    def found(numbers: Numbers) -> float | None:
        value: Any = numbers
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return found


TARGETS = (
    Target(f"info_nce at {SMALL}, loss and gradient", "losses", 22, "us", _small_us, at_most=True),
    Target("share of the measured matmul rate, N >= 1024", "losses", 60, "%", _matmul_share),
    Target("faster than eager autocast, N >= 1024", "losses", 15, "x", _times_faster_than("eager-autocast")),
    Target("faster than torch.compile, N >= 1024", "losses", 3, "x", _times_faster_than("compile-autocast")),
    Target("faster than a flash attention read, N >= 1024", "losses", 1.15, "x", _times_faster_than("sdpa-flash")),
    Target("memory beyond the inputs", "losses", 20, "MB", _memory_mb, at_most=True),
    Target("loss, EMA, queue and optimizer of a ResNet-50 step", "step", 3, "%", _number("resnet50", "beside"), True),
    Target("images/s of the supervised ResNet-50 step", "step", 0.675, "x", _number("resnet50", "of supervised")),
    Target("faster than lightly's loop at 32 px, end to end", "small", 10, "x", _number("end to end", "times faster")),
)
