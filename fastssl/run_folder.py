"""The folder of a run: made once, held by one run at a time, and missed when it is gone."""

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
from fastssl_pipelines.files import open_to_append, read_text, write_whole

CONFIG_AT_MOST_BYTES = 16 * 2**20

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks


def taken(folder: Path) -> ConfigError:
    """The error about a folder that another run has."""
    return ConfigError(f"{folder} already holds a run; continue it with `fastssl resume {folder}` or change --run.dir")


@contextmanager
def new_folder(preset: str) -> Iterator[Path]:
    """A folder of its own for a run that was given none, runs/PRESET-DATE; without files it goes again at the end."""
    first = Path("runs") / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"
    with _os_error_as_config_error(first):
        first.parent.mkdir(parents=True, exist_ok=True)
        folder = next(path for path in _numbered(first) if _made(path))
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # the run was refused before it wrote anything


def _numbered(first: Path) -> Iterator[Path]:
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))


def _made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


class Claim:
    """The hold of a run on its folder; made by `claimed`."""

    def __init__(self, folder: Path, lock: BinaryIO) -> None:
        self._folder, self._lock = folder, lock

    def require(self) -> None:
        """Raise TrainingError where the folder is no longer there, or another one stands in its place."""
        try:
            there = os.path.samestat(os.stat(self._folder / "lock"), os.fstat(self._lock.fileno()))
        except OSError:
            there = False
        if not there or not (self._folder / "config.json").is_file():
            raise TrainingError(
                f"the run folder {self._folder} was removed or replaced while the run went on, so nothing more can be "
                "kept there; put it back and `fastssl resume` it, or start a new run"
            )


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Make the folder; inside the `with` block no other process trains in it.

    ConfigError where it cannot be made or another process trains there.
    """
    with _os_error_as_config_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open_to_append(folder / "lock")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"the run in {folder} is being trained by another process; wait for its end, or stop it first"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield Claim(folder, file)


def prepare(folder: Path, config: Config, *, identity: dict[str, Any], new: bool) -> None:
    """Write config.json for a new run, and env.json; ConfigError where that cannot be, or there is a run already.

    config.json is there as a whole or not at all, so a folder that has one can be resumed. Call it inside `claimed`.
    """
    path = folder / "config.json"
    if new and os.path.lexists(path):
        raise taken(folder)
    with _os_error_as_config_error(folder):
        if new:
            values = json.loads(to_json(config)) | {"identity": identity}
            write_whole(path, json.dumps(values, indent=2).encode())
        if not (folder / "env.json").exists():
            write_whole(folder / "env.json", json.dumps(environment(), indent=2).encode())


def read_config(folder: Path) -> str:
    """The text of a run's config.json; ConfigError where there is none or it cannot be read."""
    path = folder / "config.json"
    if not _exists(path):
        raise ConfigError(f"{folder} holds no config.json, so it is no run folder; give the folder that pretrain named")
    return config_text(path)


def config_text(path: Path) -> str:
    """The text of a configuration file; ConfigError where it cannot be read."""
    try:
        return read_text(path, at_most_bytes=CONFIG_AT_MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}); give a config.json that a run wrote") from None


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a name that no file can have
        return False


@contextmanager
def _os_error_as_config_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the run folder {folder} cannot be written ({reason}); change --run.dir") from None
