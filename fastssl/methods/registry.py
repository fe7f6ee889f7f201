"""How methods are registered, in this package and in plug-ins."""

from __future__ import annotations

from typing import TypeVar

from fastssl.errors import ConfigError
from fastssl.methods.base import Method

METHODS: dict[str, type[Method]] = {}
"""Every registered method by the name of its configuration."""

_Registered = TypeVar("_Registered", bound=type[Method])


def register_method(cls: _Registered) -> _Registered:
    """Class decorator: make a method available under `Config.name`; ConfigError if another class has that name."""
    name, other = cls.Config.name, METHODS.get(cls.Config.name)
    # A class that is defined again, as a notebook does, replaces itself
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            f"method {name!r} of {cls.__module__} was given and {other.__module__} already registers that name; "
            "change `name` of one configuration"
        )
    METHODS[name] = cls
    return cls
