"""Folders of image files, and list files that name such files."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.files import raise_if_machine_error
from fastssl_pipelines.names import from_line, numbered_lines
from fastssl_pipelines.sources.index import IndexedSource
from fastssl_pipelines.sources.listing import (
    SUFFIXES_SHOWN,
    THREADS,
    Listing,
    Progress,
    is_hidden,
    is_image,
    numbered,
    suffixes_of,
    whole_files,
)

_INTEGER_CLASS = re.compile(r"(.*\S) +(\d+)")


class ImageFolder(IndexedSource):
    """Image files of a folder, listed by `list_folder`; `progress` is called while headers are read."""

    def __init__(self, root: str | os.PathLike[str], *, labeled: bool = True, progress: Progress | None = None) -> None:
        super().__init__(
            root, lambda known: list_folder(Path(root), labeled=labeled), labeled=labeled, progress=progress
        )


class ListedImages(IndexedSource):
    """Images named in a text file, listed by `list_file`; `progress` is called while headers are read."""

    def __init__(self, path: str | os.PathLike[str], *, labeled: bool = True, progress: Progress | None = None) -> None:
        super().__init__(path, lambda known: list_file(Path(path), labeled=labeled), labeled=labeled, progress=progress)


def list_folder(root: Path, *, labeled: bool = True) -> Listing:
    """List the image files under `root`, one folder per class in sorted order, each searched at any depth.

    Without class folders, the files directly in `root` are the images and every label is -1. With `labeled` False
    (--data.unlabeled), image files at any depth have label -1, whatever their folder. Hidden files and folders are
    skipped; files that are not images are counted in `ignored`. DataError for a folder without images or with
    ambiguous labels, for one reached on two paths, and for a dangling link.
    """
    option = "--data.root" if labeled else "--data.unlabeled"
    name = os.fspath(root)
    if not os.path.isdir(root):
        kinds = "a folder of images or of class folders" if labeled else "a folder of images"
        raise DataError(f"{root} is not a folder; {option} must be {kinds}")
    if not labeled:
        found = _images_under(name, name, option)
        if not found.images:
            raise DataError(f"{root} holds no image file ({SUFFIXES_SHOWN}) at any depth; check {option}")
        return whole_files(name, option, name, found.images, ignored=suffixes_of(found.others))
    here = _contents(name, option)
    loose = here.images
    if not here.folders:
        if not loose:
            raise DataError(f"{root} holds no image file ({SUFFIXES_SHOWN}) and no class folder; check {option}")
        return whole_files(name, option, name, loose, ignored=suffixes_of(here.others))
    if loose:
        raise DataError(
            f"{root} holds class folders and also {loose[0]} next to them, so its label is unclear;"
            f" {option} must hold either images or class folders"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        found_in = list(pool.map(lambda folder: _images_under(os.path.join(name, folder), name, option), here.folders))
    for folder, found in zip(here.folders, found_in, strict=True):
        if not found.images:
            raise DataError(
                f"the class folder {root / folder} holds no image file ({SUFFIXES_SHOWN}), and a class needs one; "
                f"remove the folder, or name the images and their classes in a list file as {option}"
            )
    _require_apart(found_in, option)
    return whole_files(
        name,
        option,
        name,
        (image for found in found_in for image in found.images),
        labels=np.repeat(np.arange(len(found_in), dtype=np.int64), [len(found.images) for found in found_in]),
        classes=tuple(here.folders),
        labeled_by="folder",
        ignored=suffixes_of([*here.others, *(other for found in found_in for other in found.others)]),
    )


def list_file(path: Path, *, labeled: bool = True) -> Listing:
    """List the images named in a text file, one path per line, absolute or relative to the list's folder.

    A TAB and a class name may follow the path; without any TAB, a space and an integer on every line are the class
    (as in Caffe's lists). Classes are sorted, integers by value. Without classes, or with `labeled` False, every label
    is -1. DataError if the list cannot be read, is empty, names a missing file, or has classes for some images only.
    """
    option = "--data.root" if labeled else "--data.unlabeled"
    lines = numbered_lines(path, f"{option} must be a folder of images, .tar shards or a text file of paths")
    if not lines:
        raise DataError(f"{path} names no image; {option} must be a list of paths, one a line")
    files, classes_given = _paths_and_classes(path, lines, option)
    name, folder = os.fspath(path), os.fspath(path.parent)
    if labeled and classes_given:
        labels, classes = numbered(classes_given)
        listing = whole_files(name, option, folder, files, labels=labels, classes=classes, labeled_by="list")
    else:
        listing = whole_files(name, option, folder, files)
    missing = np.flatnonzero(listing.signatures[:, 0] < 0)
    if len(missing):
        row = int(missing[0])
        raise DataError(
            f"line {lines[row][0]} of {path} names {listing.describe(row)}, which cannot be found ({len(missing)} such "
            f"of {len(lines)}); a line is a path, relative to the folder of the list, optionally followed by a TAB "
            f"and a class, or a space and an integer: correct it or {option}"
        )
    return listing


def _paths_and_classes(path: Path, lines: list[tuple[int, str]], option: str) -> tuple[list[str], list[str]]:
    """Paths, and as many class names or none."""
    if any("\t" in line for _, line in lines):
        for number, line in lines:
            if "\t" not in line:
                raise DataError(
                    f"line {number} of {path} has no class and other lines have one after a TAB; give all or none of "
                    f"the images of {option} a class"
                )
        pairs = [line.rsplit("\t", 1) for _, line in lines]
    else:
        matches = [_INTEGER_CLASS.fullmatch(line) for _, line in lines]
        pairs = [[match[1], match[2]] for match in matches if match]
        if len(pairs) < len(lines):
            return [_path(line) for _, line in lines], []
    return [_path(file) for file, _ in pairs], [from_line(name) for _, name in pairs]


def _path(line: str) -> str:
    return os.path.normpath(from_line(line))


class _Contents(NamedTuple):
    """Names in a folder: `images`, `others`, and `folders`, which maps each link to its target, others to None."""

    images: list[str]
    others: list[str]
    folders: dict[str, str | None]


class _Found(NamedTuple):
    """Paths of `images` relative to a root, names of `others`, and paths of `folders` by their real path."""

    images: list[str]
    others: list[str]
    folders: dict[str, str]


def _contents(folder: str, option: str) -> _Contents:
    """Sorted content of a folder without hidden entries; DataError for a dangling link."""
    contents = _Contents([], [], {})
    try:
        with os.scandir(folder) as entries:
            shown = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise_if_machine_error(error, folder)
        raise DataError(f"the folder {folder} cannot be read ({error.strerror}); check {option}") from None
    for entry in shown:
        if _is_folder(entry):
            contents.folders[entry.name] = os.path.realpath(entry.path) if entry.is_symlink() else None
        elif is_image(entry.name):
            contents.images.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which cannot be reached, and may stand for a "
                f"folder of images; fix or remove it, or check {option}"
            )
        else:
            contents.others.append(entry.name)
    return contents


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # For a link to itself
        return False


def _images_under(folder: str, root: str, option: str) -> _Found:
    """Find images and other files at any depth; a folder's own files come first, then those of its folders.

    DataError if a link leads to a folder already visited, whose images would count twice or without end.
    """
    found = _Found([], [], {os.path.realpath(root): root})
    ahead = [(folder, os.path.realpath(folder))]
    while ahead:
        path, place = ahead.pop()
        _require_new(found.folders, place, path, option)
        relative = "" if path == root else os.path.relpath(path, root)
        contents = _contents(path, option)
        found.images.extend(os.path.join(relative, name) for name in contents.images)
        found.others.extend(contents.others)
        for name, target in reversed(contents.folders.items()):
            ahead.append((os.path.join(path, name), target or os.path.join(place, name)))
    return found


def _require_apart(found_in: list[_Found], option: str) -> None:
    """DataError if two classes share a folder."""
    known: dict[str, str] = {}
    for found in found_in:
        for place, path in found.folders.items():
            _require_new(known, place, path, option)


def _require_new(known: dict[str, str], place: str, path: str, option: str) -> None:
    first = known.setdefault(place, path)
    if first != path:
        raise DataError(
            f"a link makes {first} and {path} one folder, {place}, so its images would count twice or without end; "
            f"remove the link or change {option}"
        )
