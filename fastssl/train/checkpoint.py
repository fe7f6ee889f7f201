"""Checkpoints: one file of tensors and plain types with a checksum, written atomically."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastssl.errors import ConfigError, TrainingError
from fastssl.renamed import current_facts
from fastssl_pipelines.errors import MachineError
from fastssl_pipelines.files import open_atomic, open_regular, raise_if_machine_error
from fastssl_pipelines.names import printable

_log = logging.getLogger(__name__)

FORMAT = 4
"""The format written. Format 1 had no checksum, 2 no run identity; 3 has earlier names of some options."""
_READABLE = (3, FORMAT)

_MARK = b"fastssl sha256 "  # The file ends in this, the SHA-256 of all bytes before it in hex, and a line feed
_TRAILER_BYTES = len(_MARK) + 65
_PICKLE_AT_MOST_BYTES = 4 * 2**20  # ResNet-152 with AdamW needs 0.3 MB; unpickling can take 100 times as much memory
_PLAIN = (type(None), bool, int, float, str)


class DamagedCheckpoint(ConfigError):
    """The file is truncated, modified, unreadable or not a fastssl checkpoint."""


class Checkpoints:
    """The checkpoints of a run, written by a background thread.

    Keeps the newest `keep`, and every one whose step is a multiple of `keep_every`. Damaged files and failed writes are
    logged as warnings. Only one process may write; any number may read.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[str | None] | None = None
        self._failure: str | None = None  # Of the last write
        self._pinned: dict[tuple[object, ...], torch.Tensor] = {}

    def save(self, state: dict[str, Any], *, step: int, wait: bool = False) -> None:
        """Copy `state` and write it as the checkpoint after `step` steps; its tensors may change afterwards.

        `state`: nested dicts, lists and tuples of tensors, numbers, strings and None (TypeError for anything else).
        Waits for the previous write, then returns once CPU tensors are copied and GPU copies are queued on the current
        stream, or with `wait` when the file is on disk. A failed write interrupts nothing and keeps the older
        checkpoints: it is logged as a warning, or with `wait` raised as a TrainingError as from `flush`.
        """
        self._settle()
        copy = self._on_host(state, ())
        copied = None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        self._under_way = self._writer.submit(self._write, copy, copied, step, warn=not wait)
        if wait:
            self.flush()

    def flush(self) -> None:
        """Wait until the last state given to `save` is on disk; TrainingError if it could not be written."""
        self._settle()
        if self._failure:
            raise TrainingError(
                f"{self._failure}; free space on the disk or make the folder writable, and continue from the previous "
                f"one with `fastssl resume {self.folder.parent}`"
            )

    def close(self) -> None:
        """Wait for the write in progress, successful or not; also called when a run fails."""
        self._settle()
        self._writer.shutdown()

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest intact checkpoint, on the CPU, with its "step"; None if there is no checkpoint.

        Renames a damaged one to NAME.damaged, for inspection, and tries the one before. ConfigError if all are damaged,
        or if one has another format.
        """
        for path in reversed(checkpoints(self.folder)):
            try:
                return load(path)
            except DamagedCheckpoint as error:
                aside = path.with_name(f"{path.name}.damaged")
                # Fails in a read-only folder, or if another rank was faster
                with suppress(OSError):
                    path.rename(aside)
                _log.warning(f"{error}; it is kept as {aside.name}, and the one before is used")
        damaged = sorted(path.name for path in self.folder.glob("step_*.damaged"))
        if damaged:
            raise ConfigError(
                f"{self.folder} has only damaged checkpoints ({', '.join(damaged)}); put a good copy back, or remove "
                "them to train from the start"
            )
        return None

    def _on_host(self, value: Any, name: tuple[object, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._in_pinned_memory(value, name) if value.is_cuda else value.detach().clone()
        if isinstance(value, dict):
            return {key: self._on_host(item, (*name, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self._on_host(item, (*name, i)) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if type(value) not in _PLAIN:
            where = ".".join(map(str, name))
            raise TypeError(f"{where} is of type {type(value)}; a checkpoint holds only tensors and plain types")
        return value

    def _in_pinned_memory(self, tensor: torch.Tensor, name: tuple[object, ...]) -> torch.Tensor:
        buffer = self._pinned.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._pinned[name] = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _write(self, state: dict[str, Any], copied: torch.cuda.Event | None, step: int, *, warn: bool) -> str | None:
        """Write in the thread; returns why that failed, or None."""
        if copied is not None:
            copied.synchronize()
        try:
            save(self.folder, state, step=step, keep=self.keep, keep_every=self.keep_every)
        except OSError as error:
            path = error.filename or path_of(self.folder, step)
            failure = f"the checkpoint after step {step} was not written ({error.strerror}: {path})"
            if warn:
                _log.warning(
                    printable(f"{failure}; training continues, and older checkpoints stay until a write succeeds")
                )
            return failure
        return None

    def _settle(self) -> None:
        """Wait for the write in progress and record its outcome."""
        if self._under_way is None:
            return
        write, self._under_way = self._under_way, None
        self._failure = write.result()


def save(folder: Path, state: dict[str, Any], *, step: int, keep: int, keep_every: int | None = None) -> Path:
    """Write `state` as the checkpoint after `step` steps, then remove older ones; returns when it is on disk.

    OSError leaves the folder as it was. Removes temporary files of killed writers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step_*.tmp"):
        leftover.unlink()
    path = path_of(folder, step)
    with open_atomic(path, temporary=path.with_suffix(".tmp")) as file:
        _write_with_checksum({"format": FORMAT, "step": step, **state}, file)
    # The rename itself must be on disk before older checkpoints are removed
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in [other for other in checkpoints(folder) if _step_of(other) <= step][:-keep]:
        if keep_every is None or _step_of(old) % keep_every:
            # The new one is safe; a file that cannot be removed now is removed after the next save
            with suppress(OSError):
                old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    named = [path for path in folder.glob("step_*.pt") if path.stem.removeprefix("step_").isdecimal()]
    return sorted(named, key=_step_of)


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU, with its "step".

    DamagedCheckpoint for a file that differs in any byte from what was written; ConfigError for another format or
    missing read permission, MachineError if the disk fails.
    """
    try:
        with open_regular(path) as file:
            checksum_matches = _checksum_matches(file)
            if checksum_matches is False:
                raise DamagedCheckpoint(f"{path} is damaged: its contents do not match the checksum at its end")
            state = _unpacked(file, path)
    except OSError as error:
        raise_if_machine_error(error, path)
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(f"{path} may not be read ({error.strerror}); make it readable for this user") from None
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
    written = state.get("format") if isinstance(state, dict) else None
    if isinstance(written, int) and written not in _READABLE:
        raise ConfigError(
            f"{path} has checkpoint format {written}, and this fastssl reads formats 3 and 4; continue with the "
            "version that wrote it, or start a new run in another --run.dir"
        )
    if not checksum_matches or written not in _READABLE:
        raise DamagedCheckpoint(f"{path} is truncated or not a fastssl checkpoint")
    step = state.get("step")
    if type(step) is not int or step < 0 or (path in checkpoints(path.parent) and step != _step_of(path)):
        raise DamagedCheckpoint(f"{path} says that it was written after step {step}, which is impossible")
    if written == 3 and isinstance(state.get("facts"), dict):
        state["facts"] = current_facts(state["facts"])
    return state


def _unpacked(file: BinaryIO, path: Path) -> Any:
    """What torch saved; runs no code from the file and takes no more memory than the file's size."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise DamagedCheckpoint(f"{path} has entries larger than the file, so it is not a checkpoint")
        pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
        if sum(pickles) > _PICKLE_AT_MOST_BYTES:
            raise DamagedCheckpoint(f"{path} describes its tensors in {sum(pickles)} bytes, so it is not a checkpoint")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise DamagedCheckpoint(f"{path} contains a program (TorchScript), so it is not a checkpoint")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (MachineError, DamagedCheckpoint, MemoryError):
        raise
    except Exception:  # torch and zipfile raise many types, and all mean a damaged file
        return None


def path_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint after `step` steps."""
    return folder / f"step_{step:09d}.pt"


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


class _Hashing:
    """A file for torch.save that hashes what is written and keeps the OSError that torch replaces by its own."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_with_checksum(state: dict[str, Any], file: BinaryIO) -> None:
    hashing = _Hashing(file)
    try:
        torch.save(state, hashing)  # type: ignore[arg-type]  # It needs only `write` and `flush`
    except RuntimeError:
        if hashing.error is None:
            raise
        raise hashing.error from None
    # Zip readers, including torch.load, search for the archive's end from the back and skip this
    file.write(_trailer(hashing.digest.hexdigest()))


def _trailer(hexdigest: str) -> bytes:
    return _MARK + hexdigest.encode() + b"\n"


def _checksum_matches(file: BinaryIO) -> bool | None:
    """Whether the contents match the checksum at the end of the file; None if it has none."""
    digest = hashlib.sha256()
    left = max(os.fstat(file.fileno()).st_size - _TRAILER_BYTES, 0)
    while left and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    trailer = file.read(_TRAILER_BYTES + 1)
    return trailer == _trailer(digest.hexdigest()) if trailer.startswith(_MARK) else None
