"""What this machine has, and what of fastssl works on it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from fastssl.apex import why_not_apex
from fastssl.train.device import has_fast_bf16
from fastssl_kernels import available_backends
from fastssl_pipelines.errors import DISTRIBUTION
from fastssl_pipelines.executor import available_executors

PACKAGES = (
    DISTRIBUTION,
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "pillow",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "timm",
)


def devices() -> list[torch.device]:
    """The devices that can train here, the fastest kind first."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*gpus, torch.device("cpu")]


def environment() -> dict[str, str]:
    """Versions and hardware as name and value, written into every run folder."""
    facts = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["cuda of torch"] = torch.version.cuda or "none"
    facts["cpu threads"] = str(torch.get_num_threads())
    for device in devices():
        facts[str(device)] = describe(device)
    return facts


def describe(device: torch.device) -> str:
    """Name, memory and precision of a device."""
    precision = "bf16 autocast" if has_fast_bf16(device) else "fp32 (no fast bf16)"
    if device.type == "cpu":
        return f"{torch.backends.cpu.get_cpu_capability()}, {precision}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {precision}"


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of name and value: environment, loss backends by device, input pipelines."""
    sections = [("environment", list(environment().items()))]
    for device in dict.fromkeys(device.type for device in devices()):
        rows = [(name, reason or "works") for name, reason in available_backends(torch.device(device)).items()]
        sections.append((f"loss backends on {device}", rows))
    rows = [(name, reason or "works") for name, reason in available_executors().items()]
    sections.append(("input pipelines", rows))
    sections.append(("not needed", [("NVIDIA apex", why_not_apex() or "works")]))
    return sections
