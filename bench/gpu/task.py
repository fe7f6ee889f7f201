"""What a part is given, and how it tells what it found."""

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
    """What was measured is not what it has to be; a sentence."""


@dataclass
class Task:
    """What a part is given, and where it leaves its numbers. On a CPU it is a rehearsal, with small sizes."""

    device: torch.device
    folder: Path
    """For what it writes; it is removed when the part has ended."""
    data: Path | None
    """Images to learn from: a folder or a .tar file."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Also those that an earlier try has left, which was cut off."""
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU, so that small sizes have to do."""
        return self.device.type == "cpu"

    def once(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure and write down what has not been measured yet; what fails does not keep the others from running."""
        if name in self.numbers:
            return
        print(f"-- {name}", flush=True)
        try:
            self.numbers[name] = measure()
        except Skipped:
            raise
        except Exception as error:  # whatever it is, it is the finding
            traceback.print_exc()
            line = next(iter(str(error).splitlines()), "")
            self.errors[name] = line if isinstance(error, Failed) else f"{type(error).__name__}: {line}"
        self.write()

    def write(self, **more: Any) -> None:
        """Leave what is known so far in the folder."""
        text = json.dumps({"numbers": self.numbers, "errors": self.errors, **more}, indent=1, default=str)
        write_atomic(self.folder / NUMBERS, text.encode())
