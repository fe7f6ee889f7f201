"""Messages that fastssl and its input log while they work, kept until a command shows or writes them."""

from __future__ import annotations

import logging
from collections import deque

from fastssl_pipelines.names import printable

_LOGGERS = ("fastssl", "fastssl_pipelines")


class NoteQueue(logging.Handler):
    """Logging handler that collects the messages of all threads; a context manager during which it is attached.

    Messages count from INFO on.
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
