"""Errors of the input path that the user can act on."""

from __future__ import annotations

DISTRIBUTION = "fastssl-pretrain"  # The package index has another `fastssl`


class DataError(ValueError):
    """The data cannot be used: what was found, what is allowed and which option to change, in a sentence."""


def install_command(extra: str) -> str:
    """Installs what an optional part of fastssl needs, also beside an editable installation."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class UnreadableImages(DataError):
    """Images that cannot be decoded: `reasons`, a sentence by image number."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


class InputError(RuntimeError):
    """The input cannot go on, and no image and no option is to blame: a worker that died, a disk that does not answer.

    What happened and what to change, in a sentence; ends a run, loses no image.
    """


class MachineError(InputError):
    """The machine cannot read, whatever the file holds: descriptors, memory or a disk; ends a run, loses no image."""
