"""Files that stay open while stretches of them are read: archives of images."""

from __future__ import annotations

import os
import threading
from typing import ClassVar

from fastssl_pipelines.files import descriptor_of, raise_if_of_the_machine
from fastssl_pipelines.sources.packed_strings import PackedStrings

_KEPT_AT_MOST = 512  # descriptors
_SHARE_OF_LIMIT = 0.5  # of what the process may open; the rest is for worker processes, logs and libraries


class OpenFiles:
    """Reads stretches of numbered files through descriptors that stay open; for threads, and pickled without them.

    Those of all instances together are at most 512 and at most half of what the process may have open.
    """

    _lock: ClassVar[threading.RLock] = threading.RLock()  # a finalizer can run while the same thread holds it
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
    import resource  # which only POSIX systems have; on others the losses must still be importable beside this

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _KEPT_AT_MOST if allowed == resource.RLIM_INFINITY else min(_KEPT_AT_MOST, int(_SHARE_OF_LIMIT * allowed))
