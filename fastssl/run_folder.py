"""The folder of a run: created once, locked by one process at a time, and checked for removal."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from fastssl.config import Config, to_json
from fastssl.environment import environment
from fastssl.errors import ConfigError, TrainingError
from fastssl_pipelines.files import open_to_append, read_text, write_atomic

CONFIG_AT_MOST_BYTES = 16 * 2**20

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # From file systems without locks


def taken(folder: Path) -> ConfigError:
    """The error for a folder that already holds a run."""
    return ConfigError(f"{folder} already holds a run; continue it with `fastssl resume {folder}` or change --run.dir")


@contextmanager
def new_folder(preset: str) -> Iterator[Path]:
    """Create a new folder runs/PRESET-DATE, and remove it at the end of the `with` block if it is empty."""
    first = Path("runs") / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"
    with _os_error_as_config_error(first):
        first.parent.mkdir(parents=True, exist_ok=True)
        folder = next(path for path in _numbered(first) if _made(path))
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # The run was refused before it wrote anything


def _numbered(first: Path) -> Iterator[Path]:
    yield first
    yield from (first.with_name(f"{first.name}-{suffix}") for suffix in count(2))


def _made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


class Claim:
    """The lock of a run on its folder, from `claimed`."""

    def __init__(self, folder: Path, lock: BinaryIO) -> None:
        self._folder, self._lock = folder, lock

    def require(self) -> None:
        """Raise TrainingError if the folder was removed or replaced."""
        try:
            same = os.path.samestat(os.stat(self._folder / "lock"), os.fstat(self._lock.fileno()))
        except OSError:
            same = False
        if not same or not (self._folder / "config.json").is_file():
            raise TrainingError(
                f"the run folder {self._folder} was removed or replaced during the run, so nothing more can be saved "
                "there; put it back and `fastssl resume` it, or start a new run"
            )


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Create the folder if necessary, and lock it against other processes inside the `with` block.

    ConfigError if it cannot be created or another process trains in it.
    """
    with _os_error_as_config_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open_to_append(folder / "lock")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"the run in {folder} is being trained by another process; wait until it ends, or stop it first"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield Claim(folder, file)


def prepare(folder: Path, config: Config, *, identity: dict[str, Any], new: bool) -> None:
    """Write config.json for a new run, and env.json; ConfigError if they cannot be written or a run exists already.

    Writes config.json atomically, so a folder that has one can be resumed. Call it inside `claimed`.
    """
    path = folder / "config.json"
    if new and os.path.lexists(path):
        raise taken(folder)
    with _os_error_as_config_error(folder):
        if new:
            values = json.loads(to_json(config)) | {"identity": identity}
            write_atomic(path, json.dumps(values, indent=2).encode())
        if not (folder / "env.json").exists():
            write_atomic(folder / "env.json", json.dumps(environment(), indent=2).encode())


def read_config(folder: Path) -> str:
    """The text of a run's config.json; ConfigError if it is missing or unreadable."""
    path = folder / "config.json"
    if not _exists(path):
        raise ConfigError(
            f"{folder} has no config.json, so it is not a run folder; give the folder that `fastssl pretrain` printed"
        )
    return config_text(path)


def config_text(path: Path) -> str:
    """The text of a configuration file; ConfigError if it cannot be read."""
    try:
        return read_text(path, at_most_bytes=CONFIG_AT_MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}); give a config.json that a run wrote") from None


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # Not a valid file name
        return False


@contextmanager
def _os_error_as_config_error(folder: Path) -> Iterator[None]:
    """Turn an OSError inside the `with` block into a ConfigError about the run folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the run folder {folder} cannot be written ({reason}); change --run.dir") from None
