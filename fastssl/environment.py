"""The environment of a run or measurement: versions, devices, load and commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastssl.device import has_fast_bf16
from fastssl_pipelines.errors import DISTRIBUTION

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
    """The devices available for training, GPUs first."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*gpus, torch.device("cpu")]


def environment() -> dict[str, str]:
    """Versions and hardware by name, as written to every run folder."""
    facts = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        facts[package] = installed_version(package)
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


def installed_version(package: str) -> str:
    """The version of a distribution, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def measured_on(device: torch.device) -> dict[str, Any]:
    """Device, processor, cores, load, versions, commit and date of a measurement."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
        "commit": commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The CPU model."""
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else []
    return models[0] if models else platform.machine()


def commit() -> str:
    """The git commit, with "-dirty" if files outside bench/results differ; "unknown" for an installed package."""
    found = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return f"{found}-dirty" if changed and found != "unknown" else found


def output(*command: str) -> str:
    """The output of a program; "unknown" if it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
