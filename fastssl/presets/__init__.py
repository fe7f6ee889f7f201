"""The recipes by name: functions that return a configuration."""

from fastssl.presets import builtin, cifar, imagenet, stl_tiny
from fastssl.presets.registry import PRESETS, Preset, load, preset

__all__ = ["PRESETS", "Preset", "builtin", "cifar", "imagenet", "load", "preset", "stl_tiny"]
