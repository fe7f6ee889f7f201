"""Queue of log messages that a command shows or writes later."""

from __future__ import annotations

import logging
from collections import deque

from fastssl_pipelines.names import printable

_LOGGERS = ("fastssl", "fastssl_pipelines")


class NoteQueue(logging.Handler):
    """Logging handler that collects messages of fastssl and its input, from level INFO on; safe for threads.

    It is attached to the loggers "fastssl" and "fastssl_pipelines" inside the `with` block.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._texts: deque[str] = deque()

    def __enter__(self) -> NoteQueue:
        for logger in map(logging.getLogger, _LOGGERS):
            if not logger.isEnabledFor(logging.INFO):
                logger.setLevel(logging.INFO)
            logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        for logger in map(logging.getLogger, _LOGGERS):
            logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(printable(record.getMessage()))

    def take(self) -> list[str]:
        """Return the messages since the last call, oldest first; call it from one thread only."""
        return [self._texts.popleft() for _ in range(len(self._texts))]
