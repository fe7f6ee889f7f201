"""What a collection of image files holds, before any image is opened: names, places, labels."""

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
from fastssl_pipelines.files import IMAGE_AT_MOST_BYTES, open_regular, raise_if_of_the_machine, read_file, too_large
from fastssl_pipelines.sources.packed_strings import PackedStrings
from fastssl_pipelines.sources.tar import OpenFiles

# What Pillow decodes here, by its content and not by its suffix.
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
SUFFIXES_SHOWN = ".jpg, .png, ..."  # In a sentence
THREADS = 8  # They wait for the disk; a stat takes the CPU 2 microseconds, a header 30
_SUFFIXES_TOLD = 8
CHUNK = 256  # A future for every file would cost more than its stat

Progress = Callable[[str, int, int], object]
"""Called now and then with what is being done, how many are done, and of how many."""

Ignored = tuple[tuple[str, int], ...]
"""For suffixes with their dot, "" for names without one, how many files are no images and are not used."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of a collection in their order, which is that of the files that hold them.

    `name`: the collection, `option`: what names it on the command line, for messages. `folder`: what paths are
    relative to. `files`: the files that hold the images, and `signatures`, int64 [f, 2]: their size in bytes and
    modification time in ns, -1 where they cannot be reached. `names`, `file`, `offsets`, `lengths`: for every image
    its name, the number of its file, ascending, and its stretch of bytes. `archives`: None if every image is a
    whole file. `labels`: int64 [n], -1 = unknown, else an index into `classes`. `labeled_by`: what told the labels.
    `ignored`: files that are not used, most frequent suffix first; `ignored_in`: those in each archive of `files`.
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

    def told_ignored(self) -> str:
        """A sentence about the files that are not used, "" where there are none."""
        if not self.ignored:
            return ""
        shown = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.ignored[:_SUFFIXES_TOLD]]
        total = sum(count for _, count in self.ignored)
        if rest := sum(count for _, count in self.ignored[_SUFFIXES_TOLD:]):
            shown.append(f"{rest} others")
        return f"{total} file{'s are' if total > 1 else ' is'} not used: {', '.join(shown)}"

    def describe(self, index: int) -> str:
        """What to call image `index` in a message: its path, or that of its archive and its name there."""
        return os.path.join(self.folder, self.names[index])

    def encoded(self, index: int) -> bytes:
        """All bytes of image `index`, whatever they are; DataError where they cannot be read."""
        length = int(self.lengths[index])
        content = self.read(index, None)
        if self.archives is not None and len(content) < length:
            raise DataError(
                f"{self.describe(index)} has {len(content)} bytes and had {length} when the archive was listed, so "
                f"the archive has changed; start again with {self.option} as it is now"
            )
        return content

    def read(self, index: int, limit: int | None) -> bytes:
        """The first `limit` bytes of image `index`, fewer where it ends, or all.

        DataError where they cannot be read or are too many, MachineError where the machine is at fault.
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
                raise_if_of_the_machine(error, path)
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
    """What threads of this process read just now, as `describe` calls it; for a message when one of them is stuck."""
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
    """The listing of images that are files of their own; without `labels` all are -1."""
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
    """Whether a file or folder of this name, its last part, is the system's business and no data."""
    return (name.startswith(".") and name != "..") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a file of this name, hidden or not, is taken for an image."""
    return name.lower().endswith(SUFFIXES)


def suffixes_of(names: Iterable[str]) -> Ignored:
    """How many of the names have which suffix, in small letters; the most frequent first."""
    counts = Counter(os.path.splitext(name)[1].lower() for name in names)
    return _most_frequent_first(counts)


def total_of(parts: Iterable[Ignored]) -> Ignored:
    """The counts of all parts together."""
    counts = Counter[str]()
    for part in parts:
        counts.update(dict(part))
    return _most_frequent_first(counts)


def _most_frequent_first(counts: Counter[str]) -> Ignored:
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def numbered(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """A label for each class name, int64 [n], and the classes in sorted order, by value where all are integers."""
    found = set(names)
    classes = sorted(found, key=_by_value) if all(name.isdecimal() for name in found) else sorted(found)
    label_of = {name: label for label, name in enumerate(classes)}
    return np.array([label_of[name] for name in names], np.int64), tuple(classes)


def _by_value(digits: str) -> tuple[int, str, str]:
    """Sorts integers of any length; those of equal value, as 1 and 01, in one order in every process."""
    value = digits.lstrip("0")
    return len(value), value, digits


def file_signatures(folder: str, files: PackedStrings) -> NDArray[np.int64]:
    """Size in bytes and modification time in ns of every file, int64 [f, 2]; -1 where it cannot be reached."""
    signatures = np.full((len(files), 2), -1, np.int64)

    def look(start: int) -> None:
        for number in range(start, min(start + CHUNK, len(files))):
            try:
                found = os.stat(os.path.join(folder, files[number]))
            except OSError:
                continue
            signatures[number] = found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(look, range(0, len(files), CHUNK)))
    return signatures
