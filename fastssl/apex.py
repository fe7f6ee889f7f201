"""Optional features of NVIDIA apex: its fused optimizers, and its group norm for channels_last tensors.

The PyPI package `apex` is unrelated; build NVIDIA's from github.com/NVIDIA/apex.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from fastssl.errors import ConfigError

_OPTIMIZERS = "apex.optimizers"
_GROUP_NORM = "apex.contrib.group_norm"


def why_not_apex(module: str = _OPTIMIZERS) -> str | None:
    """Why a module of NVIDIA apex cannot be used here; None if it can."""
    try:
        if importlib.util.find_spec("apex") is None:
            return "not installed"
        importlib.import_module(module)
    except ImportError as error:  # PyPI's package, or NVIDIA's without its compiled part
        return f"the installed apex has no {module} ({error})"
    return None


def apex_optimizer(name: str, groups: list[dict[str, Any]], option: str, **settings: Any) -> Any:
    """FusedSGD, FusedAdam, FusedLAMB or FusedNovoGrad over the groups; ConfigError naming `option` without apex."""
    return getattr(_required(_OPTIMIZERS, option), name)(groups, **settings)


def apex_group_norm(groups: int, channels: int) -> Any:
    """apex's group norm for NHWC tensors; ConfigError without apex."""
    return _required(_GROUP_NORM, "--model.norm apex-group").GroupNorm(groups, channels)


def _required(module: str, option: str) -> Any:
    if reason := why_not_apex(module):
        raise ConfigError(
            f"{option} was given and NVIDIA apex cannot be used here: {reason}; choose an option that torch provides"
        )
    return importlib.import_module(module)
