"""Means of loss, metrics and speed over the steps since the last log line."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from fastssl.methods import MethodOutput
from fastssl_pipelines.batch import Batch


class Window:
    """Sums on the device, read once a log line: adding a step never waits for the device."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._wait_s = self._work_s = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches themselves; the time that each takes to come counts as waiting for data."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._mark = time.perf_counter()
            self._wait_s += self._mark - asked
            if batch is None:
                return
            self._images += len(batch.ids)
            yield batch

    def add(self, output: MethodOutput) -> None:
        """Take in the step of the batch that came last."""
        for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._count_work()

    def read(self) -> dict[str, float]:
        """Means by name, `images_per_s` and `data_wait` (share of the time), and start anew; waits for the device."""
        means = {name: float(total) / self._steps for name, total in self._sums.items()}
        self._count_work()
        seconds = self._wait_s + self._work_s
        means |= {"images_per_s": self._images / seconds, "data_wait": self._wait_s / seconds}
        self._reset()
        return means

    def _count_work(self) -> None:
        now = time.perf_counter()
        self._work_s += now - self._mark
        self._mark = now
