"""The context of a part: its device and folder, and its results so far."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastssl_pipelines.files import write_atomic

NUMBERS = "numbers.json"


class Skipped(Exception):
    """A part cannot run on this machine; the message is the reason."""


class Failed(Exception):
    """A result is wrong; the message is a sentence."""


@dataclass
class PartContext:
    """Device, folder and results of a part. On a CPU the part is a rehearsal with small sizes."""

    device: torch.device
    folder: Path
    """For temporary files; removed when the part ends."""
    data: Path | None
    """Images to learn from: a folder or a .tar file."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Results by name, those of an interrupted earlier try included."""
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU, so that sizes are small."""
        return self.device.type == "cpu"

    def once(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure and save what has not been measured yet; a failure is recorded and does not stop the part."""
        if name in self.numbers:
            return
        print(f"-- {name}", flush=True)
        try:
            self.numbers[name] = measure()
        except Skipped:
            raise
        except Exception as error:  # Any error is a result
            traceback.print_exc()
            line = next(iter(str(error).splitlines()), "")
            self.errors[name] = line if isinstance(error, Failed) else f"{type(error).__name__}: {line}"
        self.write()

    def write(self, **more: Any) -> None:
        """Save the results so far in the folder."""
        text = json.dumps({"numbers": self.numbers, "errors": self.errors, **more}, indent=1, default=str)
        write_atomic(self.folder / NUMBERS, text.encode())
