"""Names that a file system can hold, on a screen and in a list file."""

from __future__ import annotations

import json
import os
from contextlib import suppress


def printable(text: str) -> str:
    r"""`text` with everything that is not a visible character or a space as an escape: \x1b, \n, \u202e.

    For whatever shows names: screen, log, HTML and JSON. A byte of a name that is not UTF-8 (a surrogate in Python)
    becomes \xNN. The result has one line and can be encoded in UTF-8.
    """
    return text if text.isprintable() else "".join(map(_printable_character, text))


def to_line(name: str) -> str:
    """The line of a list file that stands for `name`: the name itself, or a JSON string where that would be unclear."""
    plain = name == name.strip() and name.isprintable() and not name.startswith(_QUOTE)
    return name if plain else json.dumps(name)


def from_line(line: str) -> str:
    """The name that a line stands for: what `to_line` was given; a name that only looks like JSON is taken as it is."""
    line = line.strip()
    if line.startswith(_QUOTE):
        with suppress(ValueError):  # no JSON, or no name that a file system could hold
            name = json.loads(line)
            if isinstance(name, str) and b"\0" not in os.fsencode(name):
                return name
    return line


_QUOTE = '"'


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode() if not 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"
