"""Input sizes of the micro-benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """Sizes that replace those of a preset that is too large for the device."""

    batch_size: int
    width: float
    """Of the ResNet-18."""
    rows: int
    """Of queues, banks and groups."""


class Sizes(NamedTuple):
    """Sizes for one kind of device, or tiny ones to check that everything runs."""

    losses: tuple[tuple[int, int, int], ...]
    """N, K, C: rows, queue entries, features."""
    views: tuple[tuple[int, int], ...]
    """Images per batch, and pixels per side."""
    images: int
    """In the planned data set."""
    batch_size: int
    """Of the plan, and keys per enqueue."""
    encoder: str
    """Encoder that the moving average follows."""
    width: float
    queue: tuple[int, int]
    """Keys and features."""
    step: Cut | None
    """None: training steps have the sizes of their presets."""


TINY = Sizes(((8, 64, 16),), ((4, 16),), 256, 16, "resnet18", 1 / 16, (64, 16), Cut(8, 1 / 16, 64))
CPU = Sizes(
    losses=((64, 4096, 128), (256, 8192, 128)),
    views=((64, 32), (4, 224)),
    images=50_000,
    batch_size=256,
    encoder="resnet18",
    width=1.0,
    queue=(65536, 128),
    step=Cut(batch_size=32, width=0.25, rows=4096),
)
GPU = Sizes(
    losses=((256, 65536, 128), (1024, 65536, 128), (256, 65536, 256)),
    views=((512, 32), (256, 224)),
    images=1_281_167,
    batch_size=256,
    encoder="resnet50",
    width=1.0,
    queue=(65536, 128),
    step=None,
)
