"""Checkpoints: one file of tensors and plain types, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastssl.errors import ConfigError

FORMAT = 1


def save(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write `state` (tensors and plain types) as the checkpoint after `step` steps; keep the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    # the rename itself must be on the disk before older checkpoints go
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU; raises ConfigError for a file that is not one of our checkpoints."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({reason}); remove it to use the one before"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a fastssl checkpoint of format {FORMAT}")
    return state
