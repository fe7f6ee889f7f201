"""What the numbers of a benchmark depend on besides its options."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastssl.doctor import environment


def facts(device: torch.device) -> dict[str, Any]:
    """Device, processor, cores, how busy they are, versions, commit and date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
        "commit": _commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The model of the CPU."""
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else []
    return models[0] if models else platform.machine()


def _commit() -> str:
    """With "-dirty" where files differ from it; "unknown" for an installed package."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
