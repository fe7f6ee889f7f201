"""What the user can mend: shown as one sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastssl_pipelines.names import printable


class ConfigError(ValueError):
    """An option, preset or run folder that cannot be used as given; names in the sentence are shown in one line."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stays as it is."""


def no_arguments(arguments: list[str]) -> None:
    """Raise ConfigError if a command that takes none was given some."""
    if arguments:
        raise ConfigError(f"this command takes no arguments, and {' '.join(arguments)} was given")


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> ConfigError:
    """The error for a name that is not one of `allowed`, with the nearest one suggested."""
    allowed, given = sorted(allowed), given[:60]
    close = difflib.get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    # a library can have a thousand names; then the suggestion has to do
    known = f": known are {', '.join(allowed)}" if len(allowed) <= 40 else ""
    return ConfigError(f"unknown {kind} {given!r}{known}{hint}")
