"""The one way to open what others wrote, and to write where others can write: regular files only, of bounded size."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from fastssl_pipelines.errors import MachineError

GIB = 2**30
IMAGE_AT_MOST_BYTES = GIB  # Encoded; the largest TIFF of a microscope that Pillow can decode is smaller
TEXT_AT_MOST_BYTES = GIB  # A list of the 14 million images of ImageNet-21k has 0.5 GB

# What says nothing about a file: it may be fine when it is tried again, so it is never left out of the data for that.
_OF_THE_MACHINE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT))

StrPath = str | os.PathLike[str]


def open_regular(path: StrPath) -> BinaryIO:
    """The regular file at `path` for reading, unbuffered; never waits as a FIFO would make it.

    OSError for what is no regular file or cannot be opened, MachineError where the machine is at fault.
    """
    return io.FileIO(descriptor_of(path))


def descriptor_of(path: StrPath) -> int:
    """As `open_regular`, a file descriptor that the caller closes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise_if_of_the_machine(error, path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return descriptor


def read_file(path: StrPath, *, at_most_bytes: int) -> bytes:
    """The bytes of the regular file at `path`; OSError as `open_regular`, and for more than `at_most_bytes` of them.

    A file that grows meanwhile is read to its old end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most_bytes:
            raise too_large(size, at_most_bytes, path)
        try:
            return file.read(size)
        except OSError as error:
            raise_if_of_the_machine(error, path)
            raise


def read_text(path: StrPath, *, at_most_bytes: int = TEXT_AT_MOST_BYTES, encoding: str = "utf-8") -> str:
    """The text of the regular file at `path`; OSError as `read_file`.

    Bytes that are not UTF-8 become surrogates, as in file names.
    """
    return read_file(path, at_most_bytes=at_most_bytes).decode(encoding, "surrogateescape")


def too_large(size_bytes: int, at_most_bytes: int, path: StrPath) -> OSError:
    """The OSError about a file of more than `at_most_bytes`."""
    return OSError(errno.EFBIG, f"it has {size_bytes} bytes and at most {at_most_bytes} are allowed", os.fspath(path))


def raise_if_of_the_machine(error: OSError, path: StrPath) -> None:
    """Raise MachineError where `error` tells of the machine and not of the file at `path`."""
    if error.errno in _OF_THE_MACHINE:
        raise MachineError(
            f"{os.fspath(path)} could not be read because this machine failed ({error.strerror}), which says nothing "
            "about the file; raise the limit (ulimit -n) or mend the disk, then start or resume again"
        ) from error


def write_atomic(path: StrPath, content: bytes) -> None:
    """Write `content` to the file at `path` by `open_atomic`."""
    with open_atomic(path) as file:
        file.write(content)


@contextmanager
def open_atomic(path: StrPath, *, temporary: StrPath | None = None) -> Iterator[BinaryIO]:
    """Open a file whose content replaces the file at `path`, all of it or nothing, when the `with` block ends.

    The content goes to `temporary` (by default `path` with .tmp), is synced to the disk and renamed. On an error,
    OSError included, `temporary` is removed and `path` stays as it was. Pass a unique `temporary` where several
    processes may write at once. A symbolic link at either path is replaced, and its target stays as it is.
    """
    temporary = f"{os.fspath(path)}.tmp" if temporary is None else temporary
    try:
        with new_file(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def new_file(path: StrPath) -> BinaryIO:
    """Create a file for writing in place of the file at `path`, which is removed; a link there is not followed."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def open_to_append(path: StrPath) -> BinaryIO:
    """The regular file at `path`, made where there is none, for appending, unbuffered; a link there is an OSError."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return io.FileIO(descriptor, "ab+")
