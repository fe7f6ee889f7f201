"""`fastssl slurm`: print a job script that requeues itself, as a template."""

from __future__ import annotations

import sys
from importlib import resources

from fastssl.errors import no_arguments


def main(arguments: list[str]) -> int:
    """`fastssl slurm`."""
    no_arguments(arguments)
    sys.stdout.write(resources.files("fastssl.commands").joinpath("pretrain.sbatch").read_text())
    return 0
