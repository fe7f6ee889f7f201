"""Restores a run's state from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.distributed import world_size
from fastssl.errors import ConfigError
from fastssl.models.norm import load_statistics

_PARTS: dict[str, type] = {
    "method": dict,
    "statistics": torch.Tensor,
    "optimizer": dict,
    "scaler": dict,
    "skipped": list,
    "window": dict,
    "facts": dict,
    "length": int,
}


def require_whole(state: dict[str, Any], where: Path) -> None:
    """Raise ConfigError for a checkpoint that lacks a part that the trainer writes."""
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name), kind):
            raise _does_not_fit(where, f"it has no {name}")


def load_state(method: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], where: Path) -> None:
    """Restore method, batch norm statistics and optimizer; ConfigError naming what does not fit.

    The caller has compared the run's identity, so a misfit here means that the file was edited.
    """
    load_method(method, state, where)
    try:
        if len(state["statistics"]) == world_size():
            load_statistics(method, state["statistics"])
        _require_same_groups(optimizer, state["optimizer"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(value.shape)} for weights of {list(parameter.shape)}")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _does_not_fit(where, f"its optimizer or its statistics: {error}") from None


def load_method(method: nn.Module, state: dict[str, Any], where: Path) -> None:
    """Restore the weights and buffers of a method; ConfigError naming the first that does not fit."""
    given, own = state["method"], method.state_dict()
    if not all(isinstance(value, torch.Tensor) for value in given.values()):
        raise _does_not_fit(where, "its weights are not tensors")
    if differing := sorted(map(str, given.keys() ^ own.keys())):
        side = "lacks" if differing[0] in own else "has, and the run has not,"
        raise _does_not_fit(where, f"it {side} {differing[0]} ({len(differing)} such)")
    try:
        method.load_state_dict(given)
    except RuntimeError as error:
        raise _does_not_fit(where, " ".join(str(error).split("\n")[1].split())) from None


def _require_same_groups(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
    own = optimizer.state_dict()["param_groups"]
    for group, other in zip(own, given["param_groups"], strict=True):
        if differing := sorted(group.keys() ^ other.keys()):
            raise ValueError(f"only one of them has the option {differing[0]}")


def _does_not_fit(where: Path, what: str) -> ConfigError:
    return ConfigError(f"{where} does not fit this run ({what}); put the run's own checkpoint back, or start a new run")
