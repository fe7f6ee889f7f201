"""metrics.jsonl: one JSON object a line, the source of truth about a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to a JSONL file; each is on the disk's side of the process when `write` returns."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, event: str, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut short is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, all of it for 0, so that a resumed run tells every step once."""
        kept = [record for record in self.read() if record["step"] <= step and record["event"] != "end"] if step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(self.path)
