"""Fixtures of the fault tests."""

from __future__ import annotations

import resource

import pytest

GIB = 2**30


@pytest.fixture
def memory(monkeypatch):
    """The process may have 1.5 GiB more than it has; what takes more fails with MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * GIB // 2, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
