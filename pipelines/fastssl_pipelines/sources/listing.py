"""Listing of a collection of image files before any image is opened: names, locations, labels."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.files import IMAGE_AT_MOST_BYTES, open_regular, raise_if_machine_error, read_file, too_large
from fastssl_pipelines.sources.packed_strings import PackedStrings
from fastssl_pipelines.sources.tar import OpenFiles

# The formats that Pillow may decode; a file's content counts, not its suffix.
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pnm"),
}
SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
SUFFIXES_SHOWN = ".jpg, .png, ..."  # For messages
THREADS = 8  # They wait for the disk; a stat takes the CPU 2 microseconds, a header 30
_SUFFIXES_LISTED = 8
CHUNK = 256  # A future for every file would cost more than its stat

Progress = Callable[[str, int, int], object]
"""Called now and then with the current task, the number of items done and their total."""

Ignored = tuple[tuple[str, int], ...]
"""Suffixes, with their dot or "", of files that are not images, and how many files have each."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Images of a collection, in the order of the files that hold them.

    `name`, `option`: the collection and its command line option, for messages. `folder`: paths are relative to it.
    `files`: the f files that hold the images. `signatures`: int64 [f, 2], their size in bytes and modification time in
    ns, -1 for files that cannot be reached. `names`, `file`, `offsets`, `lengths`: for every image its name, the index
    of its file (ascending) and its byte range in it. `archives`: None if every image is a whole file. `labels`: int64
    [n], -1 = unknown, else an index into `classes`. `labeled_by`: where the labels come from. `ignored`: unused files,
    most frequent suffix first; `ignored_in`: the same for each archive in `files`.
    """

    name: str
    option: str
    folder: str
    files: PackedStrings
    signatures: NDArray[np.int64]
    names: PackedStrings
    file: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    labeled_by: str
    archives: OpenFiles | None
    ignored: Ignored = ()
    ignored_in: tuple[Ignored, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def describe_ignored(self) -> str:
        """Sentence about the files that are not used, "" if there are none."""
        if not self.ignored:
            return ""
        shown = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.ignored[:_SUFFIXES_LISTED]]
        total = sum(count for _, count in self.ignored)
        if rest := sum(count for _, count in self.ignored[_SUFFIXES_LISTED:]):
            shown.append(f"{rest} others")
        return f"{total} file{'s are' if total > 1 else ' is'} not used: {', '.join(shown)}"

    def describe(self, index: int) -> str:
        """Name of image `index` in a message: its path, or that of its archive and its name in it."""
        return os.path.join(self.folder, self.names[index])

    def encoded(self, index: int) -> bytes:
        """Read all bytes of image `index`, valid or not; DataError if they cannot be read."""
        length = int(self.lengths[index])
        content = self.read(index, None)
        if self.archives is not None and len(content) < length:
            raise DataError(
                f"{self.describe(index)} has {len(content)} bytes and had {length} when the archive was listed, so "
                f"the archive has changed; start again with {self.option} as it is now"
            )
        return content

    def read(self, index: int, limit: int | None) -> bytes:
        """Read the first `limit` bytes of image `index`, or fewer if it is shorter; all of them for None.

        DataError if they cannot be read or are too many, MachineError if the machine is at fault.
        """
        thread = threading.get_ident()
        _being_read[thread] = self, index
        try:
            return self._whole_file(index, limit) if self.archives is None else self._stretch(index, limit)
        except OSError as error:
            raise DataError(f"{self.describe(index)} cannot be read ({error.strerror}); check {self.option}") from error
        finally:
            del _being_read[thread]

    def _whole_file(self, index: int, limit: int | None) -> bytes:
        path = os.path.join(self.folder, self.files[index])
        if limit is None:
            return read_file(path, at_most_bytes=IMAGE_AT_MOST_BYTES)
        with open_regular(path) as file:
            try:
                return file.read(limit)
            except OSError as error:
                raise_if_machine_error(error, path)
                raise

    def _stretch(self, index: int, limit: int | None) -> bytes:
        assert self.archives is not None
        length = int(self.lengths[index])
        if limit is None and length > IMAGE_AT_MOST_BYTES:
            raise too_large(length, IMAGE_AT_MOST_BYTES, self.names[index])
        wanted = length if limit is None else min(limit, length)
        return self.archives.read(int(self.file[index]), int(self.offsets[index]), wanted)


_being_read: dict[int, tuple[Listing, int]] = {}  # By thread


def being_read() -> list[str]:
    """Images that threads of this process are reading now, as in `describe`; for a message when one is stuck."""
    return sorted(listing.describe(index) for listing, index in list(_being_read.values()))


def whole_files(
    name: str,
    option: str,
    folder: str,
    files: Iterable[str],
    *,
    labels: NDArray[np.int64] | None = None,
    classes: tuple[str, ...] = (),
    labeled_by: str = "nothing",
    ignored: Ignored = (),
) -> Listing:
    """Listing of images that are one file each; without `labels`, all are -1."""
    names = PackedStrings.of(files)
    count = len(names)
    signatures = file_signatures(folder, names)
    return Listing(
        name=name,
        option=option,
        folder=folder,
        files=names,
        signatures=signatures,
        names=names,
        file=np.arange(count, dtype=np.int32),
        offsets=np.zeros(count, np.int64),
        lengths=signatures[:, 0].copy(),
        labels=np.full(count, -1, np.int64) if labels is None else labels,
        classes=classes,
        labeled_by=labeled_by,
        archives=None,
        ignored=ignored,
    )


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this base name belongs to the system and is not data."""
    return (name.startswith(".") and name != "..") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a file with this name, hidden or not, counts as an image."""
    return name.lower().endswith(SUFFIXES)


def suffixes_of(names: Iterable[str]) -> Ignored:
    """Count the names by suffix in lower case; the most frequent first."""
    counts = Counter(os.path.splitext(name)[1].lower() for name in names)
    return _most_frequent_first(counts)


def total_of(parts: Iterable[Ignored]) -> Ignored:
    """Add up the counts of all parts."""
    counts = Counter[str]()
    for part in parts:
        counts.update(dict(part))
    return _most_frequent_first(counts)


def _most_frequent_first(counts: Counter[str]) -> Ignored:
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def numbered(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Label of each class name, int64 [n], and the sorted classes; by value if all are integers."""
    found = set(names)
    classes = sorted(found, key=_by_value) if all(name.isdecimal() for name in found) else sorted(found)
    label_of = {name: label for label, name in enumerate(classes)}
    return np.array([label_of[name] for name in names], np.int64), tuple(classes)


def _by_value(digits: str) -> tuple[int, str, str]:
    """Sort key for integers of any length; equal values like 1 and 01 have the same order in every process."""
    value = digits.lstrip("0")
    return len(value), value, digits


def file_signatures(folder: str, files: PackedStrings) -> NDArray[np.int64]:
    """Size in bytes and modification time in ns of every file, int64 [f, 2]; -1 if it cannot be reached."""
    signatures = np.full((len(files), 2), -1, np.int64)

    def look(start: int) -> None:
        for index in range(start, min(start + CHUNK, len(files))):
            try:
                found = os.stat(os.path.join(folder, files[index]))
            except OSError:
                continue
            signatures[index] = found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(look, range(0, len(files), CHUNK)))
    return signatures
