"""Named entries that this package and plug-ins register."""

from __future__ import annotations

from typing import Any, TypeVar

from fastssl.errors import ConfigError, unknown_name

_Entry = TypeVar("_Entry")


class Registry(dict[str, _Entry]):
    """Entries of a kind ("method", "preset", ...) by name; ConfigError for a name that is taken or unknown."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.origins: dict[str, tuple[str, str]] = {}
        """Module and qualified name of each definition."""

    def register(self, name: str, entry: _Entry, definition: Any) -> None:
        """Add `entry` under `name`; `definition` is the class or function that a user wrote for it."""
        origin = definition.__module__, definition.__qualname__
        # A definition that runs again, as in a notebook, replaces itself
        if self.origins.get(name, origin) != origin:
            raise ConfigError(
                f"{self.kind} {name!r} was given by {origin[0]}, and {self.origins[name][0]} already registers that "
                "name; rename one of them"
            )
        self.origins[name] = origin
        self[name] = entry

    def find(self, name: str) -> _Entry:
        """The entry called `name`."""
        if name not in self:
            raise unknown_name(self.kind, name, self, pluggable=True)
        return self[name]
