"""Options of a command as the fields of a dataclass: read by tyro or, where it is not installed, by argparse."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shlex
from collections.abc import Sequence
from typing import Any, TypeVar

from fastssl.errors import ConfigError
from fastssl.plain_arguments import Positional, Suppress, parse_plainly

__all__ = ["Positional", "Suppress", "parse", "parse_known"]

_Options = TypeVar("_Options")


def parse(cls: type[_Options], arguments: Sequence[str], *, prog: str, default: _Options | None = None) -> _Options:
    """Build the dataclass from arguments: one option per field, `--section.field` for a field of a section.

    A field marked `Annotated[..., Positional]` has no name on the command line, one marked `Suppress` is no option.
    `default` has the values of options that are not given. ConfigError for unreadable arguments, SystemExit after
    --help.
    """
    return _parsed(cls, arguments, prog=prog, default=default, all_known=True)[0]


def parse_known(cls: type[_Options], arguments: Sequence[str], *, prog: str) -> tuple[_Options, list[str]]:
    """As `parse`, and also return, in order, the arguments that are no options of the dataclass."""
    return _parsed(cls, arguments, prog=prog, default=None, all_known=False)


def _parsed(
    cls: type[_Options], arguments: Sequence[str], *, prog: str, default: _Options | None, all_known: bool
) -> tuple[_Options, list[str]]:
    def plainly() -> tuple[_Options, list[str]]:
        return parse_plainly(cls, arguments, prog=prog, default=default, all_known=all_known)

    if importlib.util.find_spec("tyro") is None:
        return plainly()
    import tyro

    known: dict[str, Any] = {"args": list(arguments), "prog": prog}
    if default is not None:
        known["default"] = default
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            if all_known:
                return tyro.cli(cls, **known), []
            return tyro.cli(cls, **known, return_unknown_args=True)
    except (AssertionError, OSError) as error:
        # tyro's own options, which write shell completions
        raise ConfigError(f"{error}; see --help") from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    # tyro 1.x reports errors only as a drawn box and its hook is private, so argparse says in a sentence what is wrong
    plainly()
    raise ConfigError(f"{shlex.join(arguments)[:300]} cannot be read as options; see --help")
