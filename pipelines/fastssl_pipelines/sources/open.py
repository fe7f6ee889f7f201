"""Open images at a path; what is there decides how it is read."""

from __future__ import annotations

import os
from pathlib import Path

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.folder import ImageFolder, ListedImages, list_file, list_folder
from fastssl_pipelines.sources.index import IndexedSource
from fastssl_pipelines.sources.listing import Listing, Progress, is_hidden, is_image
from fastssl_pipelines.sources.shards import COMPRESSED_SUFFIXES, SHARD_SUFFIX, TarShards, list_shards


def open_source(root: Path, *, labeled: bool = True, progress: Progress | None = None) -> IndexedSource:
    """Open the images at `root`: class folders, a flat folder, .tar shards or a list file; sizes are cached.

    With `labeled` False (--data.unlabeled), every label is -1 and images are found at any depth. DataError if there
    are no images or their labels are ambiguous.
    """
    if _holds_shards(root, labeled):
        return TarShards(root, labeled=labeled, progress=progress)
    kind = ListedImages if root.is_file() else ImageFolder
    return kind(root, labeled=labeled, progress=progress)


def list_images(root: Path, *, labeled: bool = True) -> Listing:
    """List the images of `open_source` without opening any and without the index; DataError as there."""
    if _holds_shards(root, labeled):
        return list_shards(root, labeled=labeled)
    return list_file(root, labeled=labeled) if root.is_file() else list_folder(root, labeled=labeled)


def _holds_shards(root: Path, labeled: bool) -> bool:
    """Whether `root` is a tar file or a folder of them, including compressed ones, which TarShards refuses."""
    option = "--data.root" if labeled else "--data.unlabeled"
    if not os.path.isdir(root):
        return os.path.lexists(root) and root.name.endswith((SHARD_SUFFIX, *COMPRESSED_SUFFIXES))
    try:
        with os.scandir(root) as found:
            entries = [(entry.name, _is_folder(entry)) for entry in found if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"the folder {root} cannot be read ({error.strerror}); check {option}") from None
    others = [name for name, is_folder in entries if is_image(name) or is_folder]
    # Anything else with that suffix, like a dangling link, is reported when it is read
    if shards := [name for name, is_folder in entries if name.endswith(SHARD_SUFFIX) and not is_folder]:
        if others:
            raise DataError(
                f"{root} holds {min(shards)} and also {min(others)}, so it is unclear what the images are; "
                f"{option} must hold either .tar shards or images"
            )
        return True
    return not others and any(name.endswith(COMPRESSED_SUFFIXES) for name, _ in entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself
        return False
