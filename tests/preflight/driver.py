"""A Triton driver for absent GPUs: compiles and checks kernels for them, and launches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastssl_kernels.aot import SHARED_BYTES


class Driver:
    """The parts of a driver that a launch uses; device indices are compute capabilities, 90 for sm_90."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.launched: list[tuple[str, int]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES[self.target], "warpSize": 32},
            load_binary=lambda *_: (None, None, 0, 0, 1024),
            unload_module=lambda _: None,
        )

    def get_current_device(self) -> int:
        return int(self.target.removeprefix("sm_"))

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The launcher of a kernel; here it records the kernel."""
        return lambda *_: self.launched.append((source.name, metadata.shared))


@contextmanager
def installed(target: str) -> Iterator[Driver]:
    """Inside the `with` block, Triton compiles for `target` ("sm_90") and launches on nothing.

    A launch that asks for more shared or tensor memory than the target has raises Triton's OutOfResources.
    """
    mine = Driver(target)
    before, driver._active = driver._active, mine
    try:
        yield mine
    finally:
        driver._active = before
