"""Earlier names of options, so that old run folders and checkpoints can still be read."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

_NAMES = {"unlabelled": "unlabeled", "grey": "grayscale", "centre": "center_crop"}
"""Fields of config.json in format 1, with their current names."""


def current_names(values: Any) -> Any:
    """Nested JSON values with every earlier name of an option replaced by its current name."""
    if isinstance(values, list):
        return [current_names(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {_NAMES.get(name, name): current_names(value) for name, value in values.items()}


def current_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The same for the facts of a checkpoint: options by dotted name, with views as JSON text."""
    return {_current_path(name): _current_views(name, value) for name, value in facts.items()}


def _current_path(name: str) -> str:
    return ".".join(_NAMES.get(part, part) for part in name.split("."))


def _current_views(name: str, value: Any) -> Any:
    if name in ("views", "odd_views", "eval_view") and isinstance(value, str):
        # A damaged text stays as it is: it equals no run's and is refused or reported by comparison
        with suppress(ValueError, RecursionError):
            return json.dumps(current_names(json.loads(value)))
    return value
