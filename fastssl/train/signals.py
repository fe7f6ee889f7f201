"""Signals as a request to stop after the step at hand, on which all ranks agree."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from fastssl.distributed import cpu_group, world_size

EXIT_STOPPED = 75  # EX_TEMPFAIL: schedulers can requeue on it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST_S = 1.0  # Ctrl-C reaches a rank from the terminal and once more from torchrun


def ignore_requests() -> None:
    """Take no further request to stop; for the last moments of a process, whose exit code is settled."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Context manager around a run; after a signal `agreed` is true, at the same step on all ranks.

    A second signal, a second later or more, ends the process as usual. After a signal the handlers stay when the `with`
    block ends: what a run writes at its end must not be cut off by the second half of the same request.
    """

    def __init__(self) -> None:
        self._received_s: float | None = None
        self._votes: tuple[torch.Tensor, dist.Work] | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> StopRequest:
        if world_size() > 1:
            self._group = cpu_group()
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._received_s is None:
            self._restore()
        if self._votes is not None and error is None:
            self._votes[1].wait()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; to be called by all ranks once a step.

        With several ranks the answer is that of the votes cast at the step before, which have arrived meanwhile.
        """
        wanted = self._received_s is not None
        if self._group is None:
            return wanted
        before, vote = self._votes, torch.tensor([int(wanted)])
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._votes = vote, work
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_s is None:
            self._received_s = now
        elif now - self._received_s >= _SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
