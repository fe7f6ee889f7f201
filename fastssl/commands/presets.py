"""`fastssl presets`: the recipes, their published results and the differences from them."""

from __future__ import annotations

import sys
import textwrap

from fastssl.errors import no_arguments
from fastssl.presets.registry import PRESETS, Preset

WIDTH = 110


def main(arguments: list[str]) -> int:
    """`fastssl presets`."""
    no_arguments(arguments)
    sys.stdout.write(listing())  # In one write, which `| head` does not interrupt
    return 0


def listing() -> str:
    """All presets by data set: method, epochs, published result, source and differences from it."""
    lines = []
    for data in dict.fromkeys(preset.data for preset in PRESETS.values()):
        lines += [f"=== {data} ===", ""]
        for name, preset in PRESETS.items():
            if preset.data == data:
                lines += [*_block(name, preset), ""]
    return "\n".join(lines)


def _block(name: str, preset: Preset) -> list[str]:
    config = preset.build()
    lines = [f"{name:<26} {config.method.name}, {config.train.epochs} epochs"]
    for label in ("published", "source", "differs"):
        text = getattr(preset, label)
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"    {label:<10} ", subsequent_indent=" " * 15, break_on_hyphens=False
        )
    return lines
