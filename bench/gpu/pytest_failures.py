"""A plugin of pytest that tells of a failure when it occurs, as the tests may be ended before their summary."""

from __future__ import annotations

from typing import Any

import pytest

LONGEST = 160  # characters of a reason


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that shows results is told of them; of pytest-xdist it is the first."""
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
