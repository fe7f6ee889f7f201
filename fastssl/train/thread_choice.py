"""Chooses how many CPU threads compute a step, adapting to other load on the machine."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from math import inf
from statistics import median

import torch

from fastssl.distributed import world_size

_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # If either is set, the user chose
_TRIED = 3  # Steps per trial of another thread count
_HOPELESS = 1.5  # Times the current step time, above which a trial ends
_SETTLING = 4  # Likewise, for the first step after a change
_BETTER = 0.95  # Times the current step time, which a trial must reach to be adopted
_CHANGED = 1.25  # Slowdown or speedup that triggers a trial
_WATCHED = 3  # Latest steps, whose median decides that
_KNOWN = 9  # Latest steps, whose median is the current step time
_TIMES_COST = 20  # Pause between trials in units of their cost, so that they take at most a twentieth of the time
_SOONER = 4  # Times sooner if the speed has changed

_Choosing = Generator[None, float, float]  # Receives the seconds of each step


class ThreadChoice:
    """Chooses torch's number of threads from the times of the steps, and revises it when they change.

    `add` takes the time of each step. It starts with all threads and tries a half, a quarter and so on, or twice as
    many, until steps become much slower: at the start, when step times change, and from time to time while fewer than
    all threads compute, since the other load may have ended. `info` gets a line for each change. Nothing is tried if
    `fixed`, if the environment sets the number of threads, or with several ranks.
    """

    def __init__(self, info: Callable[[str], object], *, fixed: bool) -> None:
        self._info = info
        most = torch.get_num_threads()
        self._counts = [most >> halvings for halvings in range(most.bit_length())]
        self._index = 0  # Into `_counts`
        self._cost_s = 0.0  # How much longer the steps of the last trials took
        chosen = any(name in os.environ for name in _CHOSEN_BY)
        self.fixed = fixed or chosen or most == 1 or world_size() > 1
        self._choosing = self._choose()
        next(self._choosing)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the `with` block as one step."""
        begun = time.perf_counter()
        yield
        self.add(time.perf_counter() - begun)

    def add(self, seconds: float) -> None:
        """Record the time of a step; may change the number of threads for the next."""
        if not self.fixed:
            self._choosing.send(seconds)

    def _choose(self) -> _Choosing:
        now_s = yield from self._measured(inf)
        while True:
            before, before_s = self._index, now_s
            self._cost_s = 0.0
            now_s = yield from self._moved(+1, now_s)
            if self._index == before:
                now_s = yield from self._moved(-1, now_s)
            if self._index != before:
                self._info(
                    f"steps now run on {self._threads} of {self._counts[0]} threads and take {1e3 * now_s:.0f} ms "
                    f"(with {self._counts[before]} threads {1e3 * before_s:.0f} ms); OMP_NUM_THREADS or "
                    "--train.deterministic fixes the number"
                )
            now_s = yield from self._watched(now_s)

    def _moved(self, direction: int, now_s: float) -> _Choosing:
        """Switch to the fastest of fewer (1) or more threads (-1); returns the step time there."""
        best = self._index
        while 0 <= self._index + direction < len(self._counts):
            self._index += direction
            there_s = yield from self._measured(now_s)
            if there_s <= _BETTER * now_s:
                best, now_s = self._index, there_s
            elif there_s > _HOPELESS * now_s:
                break
        self._index = best
        torch.set_num_threads(self._threads)
        return now_s

    def _measured(self, now_s: float) -> _Choosing:
        """The step time with `_threads`, measured on fewer steps if they take much longer than `now_s`."""
        torch.set_num_threads(self._threads)
        times, limit_s = [(yield)], _SETTLING * now_s
        while times[-1] <= limit_s and len(times) <= _TRIED:
            times.append((yield))
            limit_s = _HOPELESS * now_s
        if now_s < inf:
            self._cost_s += max(0.0, sum(times) - len(times) * now_s)
        return median(times[1:] or times)

    def _watched(self, now_s: float) -> _Choosing:
        """Wait until the next trial is due; returns the step time at that point."""
        latest: deque[float] = deque(maxlen=_KNOWN)
        passed_s, pause_s = 0.0, _TIMES_COST * self._cost_s
        while True:
            latest.append((yield))
            passed_s += latest[-1]
            recent_s = median([*latest][-_WATCHED:])
            changed = len(latest) >= _WATCHED and not now_s / _CHANGED < recent_s < now_s * _CHANGED
            if passed_s * (_SOONER if changed else 1) >= pause_s and (changed or self._index):
                return recent_s if changed else median(latest)

    @property
    def _threads(self) -> int:
        return self._counts[self._index]
