"""Checkpoints: one file of tensors and plain types with a checksum, written whole or not at all."""

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
"""What is written. Format 1 had no checksum, 2 no identity of the run; 3 had earlier names of some options."""
_READABLE = (3, FORMAT)

_MARK = b"fastssl sha256 "  # the file ends in this, 64 hexadecimal digits of all bytes before, and a line feed
_TRAILER_BYTES = len(_MARK) + 65
_PICKLE_AT_MOST_BYTES = 4 * 2**20  # a ResNet-152 with AdamW needs 0.3 MB; each byte can cost a hundred when it is read
_PLAIN = (type(None), bool, int, float, str)


class DamagedCheckpoint(ConfigError):
    """A file that is no whole checkpoint: cut short, changed since, unreadable, or not ours."""


class Checkpoints:
    """The checkpoints in the folder `checkpoints` of a run, written by a thread while training goes on.

    Kept are the newest `keep`, and each whose step is a multiple of `keep_every`. A damaged checkpoint and a write
    that failed are logged as warnings. Write from one process only; any number may read.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[str | None] | None = None
        self._failure: str | None = None  # of the last write
        self._pinned: dict[tuple[object, ...], torch.Tensor] = {}

    def save(self, state: dict[str, Any], *, step: int, wait: bool = False) -> None:
        """Take `state` as it is now and write it as the checkpoint after `step` steps; tensors may change afterwards.

        Nested dicts, lists and tuples of tensors, numbers, strings and None (TypeError for anything else). Returns once
        the copy of a CPU is made or that of a GPU queued on its current stream, and with `wait` when the file is on the
        disk. Waits for the write before, if it is under way. A write that fails leaves training alone and the older
        checkpoints as they are: a warning is logged, or with `wait`, TrainingError as `flush` raises it.
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
        """Return when the last state given to `save` is on the disk; TrainingError if it could not be written."""
        self._settle()
        if self._failure:
            raise TrainingError(
                f"{self._failure}; make room or let the folder be written to, and go on from the one before with "
                f"`fastssl resume {self.folder.parent}`"
            )

    def close(self) -> None:
        """Return when no write is under way, however it ended; also on the way out of a run that failed."""
        self._settle()
        self._writer.shutdown()

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, on the CPU, with its "step"; None if there is no checkpoint at all.

        A damaged one is renamed to NAME.damaged, so that it can be looked at and is not met again; the one before is
        taken in its place. ConfigError if all are damaged, or one was written in another format.
        """
        for path in reversed(checkpoints(self.folder)):
            try:
                return load(path)
            except DamagedCheckpoint as error:
                aside = path.with_name(f"{path.name}.damaged")
                # a read-only folder, or another rank was faster
                with suppress(OSError):
                    path.rename(aside)
                _log.warning(f"{error}; it is kept as {aside.name}, and the one before is used")
        damaged = sorted(path.name for path in self.folder.glob("step_*.damaged"))
        if damaged:
            raise ConfigError(
                f"{self.folder} holds no whole checkpoint, only damaged ones ({', '.join(damaged)}); put a good copy "
                "back, or remove them to train from the start"
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
            raise TypeError(f"a checkpoint holds tensors and plain types, and {where} is of type {type(value)}")
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
                    printable(f"{failure}; training goes on, and the older ones stay until one can be written")
                )
            return failure
        return None

    def _settle(self) -> None:
        """Wait for the write under way and record how it ended."""
        if self._under_way is None:
            return
        write, self._under_way = self._under_way, None
        self._failure = None
        self._failure = write.result()


def save(folder: Path, state: dict[str, Any], *, step: int, keep: int, keep_every: int | None = None) -> Path:
    """Write `state` as the checkpoint after `step` steps, then remove older ones; returns when it is on the disk.

    OSError leaves the folder as it was. What a killed writer left half written is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step_*.tmp"):
        leftover.unlink()
    path = path_of(folder, step)
    with open_atomic(path, temporary=path.with_suffix(".tmp")) as file:
        _write_with_checksum({"format": FORMAT, "step": step, **state}, file)
    # the rename itself must be on the disk before older checkpoints go
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in [other for other in checkpoints(folder) if _step_of(other) <= step][:-keep]:
        if keep_every is None or _step_of(old) % keep_every:
            # the new one is safe; what cannot go now goes after the next
            with suppress(OSError):
                old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    named = [path for path in folder.glob("step_*.pt") if path.stem.removeprefix("step_").isdecimal()]
    return sorted(named, key=_step_of)


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU, with its "step".

    DamagedCheckpoint for a file that is not, byte for byte, what was written; ConfigError for one of another format or
    that may not be read, MachineError where the disk fails.
    """
    try:
        with open_regular(path) as file:
            right = _checksum_is_right(file)
            if right is False:
                raise DamagedCheckpoint(f"{path} is damaged: its bytes do not give the checksum at its end")
            state = _unpacked(file, path)
    except OSError as error:
        raise_if_machine_error(error, path)
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(f"{path} may not be read ({error.strerror}); give this user the right to") from None
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
    written = state.get("format") if isinstance(state, dict) else None
    if isinstance(written, int) and written not in _READABLE:
        raise ConfigError(
            f"{path} is a checkpoint of format {written}, and this fastssl reads formats 3 and 4; go on with "
            "the version that wrote it, or train anew in another --run.dir"
        )
    if not right or written not in _READABLE:
        raise DamagedCheckpoint(f"{path} is cut short or no checkpoint of fastssl")
    step = state.get("step")
    if type(step) is not int or step < 0 or (path in checkpoints(path.parent) and step != _step_of(path)):
        raise DamagedCheckpoint(f"{path} says that it was written after step {step}, which cannot be")
    if written == 3 and isinstance(state.get("facts"), dict):
        state["facts"] = current_facts(state["facts"])
    return state


def _unpacked(file: BinaryIO, path: Path) -> Any:
    """What torch saved, without running anything and without more memory than the file has bytes."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise DamagedCheckpoint(f"{path} has entries that are larger than the file, so it is no checkpoint")
        pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
        if sum(pickles) > _PICKLE_AT_MOST_BYTES:
            raise DamagedCheckpoint(f"{path} describes its tensors in {sum(pickles)} bytes, so it is no checkpoint")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise DamagedCheckpoint(f"{path} holds a program (TorchScript), so it is no checkpoint")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (MachineError, DamagedCheckpoint, MemoryError):
        raise
    except Exception:  # torch and zipfile raise many kinds, all of which mean the same here
        return None


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / f"step_{step:09d}.pt"


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


class _Hashing:
    """A file for torch.save that hashes what passes and remembers the error that torch hides behind its own."""

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
        torch.save(state, hashing)  # type: ignore[arg-type]  # needs no more of a file than this
    except RuntimeError:
        if hashing.error is None:
            raise
        raise hashing.error from None
    # a reader of zip files, as torch.load is one, looks for the end of the archive backwards and skips this
    file.write(_trailer(hashing.digest.hexdigest()))


def _trailer(hexdigest: str) -> bytes:
    return _MARK + hexdigest.encode() + b"\n"


def _checksum_is_right(file: BinaryIO) -> bool | None:
    """Whether the bytes give the checksum at the end of the file; None if there is none."""
    digest = hashlib.sha256()
    left = max(os.fstat(file.fileno()).st_size - _TRAILER_BYTES, 0)
    while left and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    trailer = file.read(_TRAILER_BYTES + 1)
    return trailer == _trailer(digest.hexdigest()) if trailer.startswith(_MARK) else None
