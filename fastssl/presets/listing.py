"""The presets as text to read."""

from __future__ import annotations

import textwrap

from fastssl.presets.registry import PRESETS, Preset

WIDTH = 110


def listing() -> str:
    """All presets by data set: method, epochs, the published result, whose recipe it is and what differs from it."""
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
