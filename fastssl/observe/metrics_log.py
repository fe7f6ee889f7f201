"""metrics.jsonl: one JSON object per line, the authoritative record of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastssl.errors import ConfigError
from fastssl_pipelines.files import open_to_append, read_file, write_atomic

LOG_AT_MOST_BYTES = 4 * 2**30  # At about a hundred bytes a step


class MetricsLog:
    """Appends records to a JSONL file; when `write` returns, the record has been handed to the operating system.

    While the file cannot be written (full disk), records wait in memory and are written, in order, before the next.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[str] = []
        self._torn_at: int | None = None  # Bytes of complete records in the file, after a failed write
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
        """All records, including those waiting in memory; skips incomplete lines."""
        data = self._content()[: self._torn_at]
        lines = [*data.splitlines(), *(line.encode() for line in self._waiting)]
        return valid_records(lines)

    def rewind(self, step: int) -> None:
        """Drop all records after `step` (for 0, all records), so that a resumed run logs every step once.

        Atomic: a kill leaves the old file or the new one. ConfigError if the file cannot be written.
        """
        kept = [record for record in self.read() if record["step"] <= step and record["event"] != "end"] if step else []
        try:
            write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}); free space on the disk or make the folder "
                f"writable, and continue with `fastssl resume {self.path.parent}`"
            ) from None
        self._waiting, self._torn_at, self._failing = [], None, False

    def _content(self) -> bytes:
        try:
            return read_file(self.path, at_most_bytes=LOG_AT_MOST_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be read ({error.strerror}); restore the run's own file, or remove it to continue "
                "without the earlier records"
            ) from None

    def _append(self, data: bytes) -> None:
        with open_to_append(self.path) as file:
            if self._torn_at is not None:
                file.truncate(self._torn_at)
            self._torn_at = file.seek(0, os.SEEK_END)
            # An unbuffered write can be short
            while data:
                data = data[file.write(data) :]
        self._torn_at = None


def valid_records(lines: Iterable[str | bytes]) -> list[dict[str, Any]]:
    """The records in lines of metrics.jsonl; skips incomplete and damaged lines."""
    return [record for record in map(parse_json, lines) if _is_valid(record)]


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; None if it is not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_valid(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return False
    step = record.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**50
