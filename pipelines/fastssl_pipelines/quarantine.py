"""Images that a list keeps out of training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.lists import read_names
from fastssl_pipelines.sources import Source, Subset

OPTION = "--data.quarantine"


class Quarantined(NamedTuple):
    """`source`: what is left. `matched`: the listed names that left something out."""

    source: Source
    matched: frozenset[str]


def quarantine_list(path: Path) -> frozenset[str]:
    """The names in a text file, one a line; DataError where it cannot be read."""
    return frozenset(read_names(path, OPTION))


def without(source: Source, names: Iterable[str]) -> Quarantined:
    """The images of `source` but those named: by `name_of`, or by a base name that one image alone has.

    DataError for a base name that several images have, for images without file names, and where no image is left.
    """
    listed = set(names)
    if not listed:
        return Quarantined(source, frozenset())
    by_row = [source.name_of(row) for row in range(len(source))]
    exact = listed.intersection(by_row)
    row_of_base: dict[str, int] = {}
    dropped = np.zeros(len(source), bool)
    for row, name in enumerate(by_row):
        base = os.path.basename(name)
        if name in exact:
            dropped[row] = True
        elif base in listed and base not in exact:
            first = row_of_base.setdefault(base, row)
            if first != row:
                raise DataError(
                    f"{base} names both {by_row[first]} and {name} of {source.name}; write folder and name, as shown, "
                    f"in {OPTION}"
                )
            dropped[row] = True
    if dropped.all():
        raise DataError(f"all {len(source)} images of {source.name} are listed in {OPTION}; none is left")
    matched = frozenset(exact | row_of_base.keys())
    return Quarantined(Subset(source, np.flatnonzero(~dropped)) if matched else source, matched)
