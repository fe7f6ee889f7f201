"""The folder of a run: made once, and held by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastssl.config import Config, to_json
from fastssl.doctor import environment
from fastssl.errors import ConfigError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks


def taken(folder: Path) -> ConfigError:
    """The error about a folder that another run has."""
    return ConfigError(f"{folder} already holds a run; continue it with `fastssl resume {folder}` or change --run.dir")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder; inside the `with` block no other process trains in it.

    ConfigError where it cannot be made or another process trains there.
    """
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
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
        yield


def prepare(folder: Path, config: Config, *, new: bool) -> None:
    """Write config.json for a new run, and env.json; ConfigError where that cannot be, or there is a run already.

    config.json is there as a whole or not at all, so a folder that has one can be resumed. Call it inside `claimed`.
    """
    path = folder / "config.json"
    if new and path.exists():
        raise taken(folder)
    with _told(folder):
        if new:
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.write(to_json(config))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        if not (folder / "env.json").exists():
            (folder / "env.json").write_text(json.dumps(environment(), indent=2), encoding="utf-8")


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written ({error.strerror}); change --run.dir") from None
