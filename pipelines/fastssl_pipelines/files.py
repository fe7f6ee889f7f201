"""Safe file access: read regular files of bounded size only, write atomically and never through a link."""

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
IMAGE_AT_MOST_BYTES = GIB  # Encoded; the largest microscope TIFF that Pillow can decode is smaller
TEXT_AT_MOST_BYTES = GIB  # A list of the 14 million images of ImageNet-21k has 0.5 GB

# Errors that say nothing about the file: it may be fine at the next try, so it stays in the data set.
_MACHINE_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT))

StrPath = str | os.PathLike[str]


def open_regular(path: StrPath) -> BinaryIO:
    """Open the regular file at `path` for reading, unbuffered; never blocks on a FIFO.

    OSError if it is not a regular file or cannot be opened, MachineError if the machine is at fault.
    """
    return io.FileIO(open_descriptor(path))


def open_descriptor(path: StrPath) -> int:
    """Like `open_regular`, but returns a file descriptor, which the caller closes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise_if_machine_error(error, path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return descriptor


def read_file(path: StrPath, *, at_most_bytes: int) -> bytes:
    """Read the regular file at `path`; OSError as in `open_regular`, and for more than `at_most_bytes`.

    A file that grows while it is read is read up to its old end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most_bytes:
            raise too_large(size, at_most_bytes, path)
        try:
            return file.read(size)
        except OSError as error:
            raise_if_machine_error(error, path)
            raise


def read_text(path: StrPath, *, at_most_bytes: int = TEXT_AT_MOST_BYTES, encoding: str = "utf-8") -> str:
    """Read the regular file at `path` as text; OSError as in `read_file`.

    Bytes that are not UTF-8 become surrogates, as in file names.
    """
    return read_file(path, at_most_bytes=at_most_bytes).decode(encoding, "surrogateescape")


def too_large(size_bytes: int, at_most_bytes: int, path: StrPath) -> OSError:
    """OSError for a file of more than `at_most_bytes`."""
    return OSError(errno.EFBIG, f"it has {size_bytes} bytes and at most {at_most_bytes} are allowed", os.fspath(path))


def raise_if_machine_error(error: OSError, path: StrPath) -> None:
    """Raise MachineError if `error` is about the machine and not about the file at `path`."""
    if error.errno in _MACHINE_ERRNOS:
        raise MachineError(
            f"{os.fspath(path)} could not be read because this machine failed ({error.strerror}), which says nothing "
            "about the file; raise the limit (ulimit -n) or fix the disk, then start or resume again"
        ) from error


def write_atomic(path: StrPath, content: bytes) -> None:
    """Write `content` to `path` atomically; see `open_atomic`."""
    with open_atomic(path) as file:
        file.write(content)


@contextmanager
def open_atomic(path: StrPath, *, temporary: StrPath | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing whose content replaces the file at `path` atomically when the `with` block ends.

    The content is written to `temporary` (by default `path` plus ".tmp"), synced to disk and renamed. After an error,
    `temporary` is removed and `path` is unchanged. Pass a unique `temporary` if several processes may write at the
    same time. A symbolic link at either path is replaced; its target stays as it is.
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
    """Remove the file at `path` and create a new one for writing; a link there is not followed."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def open_to_append(path: StrPath) -> BinaryIO:
    """Open or create the regular file at `path` for appending, unbuffered; OSError if `path` is a link."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return io.FileIO(descriptor, "ab+")
