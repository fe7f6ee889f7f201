"""The numbers of metrics.jsonl for TensorBoard as well. Needs tensorboard, an extra."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.errors import ConfigError
from fastssl_pipelines.errors import install_command

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DRAWN = ("train", "eval")
"""Events whose numbers are curves; what the end of a run adds is in its report."""


class TensorBoardMirror:
    """Takes the records of a run in their order and writes their numbers to FOLDER/tensorboard as <event>/<name>.

    Where the records go back to an earlier step, as after a resume, TensorBoard shows the later ones alone.
    Raises ConfigError where tensorboard is not installed, and for a folder name that it cannot take.
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
                f"--run.tensorboard was given with the run folder {folder}, whose name TensorBoard cannot take; drop "
                "the option or change --run.dir"
            )
        self._writer_class = SummaryWriter
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._last = -1

    def write(self, event: str, values: dict[str, Any]) -> None:
        """A record as metrics.jsonl gets it, with its `step` in `values`; on the disk's side when it returns.

        Where it cannot be written it is lost to TensorBoard alone, and the run goes on.
        """
        try:
            self._write(event, values)
        except OSError:
            self._writer = None  # the next record opens a new file

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None

    def _write(self, event: str, values: dict[str, Any]) -> None:
        step = values["step"]
        if event == "start":
            # what the run logged up to `step` is still true, except where it starts anew
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
        # purge_step is a mark in the new file that hides what earlier files hold from that step on
        self._writer = self._writer_class(str(self._folder), purge_step=hide_from)
        self._last = -1
