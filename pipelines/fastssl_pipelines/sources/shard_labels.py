"""Classes of the images in a tar shard, from .cls files, folders or the name of the shard."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.packed_strings import PackedStrings

UNKNOWN = "-1"  # In a .cls file
LABEL_AT_MOST_BYTES = 64
FROM_FILES, FROM_FOLDERS, FROM_SHARDS, FROM_NOTHING = ".cls files", "folders", "names of shards", "nothing"

_LABEL_SUFFIX = ".cls"
_WORDNET_ID = re.compile(r"n\d{8}")


def is_label(name: str) -> bool:
    """Whether a member with this name holds the class of an image."""
    return name.endswith(_LABEL_SUFFIX)


def class_index(content: bytes, name: str, option: str) -> str:
    """Class index in the .cls file called `name`, as a string, "" for -1; DataError for other content."""
    text = content.decode("ascii", "replace").strip()
    if text == UNKNOWN:
        return ""
    if not text.isdecimal() or len(content) > LABEL_AT_MOST_BYTES:
        shown = repr(text[:40]) if len(content) <= LABEL_AT_MOST_BYTES else f"more than {LABEL_AT_MOST_BYTES} bytes"
        raise DataError(
            f"{name} holds {shown}; a .cls file in {option} must hold the index of a class, or -1 for unknown"
        )
    return str(int(text))


def classes_of(images: Sequence[str], indices: dict[str, str], shard: Path, option: str) -> list[tuple[str, str]]:
    """Origin of the class and the class, for each image; `indices`: class index by name of the .cls file.

    The class of A.B.jpg is in A.B.cls, else, as in WebDataset, in the only .cls file whose name up to the first dot is
    A. DataError if there are several.
    """
    own = {name.removesuffix(_LABEL_SUFFIX): name for name in indices}
    taken = own.keys() & {_without_suffix(image) for image in images}
    shared: dict[str, list[str]] = {}
    for stem, name in own.items():
        key = _key(name)
        # The label file of one image says nothing about another, unless its name is the key itself
        if stem == key or stem not in taken:
            shared.setdefault(key, []).append(name)

    def label_of(image: str) -> str | None:
        if (name := own.get(_without_suffix(image))) is not None:
            return name
        candidates = shared.get(_key(image), [])
        if len(candidates) > 1:
            raise DataError(
                f"{shard}/{image} could have its class from {candidates[0]} or {candidates[1]}; in {option}, give "
                "the .cls file of an image the name of the image"
            )
        return candidates[0] if candidates else None

    return [_class_of(image, indices, label_of(image), shard) for image in images]


def one_source(given: Sequence[tuple[str, str]], names: PackedStrings, root: Path, option: str) -> str:
    """Origin of the classes of all images; DataError if it is not the same for all."""
    first = given[0][0]
    for row, (source, _) in enumerate(given):
        if source != first:
            raise DataError(
                f"the class of {names[0]} in {root} comes from {first} and that of {names[row]} from {source}, so "
                f"labels are unclear; use the same form of labels in all shards of {option}"
            )
    return first


def _class_of(image: str, indices: dict[str, str], label: str | None, shard: Path) -> tuple[str, str]:
    if label is not None:
        return FROM_FILES, indices[label]
    if folder := posixpath.basename(posixpath.dirname(image)):
        return FROM_FOLDERS, folder
    if _WORDNET_ID.fullmatch(shard.stem):
        return FROM_SHARDS, shard.stem
    return FROM_NOTHING, ""


def _without_suffix(name: str) -> str:
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    """WebDataset's key of a sample: everything up to the first dot of the base name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])
