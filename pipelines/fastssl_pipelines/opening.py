"""From a path to images: what lies there decides how it is read."""

from __future__ import annotations

import os
from pathlib import Path

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.folder import ImageFolder, ListedImages, list_file, list_folder
from fastssl_pipelines.index import IndexedSource
from fastssl_pipelines.listing import SUFFIXES, Listing, Progress
from fastssl_pipelines.shards import COMPRESSED_SUFFIXES, SHARD_SUFFIX, TarShards, list_shards


def open_source(root: Path, *, labelled: bool = True, progress: Progress | None = None) -> IndexedSource:
    """The images at `root`: class folders, a flat folder, .tar shards or a list file, with sizes from a cached index.

    With `labelled` False (--data.unlabelled) every label is -1 and images count at any depth. DataError where there
    are no images, or where their labels are unclear.
    """
    if _holds_shards(root, labelled):
        return TarShards(root, labelled=labelled, progress=progress)
    kind = ListedImages if root.is_file() else ImageFolder
    return kind(root, labelled=labelled, progress=progress)


def list_images(root: Path, *, labelled: bool = True) -> Listing:
    """The images of `open_source` before any is opened, and without the index; DataError as there."""
    if _holds_shards(root, labelled):
        return list_shards(root, labelled=labelled)
    return list_file(root, labelled=labelled) if root.is_file() else list_folder(root, labelled=labelled)


def _holds_shards(root: Path, labelled: bool) -> bool:
    """Whether `root` is a tar file or a folder of them, compressed ones included, which TarShards explains."""
    if not root.is_dir():
        return root.is_file() and root.name.endswith((SHARD_SUFFIX, *COMPRESSED_SUFFIXES))
    with os.scandir(root) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    others = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) or entry.is_dir()]
    if shards := [entry.name for entry in entries if entry.name.endswith(SHARD_SUFFIX) and entry.is_file()]:
        if others:
            raise DataError(
                f"{root} holds {min(shards)} and also {min(others)} beside it, so it is unclear what the images are; "
                f"{'--data.root' if labelled else '--data.unlabelled'} must hold either .tar shards or images"
            )
        return True
    return not others and any(entry.name.endswith(COMPRESSED_SUFFIXES) for entry in entries)
