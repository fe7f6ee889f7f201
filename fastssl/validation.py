"""Checks of a dataclass against its type hints and the ranges in them."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastssl.errors import ConfigError, unknown_name

_SHOWN_CHARACTERS = 60
_NAME_BYTES, _PATH_BYTES = 255, 4095  # Limits of a part and of a whole path on Linux
_KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", Path: "a path"}

_Built = TypeVar("_Built")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Allowed range of a number, written in its hint: Annotated[float, Range(above=0, most=10)]."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether the finite `value` lies in the range."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        if (self.least, self.most) == (0, 1):
            return "in [0, 1]"
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))


# Hints that several options share; the upper limits are far above any use and catch typing errors
Count = Annotated[int, Range(least=1, most=10**12)]
Dim = Annotated[int, Range(least=1, most=2**14)]
Width = Annotated[int, Range(least=1, most=2**15)]
Rows = Annotated[int, Range(least=1, most=2**28)]
Images = Annotated[int, Range(least=1, most=2**20)]
Threads = Annotated[int, Range(least=1, most=1024)]
Seconds = Annotated[float, Range(above=0, most=10**7)]
Share = Annotated[float, Range(least=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]
Weight = Annotated[float, Range(least=0, most=1000)]
Rate = Annotated[float, Range(above=0, most=1e38)]  # The largest float32 is 3e38
Temperature = Annotated[float, Range(least=0.001, most=1000)]  # As the losses accept it


class Checked:
    """Base of dataclasses that check their type hints on construction; ConfigError for a value that does not fit.

    The error names the option: `prefix` and the name of the field. A subclass checks relations between its fields in
    its own `__post_init__`, after calling this one.
    """

    prefix: ClassVar[str] = "--"

    def __init_subclass__(cls, prefix: str | None = None) -> None:
        super().__init_subclass__()
        if prefix is not None:
            cls.prefix = prefix

    def __post_init__(self) -> None:
        check(self, self.prefix)


def check(options: object, prefix: str = "--") -> None:
    """Convert every field of a dataclass to its hint by `conform`; ConfigError if that is impossible."""
    for name, hint in _hints(type(options)).items():
        option = prefix + name.replace("_", "-")
        object.__setattr__(options, name, conform(hint, getattr(options, name), option))


def _read_hints(cls: type) -> dict[str, Any]:
    """The type hints of a dataclass by field, with the ranges in them."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


_hints: Callable[[type], dict[str, Any]] = functools.cache(_read_hints)


def conform(hint: Any, value: Any, name: str) -> Any:
    """Convert `value` to `hint`, such as an integer to a float or, from JSON, a list to a tuple.

    ConfigError, which calls the value `name`, for a value of another type or outside the hint's range.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _in_range(conform(arguments[0], value, name), value, arguments[1:], name)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else conform(arguments[0], value, name)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise refused(name, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, name)
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, name)
    return _plain(hint, value, name)


def build(cls: type[_Built], values: dict[str, Any], place: str = "") -> _Built:
    """Build the dataclass from a JSON object at `place` in its file.

    ConfigError for a field that is unknown or missing, or fails its hint or the class's own checks.
    """
    hints = _hints(cls)
    path = f"{place}." if place else ""
    for name in values:
        if name not in hints:
            raise unknown_name(f"option in the configuration's {cls.__name__}", name, hints)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        # An option may be newer than the file, a section may not
        section = dataclasses.is_dataclass(hints[field.name])
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and (section or not optional):
            raise ConfigError(f"the configuration has no {path}{field.name}; give the file as fastssl wrote it")
    fields = {name: conform(hints[name], value, path + name) for name, value in values.items()}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place or 'the configuration'}: {error}") from None


def _in_range(value: Any, given: Any, notes: tuple[Any, ...], name: str) -> Any:
    for note in notes:
        if isinstance(note, Range) and not note.holds(value):
            raise refused(name, given, str(note))
    return value


def _tuple(items: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise refused(name, value, "a list")
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(value) != len(items):
        raise refused(name, value, f"a list of {len(items)}")
    # On the command line one option has all the values, in a file each has an index
    option = name.startswith("-")
    names = [f"{name} {_shown(value)}: value" if option else f"{name}[{index}]" for index in range(len(items))]
    return tuple(conform(*each) for each in zip(items, value, names, strict=True))


def _section(cls: type, value: Any, name: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise refused(name, value, f"an object with the fields of {cls.__name__}")
    return build(cls, value, name)


def _plain(kind: type, value: Any, name: str) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return checked_path(value, name)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:
            raise refused(name, value, _KINDS[float])
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise refused(name, value, _KINDS[kind])
    return value


def checked_path(path: str | Path, name: str) -> Path:
    """Convert to a Path; ConfigError if it is empty, too long for a file system or contains a zero byte."""
    try:
        whole = os.fsencode(path)
    except UnicodeEncodeError:
        raise refused(name, str(path), "a path that can be encoded") from None
    if not whole or b"\0" in whole:
        raise refused(name, str(path), "a path without zero bytes that is not empty")
    if len(whole) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in whole.split(b"/")):
        allowed = f"a path of at most {_PATH_BYTES} bytes, {_NAME_BYTES} in each part"
        raise refused(name, str(path), allowed)
    return Path(path)


def require(holds: bool, option: str, given: object, allowed: str) -> None:
    """Raise ConfigError that `given` must be `allowed`, unless `holds`."""
    if not holds:
        raise refused(option, given, allowed)


def refused(name: str, value: object, allowed: str) -> ConfigError:
    """The error for a `value` of the option `name`, with what is allowed."""
    return ConfigError(f"{name} {_shown(value)} was given; it must be {allowed}")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = " ".join(f"{each:g}" if isinstance(each, float) else _shown(each) for each in value)
    else:
        text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
