"""A pytest plugin that prints each failure at once, as a time-out may end the tests before their summary."""

from __future__ import annotations

from typing import Any

import pytest

LONGEST = 160  # Characters of a reason


def pytest_configure(config: pytest.Config) -> None:
    """Register only in the process that prints results, which is pytest-xdist's controller."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(config))


class _Failures:
    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = " ".join((crash.message if crash else str(report.longrepr)).split())
            name = report.nodeid.rpartition("::")[2]
            screen: Any = self._plugins.get_plugin("terminalreporter")
            screen.write_line(f"\nFAILED {name}: {reason[:LONGEST]}")
