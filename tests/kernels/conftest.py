"""Fixtures of the loss tests: the device of a backend, and named arguments for every loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl_kernels import parity
from fastssl_kernels.loss_registry import BACKENDS
from fastssl_kernels.parity import make_inputs

# While working these stand for the others: every loss once, in float32 and with the dtypes of training
INTERPRETED = ("test_loss_contract.py", "test_backends.py", "test_triton_launch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the other interpreted cases slow: each takes up to a second. Skip what a plug-in's loss does not have."""
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        loss, backend = given.get("loss"), given.get("backend")
        if loss in parity.LOSSES and backend in BACKENDS and (reason := parity.why_not(loss, backend)):
            item.add_marker(pytest.mark.skip(reason=f"{loss} on {backend}: {reason}"))
        if item.path.parent == Path(__file__).parent and "triton" in item.name and item.path.name not in INTERPRETED:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def device(backend: str) -> str:
    """The GPU for Triton kernels if there is one, else the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def arguments() -> Callable[..., dict[str, Any]]:
    """Named float32 arguments for a public function: (name, device) -> keywords."""
    return _arguments


def _arguments(loss: str, device: str = "cpu") -> dict[str, Any]:
    given = make_inputs(9, 70, 32).to(torch.float32, torch.float32, device)
    pair = {"query": given.query, "key": given.key, "queue": given.queue}
    labels = {"query_labels": given.query_labels, "queue_labels": given.queue_labels}
    temperature = {"temperature": 0.1}
    own = torch.arange(9, device=device)
    arguments: dict[str, dict[str, Any]] = {
        "queue_read": {"query": given.query, "bank": given.queue, **temperature},
        "info_nce": {**pair, **temperature},
        "unicon": {**pair, **labels, **temperature},
        "sup_con": {**pair, **labels, **temperature},
        "soft_cross_entropy": {
            "query": given.query,
            "teacher": given.key,
            "queue": given.queue,
            "teacher_temperature": 0.05,
            **temperature,
        },
        "consistency": {**pair, **temperature},
        "mixco": {
            "query": given.query,
            "keys": given.key,
            "queue": given.queue,
            "first": own,
            "second": given.partner,
            "weight": 0.3,
            **temperature,
        },
        "unmix": {
            "query": given.query,
            "first_key": given.key,
            "second_key": given.second_key,
            "queue": given.queue,
            "weight": 0.3,
            **temperature,
        },
        "bank_cross_entropy": {
            "prediction": given.query,
            "bank": given.queue,
            "target": given.target,
            **temperature,
        },
        "nearest_entry": {"query": given.query, "bank": given.queue},
        "update_groups": {"features": given.query, "groups": given.queue, "momentum": 0.9},
        "mean_shift": {**pair, "k": 5},
        "nt_xent": {"first": given.query, "second": given.key, "labels": given.query_labels, **temperature},
    }
    return arguments[loss]
