"""Options of a dataclass by argparse, named and typed as by tyro: for machines without tyro, and for error messages."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, cast

from fastssl.errors import ConfigError, unknown_name
from fastssl.validation import conform

try:
    from tyro.conf import Positional, Suppress
except ImportError:  # Then any two distinct marks will do
    Positional, Suppress = "positional", "suppress"  # type: ignore[assignment]

_Options = TypeVar("_Options")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        required = "the following arguments are required: "
        if message.startswith(required):
            message = f"no {message.removeprefix(required)} was given"
        raise ConfigError(f"{message}; see --help")


class _Option(NamedTuple):
    """A field that can be set on the command line."""

    path: str
    """Name with sections, as in train.batch_size."""
    hint: Any
    default: Any

    @property
    def positional(self) -> bool:
        return Positional in _marks(self.hint)

    @property
    def name(self) -> str:
        """Name as typed on the command line."""
        return self.path if self.positional else f"--{self.path.replace('_', '-')}"


def parse_plainly(
    cls: type[_Options], arguments: Sequence[str], *, prog: str, default: _Options | None, all_known: bool
) -> tuple[_Options, list[str]]:
    """Build the dataclass and return it with unknown arguments, which are a ConfigError if `all_known`."""
    parser = _Parser(prog, description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    options = list(_options(cls, default))
    for option in options:
        _add(parser, option)
    given, rest = parser.parse_known_args([_with_dashes(argument) for argument in arguments])
    if rest and all_known:
        raise unknown_name("option", rest[0], [option.name for option in options])
    texts = vars(given)
    values = {o.path: conform(o.hint, _read(o.hint, texts[o.path]), o.name) for o in options if o.path in texts}
    return _built(cls, default, values), rest


def _options(cls: type, default: Any, section: str = "") -> Iterator[_Option]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name, field.default)
        if Suppress in _marks(hints[field.name]):
            continue
        if dataclasses.is_dataclass(value):
            yield from _options(cast(type, type(value)), value, f"{section}{field.name}.")
        else:
            yield _Option(section + field.name, hints[field.name], value)


def _marks(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _plain(hint: Any) -> Any:
    """The hint without its marks and without None."""
    if typing.get_origin(hint) in (Annotated, typing.Union, types.UnionType):
        return _plain(typing.get_args(hint)[0])
    return hint


def _add(parser: argparse.ArgumentParser, option: _Option) -> None:
    hint, required = _plain(option.hint), option.default is dataclasses.MISSING
    shown = "required" if required else f"default: {option.default}".replace("%", "%%")
    if hint is bool:
        section, dot, field = option.name.rpartition(".")
        negated = f"{section}.no-{field}" if dot else f"--no-{field.removeprefix('--')}"
        parser.add_argument(option.name, action="store_true", dest=option.path, help=f"({shown})")
        parser.add_argument(negated, action="store_false", dest=option.path)
        return
    count = _count(hint)
    if option.positional:
        keywords: dict[str, Any] = {"nargs": "?"} if count is None and not required else {"nargs": count}
        # No value at all is a value, too
        keywords |= {"default": []} if count == "*" else {}
    else:
        keywords = {"nargs": count, "metavar": _metavar(hint), "dest": option.path, "required": required}
    parser.add_argument(option.name, help=f"({shown})", **keywords)


def _count(hint: Any) -> str | int | None:
    """Number of values of a tuple, "*" for any; None for other types."""
    if typing.get_origin(hint) is not tuple:
        return None
    items = typing.get_args(hint)
    return "*" if items[-1] is Ellipsis else len(items)


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        hint = _plain(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    return hint.__name__.upper()


def _with_dashes(argument: str) -> str:
    """Accept --train.batch_size for --train.batch-size, as tyro does."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _read(hint: Any, text: Any) -> Any:
    """Convert the text to the hint's type, or return it unchanged for the check to refuse."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _read(arguments[0], text)
    if origin in (typing.Union, types.UnionType):
        return None if text == "None" else _read(arguments[0], text)
    if origin is tuple:
        items = arguments[:1] * len(text) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(*each) for each in zip(items, text, strict=True))
    if origin is Literal:
        return next((choice for choice in arguments if str(choice) == text), text)
    try:
        return hint(text) if hint in (int, float) else text
    except ValueError:
        return text


def _built(cls: type[_Options], default: _Options | None, values: dict[str, Any], section: str = "") -> _Options:
    """Build the dataclass with `values`, by path, over the defaults; its own checks then run on the result."""
    changes = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path, part = section + field.name, getattr(default, field.name, None)
        if dataclasses.is_dataclass(part):
            changes[field.name] = _built(cast(type, type(part)), part, values, f"{path}.")
        elif path in values:
            changes[field.name] = values[path]
    return cls(**changes) if default is None else dataclasses.replace(default, **changes)  # type: ignore[type-var]
