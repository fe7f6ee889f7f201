"""Label lists: text files that name the images whose labels the method may see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.lists import read_names
from fastssl_pipelines.sources import Source


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
