"""Text files that name images: those whose labels the method may see, and those that are left out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.names import read_names
from fastssl_pipelines.sources.base import Source, Subset

QUARANTINE = "--data.quarantine"


class ListedLabels(NamedTuple):
    """`labels`: int64 [n], those of the listed images, else -1. `unmatched`: listed names that no image has, sorted."""

    labels: NDArray[np.int64]
    unmatched: tuple[str, ...]


def listed_labels(source: Source, path: Path) -> ListedLabels:
    """The labels of the images that the text file `path` names, one a line; an empty file names none.

    A name is a base name or a path relative to the folder of class folders (class/name.jpeg). Images whose label
    is unknown anyway do not count. The official UniMoCo code (--supervised-list) knows base names alone.
    DataError where the file cannot be read, where it names no image although it is not empty, and for a name that
    several images have.
    """
    labels = np.full(len(source), -1, np.int64)
    names = read_names(path, "--data.label-list")
    if not names:
        return ListedLabels(labels, ())
    row_of: dict[str, int] = {}
    candidates = np.flatnonzero(source.labels >= 0).tolist()
    if not candidates:
        raise DataError(f"{path} lists {len(names)} names, but {source.name} has no labels; drop --data.label-list")
    for row in candidates:
        name = source.name_of(row)
        for listed in names & {name, os.path.basename(name)}:
            first = row_of.setdefault(listed, row)
            if first != row:
                raise DataError(
                    f"{listed} in {path} names both {source.name_of(first)} and {name}; "
                    "write class folder and name, as shown, in --data.label-list"
                )
    unmatched = tuple(sorted(names - row_of.keys()))
    if not row_of:
        raise DataError(
            f"{path} names no image of {source.name}: it has {unmatched[0]} and the data set {source.name_of(0)}; "
            "change --data.label-list (an empty file means no labels at all)"
        )
    rows = list(row_of.values())
    labels[rows] = source.labels[rows]
    return ListedLabels(labels, unmatched)


class Quarantined(NamedTuple):
    """`source`: what is left. `matched`: the listed names that left something out."""

    source: Source
    matched: frozenset[str]


def quarantine_list(path: Path) -> frozenset[str]:
    """The names in a text file, one a line; DataError where it cannot be read."""
    return frozenset(read_names(path, QUARANTINE))


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
                    f"in {QUARANTINE}"
                )
            dropped[row] = True
    if dropped.all():
        raise DataError(f"all {len(source)} images of {source.name} are listed in {QUARANTINE}; none is left")
    matched = frozenset(exact | row_of_base.keys())
    return Quarantined(Subset(source, np.flatnonzero(~dropped)) if matched else source, matched)
