"""Signals that ask a run to stop after the current step; all ranks stop at the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from fastssl.distributed import cpu_group, world_size

EXIT_STOPPED = 75  # EX_TEMPFAIL, on which schedulers can requeue
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST_S = 1.0  # Ctrl-C reaches a rank twice: from the terminal and from torchrun


def ignore_requests() -> None:
    """Ignore further stop requests, for the end of a process whose exit code is decided."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class StopRequest:
    """Context manager around a run; after a signal, `agreed` returns True at the same step on all ranks.

    A second signal ends the process as usual if it comes at least a second later. After a signal the handlers stay in
    place when the `with` block ends, so that a duplicate of it cannot interrupt the final writes.
    """

    def __init__(self) -> None:
        self._received_s: float | None = None
        self._votes: tuple[torch.Tensor, dist.Work] | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> StopRequest:
        if world_size() > 1:
            self._group = cpu_group()
        self._previous = {signum: signal.signal(signum, self._handle) for signum in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._received_s is None:
            self._restore()
        if self._votes is not None and error is None:
            self._votes[1].wait()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks must call it once a step.

        With several ranks it returns the result of the previous step's vote, which has arrived in the meantime.
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

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_s is None:
            self._received_s = now
        elif now - self._received_s >= _SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
