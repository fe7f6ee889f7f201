"""The time of each part of a step, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise

import torch


class Stopwatch:
    """Measures seconds by part of a step: `start` begins a step, and each `mark` ends the part that it names.

    A part may occur several times; its times add up. On a GPU, CUDA events separate the parts, so the times are the
    device's, even while the host runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step; the time from here belongs to the part that the next mark names."""
        self._add(None)

    def mark(self, part: str) -> None:
        """End `part`, which began at the previous mark."""
        self._add(part)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call; on a GPU, waits for the last mark."""
        marks, self._marks = self._marks, []
        seconds: defaultdict[str, float] = defaultdict(float)
        if marks and isinstance(marks[-1][1], torch.cuda.Event):
            marks[-1][1].synchronize()
        for (_, begin), (part, end) in pairwise(marks):
            if part is not None:
                seconds[part] += _between(begin, end)
        return dict(seconds)

    def _add(self, part: str | None) -> None:
        if not self._on_gpu:
            self._marks.append((part, time.perf_counter()))
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1e3
