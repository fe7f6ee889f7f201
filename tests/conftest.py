"""Tests run in a process a core; without a GPU, Triton kernels are interpreted and tests marked `gpu` skipped.

No test writes into the home folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from fastssl import plugins
from fastssl_kernels import available_backends

if TYPE_CHECKING:
    from fastssl.observe.notes import NoteQueue

# Set for all that tests start, too: where it is not, runs choose it by measuring and repeat only nearly.
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores run tests; more threads would wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
if not torch.cuda.is_available():
    # Read when the kernels are decorated, so it has to be set before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

plugins.load()  # The contract tests run for methods and losses of plug-ins, too


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of images are cached in a temporary folder, not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def notes() -> Iterator[NoteQueue]:
    """What fastssl and its input log during the test; `notes.take()` returns it."""
    from fastssl.observe.notes import NoteQueue

    with NoteQueue() as queue:
        yield queue


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A process gets a file at a time: the long ones first, or the last of them would run alone.
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long_files)
    if torch.cuda.is_available():
        return
    interpreter = available_backends("cpu")["triton"]
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
        elif interpreter and "triton" in item.name:
            item.add_marker(pytest.mark.skip(reason=interpreter))
