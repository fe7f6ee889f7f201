"""Procedural pictures: the embedded data set, drawn from a seed without a download.

A class is a shape with a texture; a picture shows four objects of one class. Colors, position, size, rotation and
background are nuisance variables: they are drawn independently and carry no information about the class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastssl_pipelines.sources.base import ArraySource

Array = np.ndarray
# A shape is positive inside and about 1 at its center; a texture lies in [0, 1]. Both are functions of the object's
# coordinates u, v (the shape extends to about 1), and of the same point as radius r and angle a.
Field = Callable[[Array, Array, Array, Array], Array]


def _polygon(corners: int) -> Field:
    """Regular polygon with its corners on the unit circle."""
    sector = 2 * np.pi / corners
    inner = np.cos(sector / 2)
    return lambda u, v, r, a: inner - r * np.cos((a + np.pi) % sector - sector / 2)


def _cross(u: Array, v: Array, r: Array, a: Array) -> Array:
    bar = 0.3
    return np.maximum(np.minimum(0.95 - np.abs(u), bar - np.abs(v)), np.minimum(bar - np.abs(u), 0.95 - np.abs(v)))


def _crescent(u: Array, v: Array, r: Array, a: Array) -> Array:
    return np.minimum(1 - r, np.hypot(u - 0.5, v) - 0.75)


def _dumbbell(u: Array, v: Array, r: Array, a: Array) -> Array:
    balls = 0.45 - np.hypot(np.abs(u) - 0.6, v)
    return np.maximum(balls, np.minimum(0.6 - np.abs(u), 0.14 - np.abs(v)))


def _corner(u: Array, v: Array, r: Array, a: Array) -> Array:
    square = 0.8 - np.maximum(np.abs(u), np.abs(v))
    return np.minimum(square, np.maximum(-u, -v) - 0.05)


def _waves(frequency: float, bend: float) -> Field:
    return lambda u, v, r, a: 0.5 + 0.5 * np.sin(frequency * u + bend * np.sin(frequency * 0.6 * v))


def _lattice(frequency: float, sharpness: float) -> Field:
    return lambda u, v, r, a: 0.5 + 0.5 * np.tanh(sharpness * (np.sin(frequency * u) * np.sin(frequency * v) - 0.1))


def _rings(frequency: float) -> Field:
    return lambda u, v, r, a: 0.5 + 0.5 * np.sin(frequency * r)


def _spokes(count: int) -> Field:
    return lambda u, v, r, a: 0.5 + 0.5 * np.sin(count * a)


def _plain(u: Array, v: Array, r: Array, a: Array) -> Array:
    return np.zeros_like(u)


def _shade(u: Array, v: Array, r: Array, a: Array) -> Array:
    return np.clip(0.5 + 0.5 * u, 0, 1)


PLACES = [(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)]  # Of the four objects, before they are shifted
SCALES = (0.36, 0.56)
SHIFT = 0.2

CLASSES: dict[str, tuple[Field, Field]] = {
    "striped disc": (lambda u, v, r, a: 0.95 - r, _waves(6.5, 0.0)),
    "ringed square": (_polygon(4), _rings(8.0)),
    "checked triangle": (_polygon(3), _lattice(6.0, 4.0)),
    "plain star": (lambda u, v, r, a: 0.62 + 0.38 * np.cos(5 * a) - r, _plain),
    "wavy cross": (_cross, _waves(7.0, 1.6)),
    "shaded ring": (lambda u, v, r, a: 0.3 - np.abs(r - 0.7), _shade),
    "plain crescent": (_crescent, _plain),
    "striped dumbbell": (_dumbbell, _waves(8.0, 0.0)),
    "spoked hexagon": (_polygon(6), _spokes(4)),
    "dotted flower": (lambda u, v, r, a: 0.7 + 0.28 * np.cos(4 * a) - r, _lattice(7.0, 2.0)),
    "shaded bar": (lambda u, v, r, a: np.minimum(1 - np.abs(u), 0.35 - np.abs(v)), _shade),
    "checked corner": (_corner, _lattice(6.0, 4.0)),
}


def _uniform(rng: np.random.Generator, low: float, high: float, count: int) -> Array:
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _colors(rng: np.random.Generator, brightness: Array) -> Array:
    """Random tints [count, 1, 1, 3] of the given brightness [count], which differ in grayscale as well."""
    tint = rng.uniform(-0.3, 0.3, (len(brightness), 1, 1, 3)).astype(np.float32)
    return brightness[:, None, None, None] + tint - tint.mean(-1, keepdims=True)


def _draw(rng: np.random.Generator, shape: Field, texture: Field, count: int, size: int) -> Array:
    """Draw float pictures of one class, [count, size, size, 3], approximately in [0, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = axis[None, None, :], axis[None, :, None]
    slope = _uniform(rng, 0, 2 * np.pi, count)
    light = 0.15 * (x * np.cos(slope) + y * np.sin(slope))[..., None]
    picture = _colors(rng, np.full(count, 0.5, np.float32)) + light
    for cell_x, cell_y in PLACES:
        angle, scale = _uniform(rng, 0, 2 * np.pi, count), _uniform(rng, *SCALES, count)
        dx = x - cell_x - _uniform(rng, -SHIFT, SHIFT, count)
        dy = y - cell_y - _uniform(rng, -SHIFT, SHIFT, count)
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / scale
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / scale
        r, a = np.hypot(u, v), np.arctan2(v, u)
        # Antialias over one pixel: a shape is about the distance from its edge, in units of `scale`
        inside = np.clip(0.5 + shape(u, v, r, a) * scale * (size / 2), 0, 1)[..., None]
        weave = texture(u, v, r, a)[..., None]
        bright = rng.random(count) < 0.5
        first = _colors(rng, np.where(bright, 0.9, 0.1).astype(np.float32))
        second = _colors(rng, np.where(bright, 0.1, 0.9).astype(np.float32))
        picture += inside * (first * weave + second * (1 - weave) - picture)
    return picture + rng.normal(0, 0.02, picture.shape).astype(np.float32)


def draw_pictures(count: int, *, seed: int, stream: int = 0, size: int = 32) -> tuple[Array, Array]:
    """Draw `count` pictures, cycling through the classes: uint8 [count, size, size, 3] and int64 labels [count].

    A pure function of its arguments; different streams of one seed are independent.
    """
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    for label, (shape, texture) in enumerate(CLASSES.values()):
        rng = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, label]))
        rows = np.flatnonzero(labels == label)
        for chunk in np.array_split(rows, max(1, len(rows) // 128)):
            picture = _draw(rng, shape, texture, len(chunk), size)
            images[chunk] = (picture * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return images, labels


def picture_source(count: int, *, seed: int, stream: int = 0, size: int = 32) -> ArraySource:
    """Embedded data set as a source; see `draw_pictures`."""
    images, labels = draw_pictures(count, seed=seed, stream=stream, size=size)
    return ArraySource(name=f"pictures-{count}-{seed}-{stream}", images=images, labels=labels, classes=tuple(CLASSES))
