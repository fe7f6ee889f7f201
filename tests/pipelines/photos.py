"""Image files for the tests of executors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastssl_pipelines import SamplePlan, Source, ViewSpec

NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ENLARGED = ViewSpec(size=64, scale=(0.02, 0.1))
REDUCED = ViewSpec(size=16, scale=(0.5, 1.0), blur=0.5)


def photo(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    wave = [np.sin(x / rng.uniform(4, 30) + c) * np.cos(y / rng.uniform(4, 30)) for c in range(3)]
    return (128 + 100 * np.stack(wave, -1) + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)


def save_photos(root: Path, count: int, *, height: int = 40, width: int = 50, seed: int = 0) -> list[Path]:
    paths = [root / f"{number:03}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(photo(height, width, 1000 * seed + number)).save(path)
    return paths


def plan_of(source: Source, *views: ViewSpec, shuffle: bool = True) -> SamplePlan:
    return SamplePlan(
        widths=source.widths,
        heights=source.heights,
        labels=source.labels,
        views=views or (ENLARGED, REDUCED),
        seed=0,
        shuffle=shuffle,
    )
