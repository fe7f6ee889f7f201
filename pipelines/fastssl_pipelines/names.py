"""File names on the screen, and in list files with one name per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.files import read_text, write_atomic

_QUOTE = '"'


def printable(text: str) -> str:
    r"""Replace everything in `text` that is not a visible character or a space by an escape: \x1b, \n, \u202e.

    For all output that shows names: screen, log, HTML and JSON. A byte that is not UTF-8 (a surrogate in Python)
    becomes \xNN. The result is one line that can be encoded in UTF-8.
    """
    return text if text.isprintable() else "".join(map(_printable_character, text))


def to_line(name: str) -> str:
    """Line of a list file for `name`: the name itself, or a JSON string where that would be ambiguous."""
    plain = name == name.strip() and name.isprintable() and not name.startswith(_QUOTE)
    return name if plain else json.dumps(name)


def from_line(line: str) -> str:
    """Name in a line, the inverse of `to_line`; a name that only looks like JSON is returned unchanged."""
    line = line.strip()
    if line.startswith(_QUOTE):
        with suppress(ValueError):  # Not JSON, or not a possible file name
            name = json.loads(line)
            if isinstance(name, str) and b"\0" not in os.fsencode(name):
                return name
    return line


def numbered_lines(path: Path, must_be: str) -> list[tuple[int, str]]:
    """Nonblank lines of a file, stripped, with their line numbers from 1.

    DataError if the file cannot be read; `must_be` ends that sentence. Bytes that are not UTF-8 are kept, as in names.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {must_be}") from None
    if "\0" in text:  # Which no name can contain
        raise DataError(f"{path} is not UTF-8 text; {must_be}")
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_names(path: Path, option: str) -> set[str]:
    """Names in a list file, one per line; DataError, which names `option`, if it cannot be read."""
    lines = numbered_lines(path, f"{option} must be a text file, one name a line")
    return {os.path.normpath(from_line(line)) for _, line in lines}


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write a list file for `read_names`; OSError if it cannot be written."""
    write_atomic(path, b"".join(os.fsencode(to_line(name)) + b"\n" for name in names))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode() if not 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"
