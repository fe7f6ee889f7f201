"""What a person sees of a run: a progress line on a terminal, plain lines elsewhere, all of it in console.log."""

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
    """Hours, minutes and seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Context manager around the output of a run; `path` gets every line that is not overwritten in place.

    Names of files reach screen and file as `printable` shows them. Where `path` cannot be written, a line says so.
    """

    def __init__(self, path: Path, *, total_steps: int):
        self.screen = open_screen()
        self.file: BinaryIO | None = None
        try:
            self.file = open_to_append(path)
        except OSError as error:
            self.say(f"note: {path} cannot be written ({error.strerror}); what it would tell is on the screen alone")
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

    def say(self, text: str) -> None:
        """One line that stays."""
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
        """The line that a terminal overwrites; a metric called an accuracy is a share, as are the parts of the time."""
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
        """A small table of names and values."""
        self.screen.table(Table(("", ""), "lr", title, rows=[*rows]))
        self._record("\n".join([title, *(f"{name:<32} {value}" for name, value in rows)]))

    def _record(self, text: str) -> None:
        # a full disk must not end training; metrics.jsonl keeps what matters
        with suppress(OSError):
            if self.file:
                self.file.write(f"{text}\n".encode())
