"""Folders of JPEG and PNG files, and list files that name such files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.index import IndexedSource
from fastssl_pipelines.listing import SUFFIXES, THREADS, Listing, Progress, numbered, whole_files

_INTEGER_CLASS = re.compile(r"(.*\S) +(\d+)")


class ImageFolder(IndexedSource):
    """The JPEG and PNG files of a folder as `list_folder` finds them; `progress` is called while headers are read."""

    def __init__(
        self, root: str | os.PathLike[str], *, labelled: bool = True, progress: Progress | None = None
    ) -> None:
        super().__init__(
            root, lambda known: list_folder(Path(root), labelled=labelled), labelled=labelled, progress=progress
        )


class ListedImages(IndexedSource):
    """The images that a text file names, as `list_file` reads it; `progress` is called while headers are read."""

    def __init__(
        self, path: str | os.PathLike[str], *, labelled: bool = True, progress: Progress | None = None
    ) -> None:
        super().__init__(
            path, lambda known: list_file(Path(path), labelled=labelled), labelled=labelled, progress=progress
        )


def list_folder(root: Path, *, labelled: bool = True) -> Listing:
    """JPEG and PNG files under `root`, one folder a class in sorted order; files at any depth of it count.

    Without class folders, the files directly in `root` are the images and every label is -1. With `labelled` False
    (--data.unlabelled) all files at any depth are images with label -1, whatever folders they are in.
    Names that start with a dot are ignored. DataError for a folder without images or with unclear labels.
    """
    option = "--data.root" if labelled else "--data.unlabelled"
    if not root.is_dir():
        kinds = "a folder of images or of class folders" if labelled else "a folder of images"
        raise DataError(f"{root} is not a folder; {option} must be {kinds}")
    if not labelled:
        files = list(_images_under(root, root, option))
        if not files:
            raise DataError(f"{root} holds no {', '.join(SUFFIXES)} file at any depth; check {option}")
        return whole_files(os.fspath(root), option, os.fspath(root), files)
    entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    classes = tuple(name for name in entries if (root / name).is_dir())
    loose = [name for name in entries if name.lower().endswith(SUFFIXES) and name not in classes]
    if not classes:
        if not loose:
            raise DataError(f"{root} holds no {', '.join(SUFFIXES)} file and no class folder; check {option}")
        return whole_files(os.fspath(root), option, os.fspath(root), loose)
    if loose:
        raise DataError(
            f"{root} holds class folders and also {loose[0]} beside them, so its label is unclear;"
            f" {option} must hold either images or class folders"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: list(_images_under(root / name, root, option)), classes))
    for name, files in zip(classes, found, strict=True):
        if not files:
            raise DataError(
                f"the class folder {root / name} holds no {', '.join(SUFFIXES)} file; remove it or check {option}"
            )
    return whole_files(
        os.fspath(root),
        option,
        os.fspath(root),
        (file for files in found for file in files),
        labels=np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in found]),
        classes=classes,
        labelled_by="folder",
    )


def list_file(path: Path, *, labelled: bool = True) -> Listing:
    """The images that a UTF-8 text file names, one a line: a path, relative to the list's folder or absolute.

    A TAB and a class name may follow the path; without any TAB, a space and an integer on every line are the class
    (as Caffe writes lists). Classes are sorted, integers by value. Without classes, or with `labelled` False, every
    label is -1. DataError where the list cannot be read, names no file or a missing one, or has classes in part.
    """
    option = "--data.root" if labelled else "--data.unlabelled"
    lines = _numbered_lines(path, option)
    files, classes_given = _paths_and_classes(path, lines, option)
    name, folder = os.fspath(path), os.fspath(path.parent)
    if labelled and classes_given:
        labels, classes = numbered(classes_given)
        listing = whole_files(name, option, folder, files, labels=labels, classes=classes, labelled_by="list")
    else:
        listing = whole_files(name, option, folder, files)
    missing = np.flatnonzero(listing.signatures[:, 0] < 0)
    if len(missing):
        row = int(missing[0])
        raise DataError(
            f"line {lines[row][0]} of {path} names {listing.describe(row)}, which cannot be found ({len(missing)} such "
            f"of {len(lines)}); a path is relative to the folder of the list: correct it or {option}"
        )
    return listing


def _numbered_lines(path: Path, option: str) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {option} must be a folder or a list") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not UTF-8 text; {option} must be a folder of images, .tar shards or a text file of paths"
        ) from None
    lines = [(number, line.rstrip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} names no image; {option} must be a list of paths, one a line")
    return lines


def _paths_and_classes(path: Path, lines: list[tuple[int, str]], option: str) -> tuple[list[str], list[str]]:
    """The paths, and as many class names or none."""
    if any("\t" in line for _, line in lines):
        for number, line in lines:
            if "\t" not in line:
                raise DataError(
                    f"line {number} of {path} has no class and other lines have one after a TAB; give all or none of "
                    f"the images of {option} a class"
                )
        pairs = [line.rsplit("\t", 1) for _, line in lines]
        return [os.path.normpath(file.strip()) for file, _ in pairs], [name.strip() for _, name in pairs]
    numbered = [_INTEGER_CLASS.fullmatch(line) for _, line in lines]
    if all(numbered):
        return [os.path.normpath(match[1]) for match in numbered if match], [match[2] for match in numbered if match]
    return [os.path.normpath(line.strip()) for _, line in lines], []


def _images_under(folder: Path, root: Path, option: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read ({error.strerror}); check {option}")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = "" if parent == os.fspath(root) else os.path.relpath(parent, root)
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(relative, name)
