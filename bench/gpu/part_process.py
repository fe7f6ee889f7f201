"""`python -m bench.gpu.part_process MODULE.FUNCTION`: one part in its own process, started by `python -m bench gpu`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from fastssl.arguments import Positional, parse

from .part_context import NUMBERS, PartContext, Skipped

EXIT_FAILED, EXIT_SKIPPED = 1, 77


@dataclass(frozen=True)
class Options:
    """Run one part; each result is saved to numbers.json in the folder at once."""

    function: Annotated[str, Positional]
    folder: Path
    device: Literal["cpu", "cuda"]
    data: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Run the part; EXIT_FAILED if any measurement failed."""
    options = parse(Options, arguments, prog="python -m bench.gpu.part_process")
    module, _, name = options.function.partition(".")
    context = PartContext(torch.device(options.device), options.folder, options.data)
    earlier = options.folder / NUMBERS
    if earlier.exists():
        context.numbers |= json.loads(earlier.read_text())["numbers"]
    try:
        getattr(importlib.import_module(f"bench.gpu.{module}"), name)(context)
    except Skipped as reason:
        print(f"skipped: {reason}")
        context.write(skipped=str(reason))
        return EXIT_SKIPPED
    for name, error in context.errors.items():
        print(f"{name}: {error}")
    return EXIT_FAILED if context.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
