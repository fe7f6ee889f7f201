"""`fastssl doctor`: show versions and devices, and which parts of fastssl work on this machine."""

from __future__ import annotations

import torch

from fastssl.apex import why_not_apex
from fastssl.environment import devices, environment
from fastssl.errors import no_arguments
from fastssl_kernels import available_backends
from fastssl_pipelines.executors.base import available_executors


def main(arguments: list[str]) -> int:
    """Run `fastssl doctor`."""
    no_arguments(arguments)
    for title, rows in report():
        print(title)
        for name, value in rows:
            print(f"  {name:<22} {value}")
    return 0


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of names and values: environment, loss backends by device, input pipelines, optional packages."""
    sections = [("environment", list(environment().items()))]
    for device in dict.fromkeys(device.type for device in devices()):
        rows = [(name, reason or "works") for name, reason in available_backends(torch.device(device)).items()]
        sections.append((f"loss backends on {device}", rows))
    rows = [(name, reason or "works") for name, reason in available_executors().items()]
    sections.append(("input pipelines", rows))
    sections.append(("optional", [("NVIDIA apex", why_not_apex() or "works")]))
    return sections
