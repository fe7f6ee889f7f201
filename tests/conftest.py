"""Where there is no GPU the Triton kernels are interpreted and tests marked `gpu` are skipped."""

import os

import pytest
import torch

from fastssl_kernels import available_backends

if not torch.cuda.is_available():
    # Read when the kernels are decorated, so it has to be set before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    interpreter = available_backends("cpu")["triton"]
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
        elif interpreter and "triton" in item.name:
            item.add_marker(pytest.mark.skip(reason=interpreter))
