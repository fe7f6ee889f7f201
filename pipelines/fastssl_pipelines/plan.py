"""Sample plan: all randomness of the input, as a pure function of (seed, epoch, position, view)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.views import ViewSpec

# The second word of the key separates the uses of a seed; changing a value changes every run.
_ORDER_STREAM, _VIEW_STREAM, _LABEL_STREAM = range(3)

_ATTEMPTS = 10


class _Column:
    """Meaning of the uniform draws of a position; a new augmentation takes spare columns."""

    AREA = slice(0, 10)
    LOG_RATIO = slice(10, 20)
    TOP = 20
    LEFT = 21
    FLIP = 22
    JITTER_APPLIED = 23
    JITTER_FACTORS = slice(24, 28)
    JITTER_ORDER = slice(28, 32)
    GRAYSCALE = 32
    BLUR_APPLIED = 33
    BLUR_SIGMA = 34
    SOLARIZE = 35
    COUNT = 48


_BLOCKS_PER_POSITION = _Column.COUNT // 4  # One step of the Philox counter yields four draws


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """Random values of one view for B images; the fields after `boxes` are those of AugmentParameters.

    `size`: side of the view in pixels. `boxes`: int32 [B, 4], (top, left, height, width) in source pixels.
    `flip`, `grayscale`, `solarize`: bool [B]. `order`: int64 [B, 4].
    `brightness`, `contrast`, `saturation`, `hue`, `blur_sigma`: float32 [B].
    """

    size: int
    boxes: NDArray[np.int32]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    order: NDArray[np.int64]
    grayscale: NDArray[np.bool_]
    blur_sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Images and views of one batch: `ids` and `labels` int64 [B] (-1 = unknown), and one ViewPlan per view.

    `replaced`: bool [B], True where the next readable image replaces one that cannot be read.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    replaced: NDArray[np.bool_]
    views: tuple[ViewPlan, ...]

    def rows(self, start: int, stop: int) -> BatchPlan:
        """Plan of rows start, ..., stop - 1."""
        part = slice(start, stop)
        views = tuple(
            replace(view, **{f.name: getattr(view, f.name)[part] for f in fields(view) if f.name != "size"})
            for view in self.views
        )
        return BatchPlan(ids=self.ids[part], labels=self.labels[part], replaced=self.replaced[part], views=views)


class SamplePlan:
    """Stateless plan of the samples in any range of any epoch, with all their random values.

    `widths`, `heights`: int [n], source pixels. `labels`: int [n], -1 = unknown, as the method may see them.
    `odd_views`: if not empty, TrainSampler uses them instead of `views` in odd steps.
    Equal arguments give equal plans on every machine and for any number of ranks.
    """

    def __init__(
        self,
        *,
        widths: ArrayLike,
        heights: ArrayLike,
        labels: ArrayLike,
        views: Sequence[ViewSpec],
        seed: int,
        shuffle: bool = True,
        odd_views: Sequence[ViewSpec] = (),
    ) -> None:
        self.widths = np.asarray(widths, dtype=np.int64)
        self.heights = np.asarray(heights, dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.views = tuple(views)
        self.odd_views = tuple(odd_views)
        self.seed = _checked_seed(seed)
        self.shuffle = shuffle
        if not self.widths.shape == self.heights.shape == self.labels.shape == (len(self.widths),):
            shapes = self.widths.shape, self.heights.shape, self.labels.shape
            raise ValueError(f"widths, heights and labels have shapes {shapes}; they must be [n], with one n")
        if (self.labels < -1).any():
            raise ValueError(f"label {self.labels.min()} was given; it must be -1 (unknown) or a class, from 0 on")
        self._latest_order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def batch(
        self, epoch: int, start: int, stop: int, *, odd: bool = False, unreadable: NDArray[np.bool_] | None = None
    ) -> BatchPlan:
        """Plan of positions [start, stop) of an epoch; every sub-range gives the same values.

        `unreadable`: bool [n], True for images that cannot be decoded. The next readable image in the epoch's order
        takes their place, so a plan depends on the files and not on when a bad one was found.
        """
        if not (epoch >= 0 and 0 <= start <= stop <= self.num_samples):
            raise ValueError(
                f"positions {start} to {stop} of epoch {epoch} were asked for;"
                f" epochs count from 0 and hold {self.num_samples} samples"
            )
        ids, replaced = self._ids(epoch, start, stop, unreadable)
        widths, heights = self.widths[ids], self.heights[ids]
        return BatchPlan(
            ids=ids,
            labels=self.labels[ids],
            replaced=replaced,
            views=tuple(
                _center_view(spec, widths, heights)
                if spec.center_crop is not None
                else _random_view(spec, widths, heights, self._draws(epoch, view, start, stop - start))
                for view, spec in enumerate((self.odd_views if odd else ()) or self.views)
            ),
        )

    def _ids(
        self, epoch: int, start: int, stop: int, unreadable: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        order = self._order(epoch)
        ids = order[start:stop].copy()
        if unreadable is None:
            return ids, np.zeros(len(ids), np.bool_)
        replaced = unreadable[ids]
        for row in np.flatnonzero(replaced):
            after = (order[(start + row + offset) % self.num_samples] for offset in range(1, self.num_samples))
            ids[row] = next((other for other in after if not unreadable[other]), ids[row])
        return ids, replaced

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            epoch = 0
        latest = self._latest_order
        if latest is None or latest[0] != epoch:
            order = np.arange(self.num_samples)
            if self.shuffle:
                # Generator.permutation may change between NumPy versions; the raw Philox stream may not.
                chance = _philox(self.seed, _ORDER_STREAM, [0, 0, 0, epoch]).random_raw(self.num_samples)
                order = np.argsort(chance, kind="stable")
            latest = self._latest_order = (epoch, order)
        return latest[1]

    def _draws(self, epoch: int, view: int, start: int, count: int) -> NDArray[np.float64]:
        """Uniforms in [0, 1), [count, _Column.COUNT]."""
        counter = [start * _BLOCKS_PER_POSITION, 0, view, epoch]
        raw = _philox(self.seed, _VIEW_STREAM, counter).random_raw(count * _Column.COUNT)
        return (raw >> np.uint64(11)).reshape(count, _Column.COUNT) * np.float64(2.0**-53)


def partial_labels(labels: ArrayLike, fraction: float, seed: int) -> NDArray[np.int64]:
    """Labels with all but round(fraction * n_c) labels of every class c set to -1 (unknown).

    For one seed, a higher fraction keeps all labels that a lower one keeps.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"a label fraction of {fraction} was given; --data.label-fraction must lie in [0, 1]")
    labels = np.asarray(labels, dtype=np.int64)
    chance = _philox(_checked_seed(seed), _LABEL_STREAM, [0, 0, 0, 0]).random_raw(len(labels))
    by_class = np.lexsort((chance, labels))
    _, first, group, count = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    rank_in_class = np.arange(len(labels)) - first[group]
    kept = by_class[rank_in_class < np.rint(fraction * count)[group]]
    result = np.full_like(labels, -1)
    result[kept] = labels[kept]
    return result


def _random_view(
    spec: ViewSpec, widths: NDArray[np.int64], heights: NDArray[np.int64], draws: NDArray[np.float64]
) -> ViewPlan:
    jittered = draws[:, _Column.JITTER_APPLIED] < spec.jitter_probability
    factors = draws[:, _Column.JITTER_FACTORS]

    def factor(index: int) -> NDArray[np.float32]:
        low, high = max(0.0, 1 - spec.jitter[index]), 1 + spec.jitter[index]
        return np.where(jittered, low + (high - low) * factors[:, index], 1).astype(np.float32)

    sigma_low, sigma_high = spec.blur_sigma
    sigma = sigma_low + (sigma_high - sigma_low) * draws[:, _Column.BLUR_SIGMA]
    blurred = draws[:, _Column.BLUR_APPLIED] < spec.blur
    return ViewPlan(
        size=spec.size,
        boxes=_random_resized_boxes(spec, widths, heights, draws),
        flip=draws[:, _Column.FLIP] < spec.flip,
        brightness=factor(0),
        contrast=factor(1),
        saturation=factor(2),
        hue=np.where(jittered, spec.jitter[3] * (2 * factors[:, 3] - 1), 0).astype(np.float32),
        order=np.argsort(draws[:, _Column.JITTER_ORDER], axis=1),
        grayscale=draws[:, _Column.GRAYSCALE] < spec.grayscale,
        blur_sigma=np.where(blurred, sigma, 0).astype(np.float32),
        solarize=draws[:, _Column.SOLARIZE] < spec.solarize,
    )


def _random_resized_boxes(
    spec: ViewSpec, widths: NDArray[np.int64], heights: NDArray[np.int64], draws: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Boxes drawn as in torchvision's RandomResizedCrop.get_params: the first of ten attempts that fits."""
    scale_low, scale_high = spec.scale
    ratio_low, ratio_high = spec.ratio
    area = (widths * heights)[:, None] * (scale_low + (scale_high - scale_low) * draws[:, _Column.AREA])
    log_low, log_high = np.log(ratio_low), np.log(ratio_high)
    ratio = np.exp(log_low + (log_high - log_low) * draws[:, _Column.LOG_RATIO])
    tried_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_width > 0) & (tried_width <= widths[:, None])
    fits &= (tried_height > 0) & (tried_height <= heights[:, None])

    rows, attempt = np.arange(len(widths)), fits.argmax(axis=1)
    found = fits[rows, attempt]
    # Without a fit: the largest central box whose ratio is allowed.
    width = np.where(found, tried_width[rows, attempt], np.minimum(widths, np.rint(heights * ratio_high)))
    height = np.where(found, tried_height[rows, attempt], np.minimum(heights, np.rint(widths / ratio_low)))
    width, height = np.maximum(width, 1), np.maximum(height, 1)
    room_top, room_left = heights - height, widths - width
    top = np.where(found, np.floor(draws[:, _Column.TOP] * (room_top + 1)), room_top // 2)
    left = np.where(found, np.floor(draws[:, _Column.LEFT] * (room_left + 1)), room_left // 2)
    return np.stack([top, left, height, width], axis=1).astype(np.int32)


def _center_view(spec: ViewSpec, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> ViewPlan:
    assert spec.center_crop is not None
    count = len(widths)
    side = np.maximum(1, np.rint(spec.center_crop * np.minimum(widths, heights))).astype(np.int64)
    boxes = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)
    ones, zeros, never = np.ones(count, np.float32), np.zeros(count, np.float32), np.zeros(count, np.bool_)
    return ViewPlan(
        size=spec.size,
        boxes=boxes.astype(np.int32),
        flip=never,
        brightness=ones,
        contrast=ones,
        saturation=ones,
        hue=zeros,
        order=np.tile(np.arange(4), (count, 1)),
        grayscale=never,
        blur_sigma=zeros,
        solarize=never,
    )


def _philox(seed: int, stream: int, counter: list[int]) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array(counter, np.uint64))


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} was given; it must be in [0, 2**64)")
    return seed
