"""SIGINT and SIGTERM as a request to stop after the step at hand."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_STOPPED = 75  # EX_TEMPFAIL: schedulers can requeue on it


class StopRequest:
    """Context manager; `received` turns true at the first signal, a second one ends the process as usual."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
