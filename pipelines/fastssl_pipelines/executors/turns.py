"""When worker processes begin a batch, on a CPU whose cores all compute the training step as well.

Beside a step they take a core from one of its threads, for which all the others then wait: input and step together were
seen to be 10 to 14 % slower than one after the other. So they begin one each when the consumer has to wait for a batch.
"""

from __future__ import annotations

import os
from multiprocessing.context import BaseContext

import torch

_AT_MOST_S = 0.5  # That a worker waits: a step that takes longer is hardly held up by the input


class Turns:
    """Between the consumer of batches and the processes that make them, which may begin at any time at first."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._workers = workers
        self._free = context.Event()
        self._turns = context.Semaphore(0)
        self._free.set()

    def wait(self) -> None:
        """In a worker process: wait until a batch may be begun, for half a second at most."""
        if not self._free.is_set():
            self._turns.acquire(timeout=_AT_MOST_S)

    def give(self) -> None:
        """The consumer waits: each worker may begin a batch, or all they like where torch leaves cores to them."""
        if torch.get_num_threads() < cores():
            self.end()
            return
        self._free.clear()
        while self._turns.acquire(block=False):
            pass  # What is left of the last time, so that they never have more
        self._let_each_begin()

    def end(self) -> None:
        """Workers may begin at any time from now on."""
        if not self._free.is_set():
            self._free.set()
            self._let_each_begin()  # Those that wait

    def _let_each_begin(self) -> None:
        for _ in range(self._workers):
            self._turns.release()


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
