"""List files: images whose labels the method may see, and images left out of the data set."""

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
    """`labels`: int64 [n], -1 for images not listed. `unmatched`: listed names without an image, sorted."""

    labels: NDArray[np.int64]
    unmatched: tuple[str, ...]


def listed_labels(source: Source, path: Path) -> ListedLabels:
    """Labels of the images listed in the text file `path`, one name per line; an empty file lists none.

    A name is a base name or a path relative to the folder of class folders (class/name.jpeg). Images without a label
    do not match. The official UniMoCo code (--supervised-list) accepts base names only.
    DataError if the file cannot be read, if it is not empty and matches no image, or if several images have a
    listed name.
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
    """`source`: remaining images. `matched`: listed names that matched an image."""

    source: Source
    matched: frozenset[str]


def quarantine_list(path: Path) -> frozenset[str]:
    """Names in a text file, one per line; DataError if it cannot be read."""
    return frozenset(read_names(path, QUARANTINE))


def without(source: Source, names: Iterable[str]) -> Quarantined:
    """Images of `source` except the named ones; a name is that of `name_of`, or a base name if it is unique.

    DataError for a base name that several images have, for images without file names, and if no image is left.
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
