"""When worker processes start a batch, on a CPU whose cores all compute the training step.

During a step, a worker takes a core from one of the step's threads, and all other threads wait for that one: input and
step at the same time measured 10 to 14 % slower than one after the other. So each worker starts one batch whenever the
consumer has to wait.
"""

from __future__ import annotations

import os
from multiprocessing.context import BaseContext

import torch

_AT_MOST_S = 0.5  # Longest wait of a worker; the input hardly slows a step that takes longer


class Turns:
    """Turns between the consumer and the worker processes; at first, workers may start a batch at any time."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._workers = workers
        self._free = context.Event()
        self._turns = context.Semaphore(0)
        self._free.set()

    def wait(self) -> None:
        """In a worker process: wait until it may start a batch, at most half a second."""
        if not self._free.is_set():
            self._turns.acquire(timeout=_AT_MOST_S)

    def give(self) -> None:
        """In the waiting consumer: let each worker start one batch, or any number if torch leaves cores free."""
        if torch.get_num_threads() < cores():
            self.end()
            return
        self._free.clear()
        while self._turns.acquire(block=False):
            pass  # Take back unused turns, so that they do not add up
        self._let_each_begin()

    def end(self) -> None:
        """Let workers start at any time from now on."""
        if not self._free.is_set():
            self._free.set()
            self._let_each_begin()  # Wake those that wait

    def _let_each_begin(self) -> None:
        for _ in range(self._workers):
            self._turns.release()


def cores() -> int:
    """Number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
