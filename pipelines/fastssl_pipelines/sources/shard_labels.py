"""Which class a tar shard tells for each of its images: .cls files, folders or the name of the shard."""

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
    """Whether a member of this name holds the class of an image."""
    return name.endswith(_LABEL_SUFFIX)


def class_number(content: bytes, name: str, option: str) -> str:
    """The number of a class that a .cls file called `name` holds, "" for -1; DataError for other content."""
    text = content.decode("ascii", "replace").strip()
    if text == UNKNOWN:
        return ""
    if not text.isdecimal() or len(content) > LABEL_AT_MOST_BYTES:
        shown = repr(text[:40]) if len(content) <= LABEL_AT_MOST_BYTES else f"more than {LABEL_AT_MOST_BYTES} bytes"
        raise DataError(
            f"{name} holds {shown}; a .cls file in {option} must hold the number of a class, or -1 for unknown"
        )
    return str(int(text))


def classes_of(images: Sequence[str], numbers: dict[str, str], shard: Path, option: str) -> list[tuple[str, str]]:
    """For each image what told its class, and the class; `numbers`: those of the .cls files by their names.

    The class of A.B.jpg is in A.B.cls, else, as WebDataset has it, in the one .cls file whose name up to the first dot
    is A. DataError where several could be meant.
    """
    own = {name.removesuffix(_LABEL_SUFFIX): name for name in numbers}
    taken = own.keys() & {_without_suffix(image) for image in images}
    shared: dict[str, list[str]] = {}
    for stem, name in own.items():
        key = _key(name)
        # The own label of one image says nothing about another, unless it is called as the key itself
        if stem == key or stem not in taken:
            shared.setdefault(key, []).append(name)

    def label_of(image: str) -> str | None:
        if (name := own.get(_without_suffix(image))) is not None:
            return name
        candidates = shared.get(_key(image), [])
        if len(candidates) > 1:
            raise DataError(
                f"{shard}/{image} could have its class from {candidates[0]} or {candidates[1]}; in {option} call the "
                ".cls file of an image as the image"
            )
        return candidates[0] if candidates else None

    return [_class_of(image, numbers, label_of(image), shard) for image in images]


def one_source(given: Sequence[tuple[str, str]], names: PackedStrings, root: Path, option: str) -> str:
    """What told the classes of all images; DataError where one thing told some and another others."""
    first = given[0][0]
    for row, (source, _) in enumerate(given):
        if source != first:
            raise DataError(
                f"the class of {names[0]} in {root} comes from {first} and that of {names[row]} from {source}, so "
                f"labels are unclear; make the shards of {option} alike"
            )
    return first


def _class_of(image: str, numbers: dict[str, str], label: str | None, shard: Path) -> tuple[str, str]:
    if label is not None:
        return FROM_FILES, numbers[label]
    if folder := posixpath.basename(posixpath.dirname(image)):
        return FROM_FOLDERS, folder
    if _WORDNET_ID.fullmatch(shard.stem):
        return FROM_SHARDS, shard.stem
    return FROM_NOTHING, ""


def _without_suffix(name: str) -> str:
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    """What WebDataset calls the key of a sample: all up to the first dot of the base name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])
