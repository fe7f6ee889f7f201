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

_UNCHECKED_IN_FP16 = "gradient_norm"  # An overflow in fp16 is normal: the scaler lowers its scale


class NonFiniteStep(NamedTuple):
    """A step with a non-finite loss or gradient; `step` counts from 0."""

    step: int
    loss: float
    gradient_norm: float


class NonFiniteError(Exception):
    """Raised at the next check after a step with a non-finite loss or gradient; `step` is the first of them."""

    def __init__(self, step: NonFiniteStep):
        super().__init__(step)
        self.step = step


class StepMeter:
    """Collects the values of steps on the device; only reading them, once a log line, waits for the device."""

    def __init__(self, stopwatch: Stopwatch, *, scaled: bool) -> None:
        self.stopwatch, self._scaled = stopwatch, scaled
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._on_host = torch.empty(0)
        self._steps: list[int] = []
        self._restored = torch.empty(0, 0)  # Rows from before a restart
        self._images = 0
        self._paused_s = 0.0
        self._begin_s = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass the batches through, counting the wait for each as "data"; on a GPU, only while the GPU is idle."""
        self._begin_s = time.perf_counter()
        while True:
            self.stopwatch.start()
            batch = next(batches, None)
            if batch is None:
                return
            self.stopwatch.mark("data")
            yield batch

    def add(self, batch: Batch, output: MethodOutput) -> None:
        """Record a step."""
        values = {"loss": output.loss.detach(), **output.metrics}
        self._names = list(values)
        self._rows.append(torch.stack([value.float() for value in values.values()]))
        self._steps.append(batch.step)
        self._images += len(batch.ids) * world_size()

    def require_finite(self) -> None:
        """Raise NonFiniteError for the first step with a non-finite value; means over ranks, so all ranks agree."""
        if not self._rows:
            return
        table = self._table()
        for step, row in zip(self._steps, table.tolist(), strict=True):
            values = dict(zip(self._names, row, strict=True))
            checked = [value for name, value in values.items() if not (self._scaled and name == _UNCHECKED_IN_FP16)]
            if not all(map(math.isfinite, checked)):
                raise NonFiniteError(NonFiniteStep(step, values["loss"], values["gradient_norm"]))

    def read(self) -> dict[str, float]:
        """Return means by name, images_per_s, share_PART and memory_gib, and reset; waits for the device.

        share_PART is the fraction of the wall time that the stopwatch's part took.
        """
        unlogged = self._unlogged()
        means = dict(zip(self._names, unlogged.mean(0).tolist(), strict=True)) if len(unlogged) else {}
        parts = self.stopwatch.read()
        seconds = time.perf_counter() - self._begin_s - self._paused_s
        shares = {f"share_{name}": part_s / seconds for name, part_s in parts.items()}
        means |= {"images_per_s": self._images / seconds, **shares, "memory_gib": peak_memory_bytes() / 2**30}
        self._reset()
        return means

    def state(self) -> dict[str, Any]:
        """The values not logged yet, for a checkpoint; their timing is dropped."""
        return {"names": self._names, "values": self._unlogged()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, so that the next log line has the same means as without a restart."""
        self._names, self._restored = list(state["names"]), state["values"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the `with` block from the training time."""
        begin_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - begin_s

    def _unlogged(self) -> Tensor:
        """[steps, values], including steps from before a restart."""
        if not self._rows:
            return self._restored
        return torch.cat([self._restored, self._table()]) if len(self._restored) else self._table()

    def _table(self) -> Tensor:
        """[steps, values] on the host; cached, so that reading after a check does not wait again."""
        if len(self._on_host) < len(self._rows):
            self._on_host = mean_over_ranks(torch.stack(self._rows)).cpu()
        return self._on_host


def peak_memory_bytes() -> int:
    """Peak memory of this process: GPU memory if it uses a GPU, else host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
