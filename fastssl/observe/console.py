"""A run's console output: a progress line on a terminal, plain lines elsewhere, and everything in console.log."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl_pipelines.files import open_to_append
from fastssl_pipelines.names import printable


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Context manager around the console output of a run; `path` gets every line, including each progress line.

    Escapes unprintable characters of file names. If `path` cannot be written, a note on the screen says so.
    """

    def __init__(self, path: Path, *, total_steps: int):
        self.screen = open_screen()
        self.file: BinaryIO | None = None
        try:
            self.file = open_to_append(path)
        except OSError as error:
            self.info(f"note: {path} cannot be written ({error.strerror}); its lines appear only on the screen")
        self.total_steps = total_steps
        self.bar = self.screen.bar(counts=False)
        self.bar.update("", 0, total_steps)

    def __enter__(self) -> Console:
        if self.screen.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.file:
            self.file.close()

    def info(self, text: str) -> None:
        """Print a line that stays on the screen."""
        text = printable(text)
        self.screen.line(text)
        self._record(text)

    def progress(
        self,
        *,
        step: int,
        loss: float,
        metrics: dict[str, float],
        images_per_s: float,
        shares: dict[str, float],
        memory_gib: float,
        left_s: float,
    ) -> None:
        """Update the progress line; metrics named *accuracy and `shares` of the time are fractions of 1."""
        shown = [
            f"{name.replace('_', ' ')} {value:.1%}"
            if name.endswith("accuracy")
            else f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in {"loss": loss, **metrics}.items()
        ]
        parts = " ".join(f"{name} {share:.0%}" for name, share in shares.items())
        speed = f"{images_per_s:.0f} images/s ({parts})"
        memory, left = f"{memory_gib:.1f} GiB", f"{duration(left_s)} left"
        text = "  ".join([f"step {step}/{self.total_steps}", *shown, speed, memory, left])
        if self.screen.is_terminal:
            self.bar.update(text, step, self.total_steps)
        else:
            self.screen.line(text)
        self._record(text)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Print a small table of names and values."""
        self.screen.table(Table(("", ""), "lr", title, rows=[*rows]))
        self._record("\n".join([title, *(f"{name:<32} {value}" for name, value in rows)]))

    def _record(self, text: str) -> None:
        # A full disk must not end training; metrics.jsonl has what matters
        with suppress(OSError):
            if self.file:
                self.file.write(f"{text}\n".encode())
