"""From a path to images: what lies there decides how it is read."""

from __future__ import annotations

import os
from pathlib import Path

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.folder import ImageFolder, ListedImages, list_file, list_folder
from fastssl_pipelines.sources.index import IndexedSource
from fastssl_pipelines.sources.listing import Listing, Progress, is_hidden, is_image
from fastssl_pipelines.sources.shards import COMPRESSED_SUFFIXES, SHARD_SUFFIX, TarShards, list_shards


def open_source(root: Path, *, labeled: bool = True, progress: Progress | None = None) -> IndexedSource:
    """The images at `root`: class folders, a flat folder, .tar shards or a list file, with sizes from a cached index.

    With `labeled` False (--data.unlabeled) every label is -1 and images count at any depth. DataError where there
    are no images, or where their labels are unclear.
    """
    if _holds_shards(root, labeled):
        return TarShards(root, labeled=labeled, progress=progress)
    kind = ListedImages if root.is_file() else ImageFolder
    return kind(root, labeled=labeled, progress=progress)


def list_images(root: Path, *, labeled: bool = True) -> Listing:
    """The images of `open_source` before any is opened, and without the index; DataError as there."""
    if _holds_shards(root, labeled):
        return list_shards(root, labeled=labeled)
    return list_file(root, labeled=labeled) if root.is_file() else list_folder(root, labeled=labeled)


def _holds_shards(root: Path, labeled: bool) -> bool:
    """Whether `root` is a tar file or a folder of them, compressed ones included, which TarShards explains."""
    option = "--data.root" if labeled else "--data.unlabeled"
    if not os.path.isdir(root):
        return os.path.lexists(root) and root.name.endswith((SHARD_SUFFIX, *COMPRESSED_SUFFIXES))
    try:
        with os.scandir(root) as found:
            entries = [(entry.name, _is_folder(entry)) for entry in found if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"the folder {root} cannot be read ({error.strerror}); check {option}") from None
    others = [name for name, is_folder in entries if is_image(name) or is_folder]
    # Whatever else is called so, as a link that leads nowhere, is named when it is read
    if shards := [name for name, is_folder in entries if name.endswith(SHARD_SUFFIX) and not is_folder]:
        if others:
            raise DataError(
                f"{root} holds {min(shards)} and also {min(others)} beside it, so it is unclear what the images are; "
                f"{option} must hold either .tar shards or images"
            )
        return True
    return not others and any(name.endswith(COMPRESSED_SUFFIXES) for name, _ in entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself
        return False
