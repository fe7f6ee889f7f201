"""Generated photographs: JPEG files with ImageNet's sizes and statistics, to benchmark and test the input path."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.synthetic.shapes import CLASSES, Array, Field

# Probability of each (width, height). ImageNet's files come from Flickr, whose medium size has a long side of 500.
_SIZES = {
    (500, 375): 0.55,
    (375, 500): 0.18,
    (500, 333): 0.11,
    (333, 500): 0.05,
    (500, 400): 0.04,
    (400, 300): 0.03,
    (640, 480): 0.03,
    (320, 240): 0.01,
}
_QUALITIES = (90, 97)  # Of the JPEG encoder, [low, high)
_LEAVES = (8, 16)  # Objects in a picture, [low, high)
_RADII = (0.1, 0.7)  # Of an object, in units of the short side
_RED_BLUE = np.array([0.5, 0, -0.5], np.float32).reshape(3, 1, 1)
_GREEN_MAGENTA = np.array([-0.25, 0.5, -0.25], np.float32).reshape(3, 1, 1)


def write_photographs(folder: str | os.PathLike[str], count: int, *, seed: int, workers: int = 1) -> None:
    """Write `count` JPEG files, about 110 KB each, to `folder`/CLASS/INDEX.jpg, cycling through the classes.

    The classes are those of the embedded pictures; `workers` threads draw. File `i` is a function of (seed, i) only,
    for fixed versions of NumPy and Pillow. DataError if a file cannot be written.
    """
    names = [name.replace(" ", "_") for name in CLASSES]

    def write(index: int) -> None:
        path = Path(folder, names[index % len(names)], f"{index:06d}.jpg")
        path.write_bytes(photograph(index, seed=seed))

    try:
        for name in names[:count]:
            Path(folder, name).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(write, range(count)))
    except OSError as error:
        raise DataError(f"photographs cannot be written to {folder} ({error.strerror}); take another folder") from error


def photograph(index: int, *, seed: int) -> bytes:
    """Draw photograph `index` as a JPEG file (4:2:0); its class is `index` modulo the number of classes."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 1, index]))
    width, height = list(_SIZES)[rng.choice(len(_SIZES), p=list(_SIZES.values()))]
    shape, texture = list(CLASSES.values())[index % len(CLASSES)]
    scene = _surface(rng, height, width)
    for _ in range(rng.integers(*_LEAVES)):
        _add_leaf(rng, scene, shape, texture)
    grain = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0.5, 5))
    pixels = (scene * 45 + 118 + grain).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(*_QUALITIES)), subsampling="4:2:0")
    return file.getvalue()


def _surface(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw [3, height, width] float32 of unit contrast: amplitudes fall about as 1/f, and brightness varies most.

    Natural images: Field, "Relations between the statistics of natural images and the response properties of
    cortical cells" (1987) for the spectrum; Ruderman, Cronin, Chiao (1998) for the order of the three axes.
    """
    brightness = _field(rng, height, width, rng.uniform(0.85, 1.22))
    # 4:2:0 keeps color at half the resolution only
    small = [_field(rng, -(-height // 2), -(-width // 2), 1.3) for _ in range(2)]
    first, second = (color.repeat(2, 0).repeat(2, 1)[:height, :width] for color in small)
    return brightness + 0.5 * first * _RED_BLUE + 0.25 * second * _GREEN_MAGENTA


def _field(rng: np.random.Generator, height: int, width: int, exponent: float) -> Array:
    """Draw [height, width] float32 Gaussian noise of unit variance, amplitudes proportional to 1 / f ** exponent."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).astype(np.float32)
    frequency[0, 0] = np.inf  # The mean is zero
    phases = rng.standard_normal((*frequency.shape, 2), np.float32).view(np.complex64)[..., 0]
    field = np.fft.irfft2(phases * frequency**-exponent, (height, width))
    return field / field.std()


def _add_leaf(rng: np.random.Generator, scene: Array, shape: Field, texture: Field) -> None:
    """Cover a part of the scene with one object of the class, in random colors.

    Objects that occlude each other, many small and few large, are the dead leaves model of images (Lee, Mumford,
    Huang, "Occlusion models for natural images", 2001).
    """
    _, height, width = scene.shape
    low, high = (radius * min(height, width) for radius in _RADII)
    radius = 1 / np.sqrt(rng.uniform(high**-2, low**-2))  # Density 1 / radius ** 3
    angle, row, column = rng.uniform(0, 2 * np.pi), rng.uniform(0, height), rng.uniform(0, width)
    rows = slice(max(0, int(row - 1.4 * radius)), min(height, int(row + 1.4 * radius) + 1))
    columns = slice(max(0, int(column - 1.4 * radius)), min(width, int(column + 1.4 * radius) + 1))
    y = ((np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(row)) / np.float32(radius))[:, None]
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(column)) / np.float32(radius)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    u, v = x * cosine + y * sine, y * cosine - x * sine
    r, a = np.hypot(u, v), np.arctan2(v, u)
    # An edge one pixel wide, as in the embedded pictures
    inside = np.clip(0.5 + shape(u, v, r, a) * np.float32(radius), 0, 1)
    weave = texture(u, v, r, a)
    first, second = (rng.normal(0, 1) + rng.normal(0, 0.4, (3, 1, 1)) for _ in range(2))
    color = second.astype(np.float32) + (first - second).astype(np.float32) * weave
    # Its surface texture is taken from the opposite place in the scene
    surface = np.float32(0.4) * scene[:, ::-1, ::-1][:, rows, columns]
    part = scene[:, rows, columns]
    part += inside * (color + surface - part)
