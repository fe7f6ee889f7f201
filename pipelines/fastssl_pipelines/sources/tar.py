"""What a tar file holds, from its headers alone: bounded in memory and time whatever the file says.

The tarfile module reads extended headers of any size into memory, goes back for ever on a negative size and takes
quadratic time for some headers of a few hundred kilobytes, so it is not for files from strangers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from fastssl_pipelines.files import descriptor_of, raise_if_of_the_machine
from fastssl_pipelines.sources.packed_strings import PackedStrings

BLOCK = 512  # Bytes; a block of zeros ends a tar file
EXTENDED_AT_MOST_BYTES = 2**20  # A path has at most 4 KiB, the extended attributes of a file 64 KiB

_REGULAR = b"\0" + b"07"
_WITHOUT_DATA = b"123456"  # Links, devices, folders and pipes, whatever size they tell
_LONG_NAME, _LONG_LINK = b"L", b"K"  # Of GNU tar
_OF_THE_NEXT, _OF_ALL = (b"x", b"X"), b"g"  # Extended headers of POSIX
_SPARSE = b"S"
_DIGITS = 20  # Of a size; 2**64 has as many

_KEPT_AT_MOST = 512  # Descriptors
_SHARE_OF_LIMIT = 0.5  # Of what the process may open; the rest is for worker processes, logs and libraries


class Member(NamedTuple):
    """A file, folder, link or other in a tar file: `size` bytes of data from `offset` on."""

    name: str
    is_file: bool
    is_folder: bool
    offset: int
    size: int


def members(descriptor: int) -> Iterator[Member]:
    """The members of the open tar file in their order.

    ValueError, with what is wrong, for a file without its end, a damaged header and a sparse member; OSError where it
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
    """Name, kind and size of the member; ValueError for a block that is no header."""
    counted = block[:148] + block[156:]
    unsigned = sum(counted) + 8 * ord(" ")  # The sum itself counts as spaces
    if len(block) < BLOCK or _number(block[148:156]) not in (unsigned, unsigned - 256 * sum(c > 127 for c in counted)):
        raise ValueError("the end mark of a tar file is missing")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return name, block[156:157], _number(block[124:136])


def _number(field: bytes) -> int:
    """Octal digits, or a signed number in base 256; -1 for what is neither."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(b"\0" + field[1:] if field[0] == 0x80 else field, "big", signed=True)
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        return -1
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    return int(digits) if digits.isdigit() and len(digits) <= _DIGITS else -1


def _records(content: bytes) -> dict[str, bytes]:
    """What an extended header of POSIX says of path and size, and whether the data is sparse."""
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
    """Reads stretches of numbered files through descriptors that stay open; for threads, and pickled without them.

    Those of all instances together are at most 512 and at most half of what the process may have open.
    """

    _lock: ClassVar[threading.RLock] = threading.RLock()  # A finalizer can run while the same thread holds it
    _kept: ClassVar[int] = 0

    def __init__(self, folder: str, files: PackedStrings) -> None:
        self._folder, self._files = folder, files
        self._descriptors: dict[int, int] = {}

    def read(self, file: int, offset: int, length: int) -> bytes:
        """`length` bytes, fewer where the file ends; OSError and MachineError as `open_regular`."""
        path = os.path.join(self._folder, self._files[file])
        with self._lock:
            descriptor = self._descriptors.get(file)
            kept = descriptor is not None
            if descriptor is None:
                descriptor = descriptor_of(path)
                # Closing one that another thread reads from would be wrong, so the rest are opened for each read.
                kept = OpenFiles._kept < _kept_at_most()
                if kept:
                    self._descriptors[file] = descriptor
                    OpenFiles._kept += 1
        try:
            return read_stretch(descriptor, offset, length)
        except OSError as error:
            raise_if_of_the_machine(error, path)
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
    """`length` bytes from `offset` on, fewer where the file ends."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _kept_at_most() -> int:
    import resource  # Which only POSIX systems have; on others the losses must still be importable beside this

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _KEPT_AT_MOST if allowed == resource.RLIM_INFINITY else min(_KEPT_AT_MOST, int(_SHARE_OF_LIMIT * allowed))
