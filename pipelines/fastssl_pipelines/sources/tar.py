"""Read tar files: list members from headers alone, in bounded memory and time, and read byte ranges.

The tarfile module reads extended headers of any size into memory, loops forever on a negative size and takes quadratic
time for some headers of a few hundred kilobytes, so it is not safe for untrusted files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from fastssl_pipelines.files import open_descriptor, raise_if_machine_error
from fastssl_pipelines.sources.packed_strings import PackedStrings

BLOCK = 512  # Bytes; a block of zeros ends a tar file
EXTENDED_AT_MOST_BYTES = 2**20  # A path has at most 4 KiB, the extended attributes of a file 64 KiB

_REGULAR = b"\0" + b"07"
_WITHOUT_DATA = b"123456"  # Links, devices, folders and pipes, whatever their size field says
_LONG_NAME, _LONG_LINK = b"L", b"K"  # Of GNU tar
_OF_THE_NEXT, _OF_ALL = (b"x", b"X"), b"g"  # Extended headers of POSIX
_SPARSE = b"S"
_DIGITS = 20  # Of a size, as many as 2**64 has

_KEPT_AT_MOST = 512  # Descriptors
_SHARE_OF_LIMIT = 0.5  # Fraction of the process's limit; the rest is for worker processes, logs and libraries


class Member(NamedTuple):
    """Entry of a tar file: file, folder, link or other, with `size` bytes of data at `offset`."""

    name: str
    is_file: bool
    is_folder: bool
    offset: int
    size: int


def members(descriptor: int) -> Iterator[Member]:
    """Yield the members of an open tar file in order.

    ValueError, which says what is wrong, for a missing end, a damaged header or a sparse member; OSError if the file
    cannot be read.
    """
    total = os.fstat(descriptor).st_size
    at, of_all, of_next = 0, dict[str, bytes](), dict[str, bytes]()
    while (block := read_stretch(descriptor, at, BLOCK)) != bytes(BLOCK):
        name, kind, size = _header(block)
        extended = kind in (_LONG_NAME, _LONG_LINK, _OF_ALL, *_OF_THE_NEXT)
        if not extended:
            known = of_all | of_next
            name = known.get("path", name)
            if kind == _SPARSE or "sparse" in known:
                raise ValueError(f"{os.fsdecode(name)} is sparse; make the shard again without sparse files")
            size = _decimal(known["size"]) if "size" in known else size
        start = at + BLOCK
        length = 0 if kind in _WITHOUT_DATA else size
        if not 0 <= length <= total - start:
            raise ValueError(f"the data of {os.fsdecode(name)} goes beyond the end of the file")
        at = start + length + -length % BLOCK
        if not extended:
            folder = kind == b"5" or (kind == b"\0" and name.endswith(b"/"))
            yield Member(os.fsdecode(name), kind in _REGULAR and not folder, folder, start, length)
            of_next = {}
            continue
        if length > EXTENDED_AT_MOST_BYTES:
            raise ValueError(f"an extended header has {length} bytes and at most {EXTENDED_AT_MOST_BYTES} are allowed")
        content = read_stretch(descriptor, start, length)
        if kind == _LONG_NAME:
            of_next["path"] = content.partition(b"\0")[0]
        elif kind == _OF_ALL:
            of_all |= _records(content)
        elif kind in _OF_THE_NEXT:
            of_next |= _records(content)


def _header(block: bytes) -> tuple[bytes, bytes, int]:
    """Name, kind and size of a member; ValueError for a block that is not a header."""
    counted = block[:148] + block[156:]
    unsigned = sum(counted) + 8 * ord(" ")  # The checksum field counts as spaces
    if len(block) < BLOCK or _number(block[148:156]) not in (unsigned, unsigned - 256 * sum(c > 127 for c in counted)):
        raise ValueError("the end mark of a tar file is missing")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return name, block[156:157], _number(block[124:136])


def _number(field: bytes) -> int:
    """Parse octal digits or a signed base-256 number; -1 for anything else."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(b"\0" + field[1:] if field[0] == 0x80 else field, "big", signed=True)
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        return -1
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    return int(digits) if digits.isdigit() and len(digits) <= _DIGITS else -1


def _records(content: bytes) -> dict[str, bytes]:
    """Path and size in a POSIX extended header, and "sparse" for sparse data."""
    records: dict[str, bytes] = {}
    content, at = content.rstrip(b"\0"), 0
    while at < len(content):
        digits = content[at : at + _DIGITS].partition(b" ")[0]
        length = _decimal(digits)
        keyword, equals, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if length <= len(digits) or not equals or at + length > len(content):
            raise ValueError("an extended header is damaged")
        if keyword in (b"path", b"size"):
            records[keyword.decode()] = value
        elif keyword.startswith(b"GNU.sparse."):
            records["sparse"] = value
        at += length
    return records


class OpenFiles:
    """Reads byte ranges of files, by index, through descriptors that stay open; thread-safe, pickled without them.

    All instances together keep at most 512 descriptors, and at most half of the process's limit.
    """

    _lock: ClassVar[threading.RLock] = threading.RLock()  # Reentrant: a finalizer can run in the thread that holds it
    _kept: ClassVar[int] = 0

    def __init__(self, folder: str, files: PackedStrings) -> None:
        self._folder, self._files = folder, files
        self._descriptors: dict[int, int] = {}

    def read(self, file: int, offset: int, length: int) -> bytes:
        """Read `length` bytes, fewer at the end of the file; OSError and MachineError as in `open_regular`."""
        path = os.path.join(self._folder, self._files[file])
        with self._lock:
            descriptor = self._descriptors.get(file)
            kept = descriptor is not None
            if descriptor is None:
                descriptor = open_descriptor(path)
                # None is closed, as another thread may be reading from it; beyond the limit, each read opens the file.
                kept = OpenFiles._kept < _kept_at_most()
                if kept:
                    self._descriptors[file] = descriptor
                    OpenFiles._kept += 1
        try:
            return read_stretch(descriptor, offset, length)
        except OSError as error:
            raise_if_machine_error(error, path)
            raise
        finally:
            if not kept:
                os.close(descriptor)

    def __getstate__(self) -> tuple[str, PackedStrings]:
        return self._folder, self._files

    def __setstate__(self, state: tuple[str, PackedStrings]) -> None:
        OpenFiles.__init__(self, *state)

    def __del__(self) -> None:
        with self._lock:
            OpenFiles._kept -= len(self._descriptors)
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def read_stretch(descriptor: int, offset: int, length: int) -> bytes:
    """Read `length` bytes at `offset`, fewer at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _kept_at_most() -> int:
    import resource  # Exists on POSIX systems only, and this module must be importable elsewhere

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _KEPT_AT_MOST if allowed == resource.RLIM_INFINITY else min(_KEPT_AT_MOST, int(_SHARE_OF_LIMIT * allowed))
