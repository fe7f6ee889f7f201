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


def prepare(folder: Path, config: Config, *, new: bool) -> None:
    """Make the folder, for a new run with config.json, and env.json; ConfigError where that cannot be.

    config.json is there as a whole or not at all, so a folder that has one can be resumed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if new:
            _write_first(folder / "config.json", to_json(config))
        if not (folder / "env.json").exists():
            (folder / "env.json").write_text(json.dumps(environment(), indent=2), encoding="utf-8")
    except FileExistsError:
        raise taken(folder) from None
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written ({error.strerror}); change --run.dir") from None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside the `with` block no other process trains in the folder; ConfigError where one does already."""
    with (folder / "lock").open("w") as file:
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


def _write_first(path: Path, text: str) -> None:
    """Of two runs that start within a second, and so have the same default folder, the second gets FileExistsError."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
