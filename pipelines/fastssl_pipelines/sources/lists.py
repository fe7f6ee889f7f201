"""List files: a name on each line, whatever a file system can call a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.files import read_text, write_whole
from fastssl_pipelines.names import from_line, to_line


def numbered_lines(path: Path, must_be: str) -> list[tuple[int, str]]:
    """The lines that are not blank with their numbers from 1, without white space around them.

    DataError where the file cannot be read; `must_be` ends that sentence. Bytes that are not UTF-8 are those of names.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {must_be}") from None
    if "\0" in text:  # which no name can hold
        raise DataError(f"{path} is not UTF-8 text; {must_be}")
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_names(path: Path, option: str) -> set[str]:
    """The names in a list file, one a line; DataError that names `option` where it cannot be read."""
    lines = numbered_lines(path, f"{option} must be a text file, one name a line")
    return {os.path.normpath(from_line(line)) for _, line in lines}


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write a list that `read_names` reads; OSError where that cannot be."""
    write_whole(path, b"".join(os.fsencode(to_line(name)) + b"\n" for name in names))
