"""Errors that the user can fix: shown as one sentence, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastssl_pipelines.names import printable


class ConfigError(ValueError):
    """An option, preset or run folder that cannot be used as given; unprintable characters are escaped."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stays unchanged."""


def no_arguments(arguments: list[str]) -> None:
    """Raise ConfigError for any argument, in a command that takes none."""
    if arguments:
        raise ConfigError(f"this command takes no arguments, and {' '.join(arguments)} was given")


def unknown_name(kind: str, given: str, allowed: Iterable[str], *, pluggable: bool = False) -> ConfigError:
    """The error for a name that is not in `allowed`, with the nearest one suggested.

    `pluggable`: a plug-in may define the name, so the error also says to install it.
    """
    allowed, given = sorted(allowed), given[:60]
    close = difflib.get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    # A library can have a thousand names; then the suggestion must suffice
    known = f": known are {', '.join(allowed)}" if len(allowed) <= 40 else ""
    plugin = "; if a plug-in defines it, install that plug-in" if pluggable else ""
    return ConfigError(f"unknown {kind} {given!r}{known}{hint}{plugin}")
