"""Copies the metrics of a run to TensorBoard. Needs the extra `tensorboard`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.errors import ConfigError
from fastssl_pipelines.errors import install_command

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DRAWN = ("train", "eval")
"""Events whose values become curves; the report has those of the "end" event."""


class TensorBoardMirror:
    """Writes the values of a run's records to FOLDER/tensorboard as <event>/<name>.

    If the records go back to an earlier step, as after a resume, TensorBoard shows only the newer ones. ConfigError if
    tensorboard is not installed, or for a folder name that it cannot handle.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "--run.tensorboard was given and tensorboard is not installed: "
                f"{install_command('tensorboard')}, or drop the option"
            ) from None
        if not str(folder).isprintable():
            raise ConfigError(
                f"--run.tensorboard was given and TensorBoard cannot handle the name of the run folder {folder}; drop "
                "the option or change --run.dir"
            )
        self._writer_class = SummaryWriter
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._last = -1

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Write a record as in metrics.jsonl, with its `step` in `values`, and flush it.

        A record that cannot be written is missing only from TensorBoard; the run continues.
        """
        try:
            self._write(event, values)
        except OSError:
            self._writer = None  # The next record opens a new file

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None

    def _write(self, event: str, values: dict[str, Any]) -> None:
        step = values["step"]
        if event == "start":
            # Records up to `step` remain valid, unless the run starts over
            self._open(hide_from=step + 1 if step else 0)
        if event not in DRAWN:
            return
        if self._writer is None or step < self._last:
            self._open(hide_from=step)
        assert self._writer is not None
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{event}/{name}", value, step)
        self._writer.flush()
        self._last = step

    def _open(self, *, hide_from: int) -> None:
        self.close()
        # purge_step marks the new file, which hides records of earlier files from that step on
        self._writer = self._writer_class(str(self._folder), purge_step=hide_from)
        self._last = -1
