"""Options of a command as the fields of a dataclass: read by tyro or, where it is not installed, by argparse."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from fastssl.errors import ConfigError
from fastssl.plain_arguments import Positional, Suppress, parse_plainly

__all__ = ["Positional", "Suppress", "parse", "parse_known"]

_Options = TypeVar("_Options")


def parse(cls: type[_Options], arguments: Sequence[str], *, prog: str, default: _Options | None = None) -> _Options:
    """The dataclass that the arguments ask for: an option a field, `--section.field` for one of a section.

    A field marked `Annotated[..., Positional]` has no name on the command line, one marked `Suppress` is no option.
    `default` has the values of what is not given. Raises ConfigError for what cannot be read, SystemExit after --help.
    """
    return _parsed(cls, arguments, prog=prog, default=default, all_known=True)[0]


def parse_known(cls: type[_Options], arguments: Sequence[str], *, prog: str) -> tuple[_Options, list[str]]:
    """As `parse`, and the arguments that are none of the dataclass's, in their order."""
    return _parsed(cls, arguments, prog=prog, default=None, all_known=False)


def _parsed(
    cls: type[_Options], arguments: Sequence[str], *, prog: str, default: _Options | None, all_known: bool
) -> tuple[_Options, list[str]]:
    if importlib.util.find_spec("tyro") is None:
        return parse_plainly(cls, arguments, prog=prog, default=default, all_known=all_known)
    import tyro

    known: dict[str, Any] = {"args": list(arguments), "prog": prog}
    if default is not None:
        known["default"] = default
    with _as_config_error():
        if all_known:
            return tyro.cli(cls, **known), []
        return tyro.cli(cls, **known, return_unknown_args=True)


@contextlib.contextmanager
def _as_config_error() -> Iterator[None]:
    """Turns what tyro says before it exits into a ConfigError, or back into ours that it caught."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except (AssertionError, OSError) as error:
        # tyro's own options, which write the completions of a shell
        raise ConfigError(f"{error}; see --help") from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _cause(stop) or ConfigError(_sentence(errors.getvalue())) from None


def _cause(stop: BaseException) -> ConfigError | None:
    error = stop.__context__
    while error is not None and not isinstance(error, ConfigError):
        error = error.__context__
    return error


def _sentence(message: str) -> str:
    """tyro's message, framed or in plain ASCII, as one sentence: the error and the first suggestion, if any."""
    paragraphs: list[list[str]] = [[]]
    for line in message.splitlines():
        text = line.strip("│╭╮╰╯─- ") if line.startswith("╭") else line.strip("│╭╮╰╯ ")
        if text and not set(text) <= {"─", "-"}:
            paragraphs[-1].append(text)
        if line.startswith("╭") or (text and set(text) <= {"─", "-"}):
            paragraphs.append([])
    _title, error, *rest = paragraphs
    hint = next((p[1].split()[0] for p in rest if p and p[0].startswith("Perhaps you meant")), None)
    # the kinds that tyro tried for an optional value say no more than their list does
    text, *_kinds = " ".join(error).split(" Got errors:")
    return textwrap.shorten(text, 300, placeholder=" ...") + (f"; did you mean {hint}?" if hint else "")
