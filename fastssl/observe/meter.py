"""Means of loss, metrics and speed over the steps since the last log line."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import mean_over_ranks, world_size
from fastssl.methods import MethodOutput
from fastssl.observe.stopwatch import Stopwatch
from fastssl_pipelines.batch import Batch

_NONE_IN_FP16 = "gradient_norm"  # there an overflow is no fault: the scaler lowers its scale


class NonFiniteStep(NamedTuple):
    """A step whose loss or gradient is not finite."""

    step: int
    loss: float
    gradient_norm: float


class StepMeter:
    """Values stay on the device and are read once a log line: adding a step never waits for the device."""

    def __init__(self, stopwatch: Stopwatch, *, scaled: bool) -> None:
        self.stopwatch, self._scaled = stopwatch, scaled
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._on_host = torch.empty(0)
        self._steps: list[int] = []
        self._before = torch.empty(0, 0)  # rows of before a restart
        self._images = 0
        self._paused_s = 0.0
        self._begin_s = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches themselves; the time that each takes to come is "data", on a GPU only where that is idle."""
        self._begin_s = time.perf_counter()
        while True:
            self.stopwatch.start()
            batch = next(batches, None)
            if batch is None:
                return
            self.stopwatch.mark("data")
            yield batch

    def add(self, batch: Batch, output: MethodOutput) -> None:
        """Take in a step."""
        values = {"loss": output.loss.detach(), **output.metrics}
        self._names = list(values)
        self._rows.append(torch.stack([value.float() for value in values.values()]))
        self._steps.append(batch.step)
        self._images += len(batch.ids) * world_size()

    def broken(self) -> NonFiniteStep | None:
        """The first step that has a value which is not finite, if any; means over ranks, so all see it."""
        if not self._rows:
            return None
        table = self._table()
        for step, row in zip(self._steps, table.tolist(), strict=True):
            values = dict(zip(self._names, row, strict=True))
            checked = [value for name, value in values.items() if not (self._scaled and name == _NONE_IN_FP16)]
            if not all(map(math.isfinite, checked)):
                return NonFiniteStep(step, values["loss"], values["gradient_norm"])
        return None

    def read(self) -> dict[str, float]:
        """Means by name, images_per_s, shares of the time and memory_gib, and start anew; waits for the device.

        The shares are those of the stopwatch's parts in the wall time.
        """
        untold = self._untold()
        means = dict(zip(self._names, untold.mean(0).tolist(), strict=True)) if len(untold) else {}
        parts = self.stopwatch.read()
        seconds = time.perf_counter() - self._begin_s - self._paused_s
        shares = {f"share_{name}": part_s / seconds for name, part_s in parts.items()}
        means |= {"images_per_s": self._images / seconds, **shares, "memory_gib": peak_memory_bytes() / 2**30}
        self._reset()
        return means

    def state(self) -> dict[str, Any]:
        """The values that no log line has told yet, for a checkpoint; the time that they took is not kept."""
        return {"names": self._names, "values": self._untold()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, so that the next log line tells what it would have told."""
        self._names, self._before = list(state["names"]), state["values"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the `with` block does not count as time of training."""
        begin_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - begin_s

    def _untold(self) -> Tensor:
        """[steps, values], also of before a restart."""
        if not self._rows:
            return self._before
        return torch.cat([self._before, self._table()]) if len(self._before) else self._table()

    def _table(self) -> Tensor:
        """[steps, values], on the host; a log line that was checked does not wait again."""
        if len(self._on_host) < len(self._rows):
            self._on_host = mean_over_ranks(torch.stack(self._rows)).cpu()
        return self._on_host


def peak_memory_bytes() -> int:
    """The most that this process has held: of GPU memory where it uses a GPU, else of host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
