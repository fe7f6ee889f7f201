"""Index of a collection of image files: sizes from their headers, in a cache that every start checks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.files import open_atomic, open_regular
from fastssl_pipelines.names import printable
from fastssl_pipelines.sources.base import Source, broken_image, digest_of
from fastssl_pipelines.sources.decoding import BROKEN_IMAGE, open_image, upright_size
from fastssl_pipelines.sources.listing import CHUNK, THREADS, Listing, Progress, total_of
from fastssl_pipelines.sources.packed_strings import PackedStrings

_log = logging.getLogger(__name__)

_VERSION = 3
_HEADER_BYTES = 32 * 1024  # Contains the size in nearly every file; otherwise the whole file is read

Lister = Callable[[Listing | None], Listing]
"""Lists a collection; is passed an earlier listing of it, or None, which may save work."""


@dataclass(frozen=True, slots=True)
class Index:
    """Listing with the `widths` and `heights` of its images, int32 [n]; 0 for those in `defects`."""

    listing: Listing
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    defects: dict[int, str]


class IndexedSource(Source):
    """Images of a listing, with an index that is cached between runs and updated for changed files.

    `root`, `labeled`: key of the cache. `progress`: see Progress; called while headers are read.
    DataError if no image can be read; if the cache cannot be written, a warning is logged.
    """

    def __init__(
        self, root: str | os.PathLike[str], lister: Lister, *, labeled: bool, progress: Progress | None = None
    ) -> None:
        key = f"{os.path.abspath(root)}\n{'labeled' if labeled else 'unlabeled'}"
        path = cache_folder() / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"
        known = load(path, key)
        listing = lister(known.listing if known else None)
        index = build(listing, known, progress)
        if known is None or not _same(index, known):
            save(index, path, key)
        _warn_of_unused(listing, labeled)
        self.name, self.option = listing.name, listing.option
        self.labels, self.classes = listing.labels, listing.classes
        self.widths, self.heights, self.defects = index.widths, index.heights, index.defects
        self._listing = listing
        if len(self.defects) == len(self):
            raise DataError(f"none of the {len(self)} images of {self.name} can be read; the first: {self.defects[0]}")

    def encoded(self, index: int) -> bytes:
        if index in self.defects:
            raise DataError(self.defects[index])
        return self._listing.encoded(index)

    def describe(self, index: int) -> str:
        return self._listing.describe(index)

    def name_of(self, index: int) -> str:
        return self._listing.names[index]

    def fingerprint(self) -> str:
        names = self._listing.names
        return digest_of(names.blob, names.ends.tobytes(), self._listing.lengths.tobytes())


def _warn_of_unused(listing: Listing, labeled: bool) -> None:
    """Warn of files in a collection that are not used, which may be a mistake."""
    if ignored := listing.describe_ignored():
        _log.warning(printable(f"{listing.name}: {ignored}"))
    suffixes = {suffix for suffix, _ in listing.ignored}
    if listing.archives is not None and labeled and listing.labeled_by == "nothing" and suffixes & {".json", ".txt"}:
        message = (
            f"{listing.name}: no .cls in the shards: labels in .json or .txt are not read; write the index of a "
            "class into KEY.cls next to each image"
        )
        _log.warning(printable(message))


def cache_folder() -> Path:
    """Folder of the cached indices: $FASTSSL_CACHE, else $XDG_CACHE_HOME/fastssl, else ~/.cache/fastssl."""
    if own := os.environ.get("FASTSSL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastssl"


def build(listing: Listing, known: Index | None = None, progress: Progress | None = None) -> Index:
    """Build the index of a listing; read headers only in files that are new or changed since `known`.

    Images that could not be read before are tried again, since the disk may have been the reason.
    """
    widths, heights = np.zeros(len(listing), np.int32), np.zeros(len(listing), np.int32)
    if known is not None:
        rows, known_rows = _unchanged_rows(listing, known.listing)
        widths[rows], heights[rows] = known.widths[known_rows], known.heights[known_rows]
    missing = np.flatnonzero(widths == 0)
    defects: dict[int, str] = {}

    def read(start: int) -> int:
        rows = missing[start : start + CHUNK].tolist()
        for row in rows:
            try:
                widths[row], heights[row] = _size(listing, row)
            except DataError as error:
                defects[row] = str(error)
            except BROKEN_IMAGE as error:
                defects[row] = str(broken_image(listing.describe(row), error, listing.option))
        return len(rows)

    with ThreadPoolExecutor(THREADS) as pool:
        done = 0
        for count in pool.map(read, range(0, len(missing), CHUNK)):
            done += count
            if progress:
                progress("reading image headers", done, len(missing))
    return Index(listing, widths, heights, dict(sorted(defects.items())))


def save(index: Index, path: Path, key: str) -> None:
    """Write the index to `path` atomically; warn where that is not possible."""
    arrays: dict[str, Any] = {
        "version": np.array(_VERSION),
        "key": _bytes(os.fsencode(key)),
        "signatures": index.listing.signatures,
        "widths": index.widths,
        "heights": index.heights,
        "labels": index.listing.labels,
        "labeled_by": _bytes(index.listing.labeled_by.encode()),
        **_packed("files", index.listing.files),
        "ignored_in": _bytes(json.dumps(index.listing.ignored_in).encode()),
        **_packed("classes", PackedStrings.of(index.listing.classes)),
    }
    if index.listing.archives is not None:
        arrays |= {
            "archive": index.listing.file,
            "offsets": index.listing.offsets,
            "lengths": index.listing.lengths,
            **_packed("names", index.listing.names),
        }
    arrays["checksum"] = _bytes(_checksum(arrays))
    # Processes that share a cache may write at the same time
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path, temporary=temporary) as file:
            np.savez(file, **arrays)
    except OSError as error:
        message = (
            f"the index of {index.listing.name} could not be kept in {path.parent} ({error.strerror or error}), so the "
            "next start reads all image headers again; set FASTSSL_CACHE to a folder with room"
        )
        _log.warning(printable(message))


def load(path: Path, key: str) -> Index | None:
    """Load the index that `save` wrote for this key; None if there is none or it is damaged, old or foreign.

    Its listing has no name, option or folder, and cannot read images.
    """
    try:
        with open_regular(path) as file:
            _require_plain(file)
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        if int(arrays["version"]) != _VERSION or arrays["key"].tobytes() != os.fsencode(key):
            return None
        if arrays.pop("checksum").tobytes() != _checksum(arrays):
            return None
        index = _unpacked(arrays)
        return index if _fits_together(index) else None
    except Exception:  # A damaged file makes zipfile, zlib and NumPy raise errors of many kinds
        return None


def _require_plain(file: BinaryIO) -> None:
    """ValueError if reading the arrays could take more memory than the file has bytes."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = os.fstat(file.fileno()).st_size
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise ValueError("an index is not compressed")
    file.seek(0)


def _checksum(arrays: dict[str, NDArray[Any]]) -> bytes:
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return total.digest()


def _unpacked(arrays: dict[str, NDArray[Any]]) -> Index:
    files, widths, signatures = _names(arrays, "files"), arrays["widths"], arrays["signatures"]
    whole = "archive" not in arrays
    parts = json.loads(arrays["ignored_in"].tobytes())
    ignored_in = tuple(tuple((str(suffix), int(count)) for suffix, count in part) for part in parts)
    listing = Listing(
        name="",
        option="",
        folder="",
        files=files,
        signatures=signatures,
        names=files if whole else _names(arrays, "names"),
        file=np.arange(len(files), dtype=np.int32) if whole else arrays["archive"],
        offsets=np.zeros(len(files), np.int64) if whole else arrays["offsets"],
        lengths=signatures[:, 0] if whole else arrays["lengths"],
        labels=arrays["labels"],
        classes=tuple(_names(arrays, "classes")),
        labeled_by=arrays["labeled_by"].tobytes().decode(),
        archives=None,
        ignored=total_of(ignored_in),
        ignored_in=ignored_in,
    )
    return Index(listing, widths, arrays["heights"], {})


def _fits_together(index: Index) -> bool:
    """Whether all arrays belong together, so that no index in one is out of range in another."""
    listing = index.listing
    count, files = len(listing.names), len(listing.files)
    per_image = (listing.file, listing.offsets, listing.lengths, listing.labels, index.widths, index.heights)
    return (
        all(array.shape == (count,) and array.dtype.kind == "i" for array in per_image)
        and listing.signatures.shape == (files, 2)
        and len(listing.ignored_in) in (0, files)
        and bool(np.all(np.diff(listing.file) >= 0) and np.all((listing.file >= 0) & (listing.file < files)))
        and bool(np.all((listing.labels >= -1) & (listing.labels < len(listing.classes))))
        and bool(np.all(index.widths >= 0) and np.all(index.heights >= 0))
        and bool(np.all(listing.offsets >= 0))
    )


def _unchanged_rows(listing: Listing, known: Listing) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the images in unchanged files, and their indices in `known`."""
    if listing.files == known.files:
        then = np.arange(len(known.files))
    else:
        index = {name: row for row, name in enumerate(known.files)}
        then = np.array([index.get(name, -1) for name in listing.files], np.int64)
    same = then >= 0
    same[same] = (listing.signatures[same] == known.signatures[then[same]]).all(axis=1)
    rows = np.flatnonzero(same[listing.file])
    # The distance of an image from the first one in its file is unchanged
    first = np.searchsorted(listing.file, np.arange(len(listing.files)))
    known_first = np.searchsorted(known.file, np.arange(len(known.files)))
    file = listing.file[rows]
    return rows, known_first[then[file]] + rows - first[file]


def _same(index: Index, other: Index) -> bool:
    one, two = index.listing, other.listing
    return (
        one.files == two.files
        and one.classes == two.classes
        and np.array_equal(one.signatures, two.signatures)
        and np.array_equal(one.labels, two.labels)
        and np.array_equal(index.widths, other.widths)
        and one.ignored_in == two.ignored_in
    )


def _size(listing: Listing, row: int) -> tuple[int, int]:
    """Width and height from the header of an image; an error in BROKEN_IMAGE or DataError without a valid one."""
    head = listing.read(row, _HEADER_BYTES)
    try:
        return _size_in(head)
    except BROKEN_IMAGE:
        if len(head) < _HEADER_BYTES:
            raise
        return _size_in(listing.encoded(row))


def _size_in(encoded: bytes) -> tuple[int, int]:
    with open_image(encoded) as image:
        return upright_size(image)


def _packed(name: str, names: PackedStrings) -> dict[str, NDArray[Any]]:
    return {name: _bytes(names.blob), f"{name}_ends": names.ends}


def _names(arrays: dict[str, NDArray[Any]], name: str) -> PackedStrings:
    blob, ends = arrays[name].tobytes(), arrays[f"{name}_ends"]
    if np.any(np.diff(ends, prepend=0) < 0) or (ends[-1] if len(ends) else 0) != len(blob):
        raise ValueError("the ends of packed names do not match their bytes")
    return PackedStrings(blob, ends)


def _bytes(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)
