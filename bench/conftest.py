"""Fixtures of the micro-benchmarks: device, sizes, and a clock that waits for the device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench import run_record
from bench.micro.sizes import CPU, GPU, TINY, Sizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_sizes(config: pytest.Config) -> Sizes:
    """Tiny if nothing is timed: the benchmarks then only check that they run and compute the right values."""
    if config.getoption("benchmark_disable"):
        return TINY
    return GPU if DEVICE.type == "cuda" else CPU


def seconds_on_device() -> float:
    """The time when the device is idle; steps between two readings overlap as in training."""
    torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def sizes(pytestconfig: pytest.Config) -> Sizes:
    return chosen_sizes(pytestconfig)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = chosen_sizes(metafunc.config)
    for name, values in (("shape", sizes.losses), ("view_size", sizes.views)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=["x".join(map(str, value)) for value in values])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=seconds_on_device))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    facts = run_record.environment([], DEVICE)
    machine_info |= {name: facts[name] for name in ("device", "versions", "float32_matmul_precision")}
    # The clock rate varies between calls, and every comparison would warn of another machine
    machine_info["cpu"] = {name: value for name, value in machine_info["cpu"].items() if not name.startswith("hz_")}
