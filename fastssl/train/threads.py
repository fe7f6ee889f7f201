"""How many threads compute a step on a CPU: as many as help, which a machine with other work changes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from fastssl.train.distributed import world_size

_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # in the environment: then the user chose
_TRIED = 3  # steps by each number of threads
_HOPELESS = 1.5  # of the best time so far, beyond which still fewer threads are not tried
_SETTLING = 1  # steps after a change, which are not measured
_WATCHED = 20  # latest steps, by whose median the rate is judged
_SLOWER = 1.25  # than measured before, which asks for another measurement
_BETTER = 0.95  # of the time with more threads, which fewer must not take
_PATIENCE = 200  # steps between two measurements, so that they take little of the time


class ThreadChoice:
    """Chooses the number of threads of torch from the seconds of the steps, and again where they become slower.

    `add` is told of each step. First a few steps are made by each candidate: all threads, then half of them, to one.
    The most threads win unless fewer are faster. Where fewer than all were chosen it is tried again now and then, as
    the other work may have ended. `say` gets a line for each change. Nothing is tried where `fixed`, or where the
    environment names a number, and where several ranks compute.
    """

    def __init__(self, say: Callable[[str], object], *, fixed: bool) -> None:
        self._say = say
        self.most = torch.get_num_threads()
        chosen = any(name in os.environ for name in _CHOSEN_BY)
        self.fixed = fixed or chosen or self.most == 1 or world_size() > 1
        self._latest: deque[float] = deque(maxlen=_WATCHED)
        self._since = 0
        self._expected_s = 0.0
        self._chosen = self.most
        self._start()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What happens inside the `with` block is a step."""
        begun = time.perf_counter()
        yield
        self.add(time.perf_counter() - begun)

    def add(self, seconds: float) -> None:
        """A step took so long; may set the number of threads for the next."""
        if self.fixed:
            return
        if self._candidates:
            self._try(seconds)
            return
        self._latest.append(seconds)
        self._since += 1
        slower = len(self._latest) == _WATCHED and median(self._latest) > _SLOWER * self._expected_s
        if self._since >= _PATIENCE and (slower or self._chosen < self.most):
            self._start()

    def _start(self) -> None:
        self._candidates = [self.most >> halvings for halvings in range(self.most.bit_length())]
        self._times: dict[int, list[float]] = {}
        self._skip = _SETTLING
        if not self.fixed:
            torch.set_num_threads(self._candidates[0])

    def _try(self, seconds: float) -> None:
        if self._skip:
            self._skip -= 1
            return
        times = self._times.setdefault(self._candidates[0], [])
        times.append(seconds)
        if len(times) < _TRIED:
            return
        self._candidates.pop(0)
        self._skip = _SETTLING
        if median(times) > _HOPELESS * min(map(median, self._times.values())):
            self._candidates.clear()
        if not self._candidates:
            self._choose()
        torch.set_num_threads(self._candidates[0] if self._candidates else self._chosen)

    def _choose(self) -> None:
        taken = {count: median(times) for count, times in self._times.items()}
        best, before = self.most, self._chosen
        for count, seconds in taken.items():
            if seconds < _BETTER * taken[best]:
                best = count
        self._chosen, self._expected_s, self._since = best, taken[best], 0
        self._latest.clear()
        if best != before:
            measured = ", ".join(f"{1e3 * seconds:.0f} ms with {count}" for count, seconds in taken.items())
            self._say(
                f"steps are computed by {best} of {self.most} threads from now on, as they take {measured}; "
                "OMP_NUM_THREADS or --train.deterministic fixes the number"
            )
