"""How many threads compute a step on a CPU: as many as help, which a machine with other work changes."""

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

_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # in the environment: then the user chose
_TRIED = 3  # steps by another number of threads
_HOPELESS = 1.5  # times what the steps take now, beyond which a trial ends
_SETTLING = 4  # as much, for the first step after a change
_BETTER = 0.95  # of what the steps take now, which a trial must not exceed to be followed
_CHANGED = 1.25  # times slower or faster than before, which asks for a trial
_WATCHED = 3  # latest steps, by whose median that is judged
_KNOWN = 9  # latest steps, whose median is what they take now
_TIMES_COST = 20  # time between two trials, so that they take a twentieth of it at most
_SOONER = 4  # times, where the speed has changed

_Choosing = Generator[None, float, float]  # is sent the seconds of each step


class ThreadChoice:
    """Chooses the number of threads of torch from the seconds of the steps, and again where these change.

    `add` takes those of each step. All threads begin; half as many, a quarter and so on are tried, or twice as many,
    until steps become much slower: at the start, when steps have become slower or faster, and now and then where fewer
    than all compute, as the other work may have ended. `say` gets a line for each change. Nothing is tried where
    `fixed`, where the environment names a number, and where several ranks compute.
    """

    def __init__(self, say: Callable[[str], object], *, fixed: bool) -> None:
        self._say = say
        most = torch.get_num_threads()
        self._counts = [most >> halvings for halvings in range(most.bit_length())]
        self._place = 0  # in `_counts`
        self._cost_s = 0.0  # of the last trials: how much longer their steps took
        chosen = any(name in os.environ for name in _CHOSEN_BY)
        self.fixed = fixed or chosen or most == 1 or world_size() > 1
        self._choosing = self._choose()
        next(self._choosing)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What happens inside the `with` block is a step."""
        begun = time.perf_counter()
        yield
        self.add(time.perf_counter() - begun)

    def add(self, seconds: float) -> None:
        """A step took so long; may set the number of threads for the next."""
        if not self.fixed:
            self._choosing.send(seconds)

    def _choose(self) -> _Choosing:
        now_s = yield from self._measured(inf)
        while True:
            before, before_s = self._place, now_s
            self._cost_s = 0.0
            now_s = yield from self._moved(+1, now_s)
            if self._place == before:
                now_s = yield from self._moved(-1, now_s)
            if self._place != before:
                self._say(
                    f"steps are computed by {self._threads} of {self._counts[0]} threads from now on, as they take "
                    f"{1e3 * now_s:.0f} ms so and {1e3 * before_s:.0f} ms with {self._counts[before]}; "
                    "OMP_NUM_THREADS or --train.deterministic fixes the number"
                )
            now_s = yield from self._watched(now_s)

    def _moved(self, direction: int, now_s: float) -> _Choosing:
        """Go to the fastest of fewer (1) or more threads (-1); returns the seconds of a step there."""
        best = self._place
        while 0 <= self._place + direction < len(self._counts):
            self._place += direction
            there_s = yield from self._measured(now_s)
            if there_s <= _BETTER * now_s:
                best, now_s = self._place, there_s
            elif there_s > _HOPELESS * now_s:
                break
        self._place = best
        torch.set_num_threads(self._threads)
        return now_s

    def _measured(self, now_s: float) -> _Choosing:
        """Seconds of a step by `_threads`; of few steps where they take much longer than `now_s`."""
        torch.set_num_threads(self._threads)
        times, limit_s = [(yield)], _SETTLING * now_s
        while times[-1] <= limit_s and len(times) <= _TRIED:
            times.append((yield))
            limit_s = _HOPELESS * now_s
        if now_s < inf:
            self._cost_s += max(0.0, sum(times) - len(times) * now_s)
        return median(times[1:] or times)

    def _watched(self, now_s: float) -> _Choosing:
        """Wait for the time of the next trial; returns the seconds of a step by then."""
        latest: deque[float] = deque(maxlen=_KNOWN)
        passed_s, pause_s = 0.0, _TIMES_COST * self._cost_s
        while True:
            latest.append((yield))
            passed_s += latest[-1]
            recent_s = median([*latest][-_WATCHED:])
            changed = len(latest) >= _WATCHED and not now_s / _CHANGED < recent_s < now_s * _CHANGED
            if passed_s * (_SOONER if changed else 1) >= pause_s and (changed or self._place):
                return recent_s if changed else median(latest)

    @property
    def _threads(self) -> int:
        return self._counts[self._place]
