"""`fastssl report`: write a run's report as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastssl.arguments import Positional, parse
from fastssl.errors import ConfigError
from fastssl.observe.html_report import write_report
from fastssl.validation import Checked
from fastssl_pipelines.names import printable


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Writes the results, charts, notes and configuration of a run to RUN/report.html, a self-contained page."""

    run: Annotated[Path, Positional]
    """run folder; the run may still be going"""


def run(options: Options) -> int:
    """Write the report, print its path and return 0."""
    try:
        path = write_report(options.run)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {options.run} ({error.strerror}); make that folder writable"
        ) from None
    print(printable(f"wrote {path}"))
    return 0


def main(arguments: list[str]) -> int:
    """Run `fastssl report RUN`."""
    return run(parse(Options, arguments, prog="fastssl report"))
