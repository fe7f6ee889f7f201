"""Where the time of a step goes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise

import torch


class Stopwatch:
    """Seconds by part of a step: `start` begins a step and each `mark` ends the part that it names.

    A part may have several stretches, which add up. On a GPU, CUDA events stand between the parts, so the seconds are
    those of the device and cover what it does while the host is ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """What follows belongs to the part that the next mark names."""
        self._add(None)

    def mark(self, part: str) -> None:
        """End a stretch of `part`."""
        self._add(part)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call; on a GPU it waits for the marks that were made."""
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
