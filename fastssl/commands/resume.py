"""`fastssl resume`: continue a stopped run."""

from __future__ import annotations

from pathlib import Path

from fastssl.commands.pretrain import train
from fastssl.config import from_json
from fastssl.errors import ConfigError
from fastssl.run_folder import read_config


def main(arguments: list[str]) -> int:
    """`fastssl resume RUN`."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"{len(arguments)} arguments were given; resume takes one run folder: fastssl resume RUN")
    folder = Path(arguments[0])
    return train(from_json(read_config(folder)), folder, new=False)
