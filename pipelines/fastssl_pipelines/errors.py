"""Errors of the input path that the user can fix."""

from __future__ import annotations

DISTRIBUTION = "fastssl-pretrain"  # The package index has another `fastssl`


class DataError(ValueError):
    """Unusable data; the message says in one sentence what was found, what is allowed and which option to change."""


def install_command(extra: str) -> str:
    """Shell command that installs an optional dependency of fastssl, editable installations included."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class UnreadableImages(DataError):
    """Images that cannot be decoded; `reasons` maps each image index to a sentence."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


class InputError(RuntimeError):
    """The input failed for a reason other than an image or an option: a dead worker, a disk that does not respond.

    The message says in one sentence what happened and what to change. It ends a run and excludes no image.
    """


class MachineError(InputError):
    """The machine ran out of descriptors or memory, or its disk failed; ends a run and excludes no image."""
