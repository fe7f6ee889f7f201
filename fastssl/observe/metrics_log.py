"""metrics.jsonl: one JSON object a line, the source of truth about a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastssl.errors import ConfigError
from fastssl_pipelines.files import open_to_append, read_file, write_atomic

LOG_AT_MOST_BYTES = 4 * 2**30  # a hundred bytes a step


class MetricsLog:
    """Appends records to a JSONL file; each is on the disk's side of the process when `write` returns.

    While the file cannot be written (disk full, say), records wait in memory and go into it, in order, before the next.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[str] = []
        self._torn_at: int | None = None  # bytes of whole records in the file, after a write that failed
        self._failing = False

    def write(self, event: str, **values: Any) -> str | None:
        """Append a record; never raises OSError, but returns a message when the file begins to be unwritable."""
        self._waiting.append(json.dumps({"event": event, **values}) + "\n")
        try:
            self._append("".join(self._waiting).encode())
        except OSError as error:
            begins, self._failing = not self._failing, True
            return f"{self.path} cannot be written ({error.strerror}); its records wait in memory" if begins else None
        self._waiting, self._failing = [], False
        return None

    def read(self) -> list[dict[str, Any]]:
        """All whole records, those that wait in memory too; lines that are none, as a kill leaves one, are left out."""
        data = self._content()[: self._torn_at]
        lines = [*data.splitlines(), *(line.encode() for line in self._waiting)]
        return whole_records(lines)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, all of it for 0, so that a resumed run tells every step once.

        A kill at any moment leaves the old file or the new one. ConfigError if it cannot be written.
        """
        kept = [record for record in self.read() if record["step"] <= step and record["event"] != "end"] if step else []
        try:
            write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}); make room or let the folder be written to, and go "
                f"on with `fastssl resume {self.path.parent}`"
            ) from None
        self._waiting, self._torn_at, self._failing = [], None, False

    def _content(self) -> bytes:
        try:
            return read_file(self.path, at_most_bytes=LOG_AT_MOST_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be read ({error.strerror}); put the run's own file back, or remove it to go on "
                "without what it told"
            ) from None

    def _append(self, data: bytes) -> None:
        with open_to_append(self.path) as file:
            if self._torn_at is not None:
                file.truncate(self._torn_at)
            self._torn_at = file.seek(0, os.SEEK_END)
            # an unbuffered write can be short
            while data:
                data = data[file.write(data) :]
        self._torn_at = None


def whole_records(lines: Iterable[str | bytes]) -> list[dict[str, Any]]:
    """The records among lines of metrics.jsonl; lines that are none, as a kill or a bad disk leaves, are left out."""
    return [record for record in map(parse_json, lines) if _is_whole(record)]


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; None for a text that is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_whole(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return False
    step = record.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**50
