"""Image sources: indexed images with known sizes and labels, in memory or combined from other sources."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.decoding import BROKEN_IMAGE, FORMATS, decode, open_image, upright_size

_FINGERPRINT_IMAGES = 10_000


class Source(ABC):
    """Indexed images with known sizes.

    `labels`: int64 [n], the true labels, -1 = unknown, else an index into `classes`.
    `widths`, `heights`: int32 [n], in pixels of the upright image, after its EXIF orientation is applied.
    `defects`: maps the index of each image known to be unreadable to a sentence; its width and height are 0.
    """

    name: str
    option: str = "--data.root"  # Command line option that names the source, for error messages
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    defects: Mapping[int, str] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """Read the bytes of an image file; DataError for an image in `defects` and if they cannot be read."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name of image `index` in an error message."""

    def name_of(self, index: int) -> str:
        """Path of image `index` relative to the data set's folder; DataError for images that are not files."""
        raise DataError(
            f"the images of {self.name} have no file names; --data.label-list and --data.quarantine need those of "
            "--data.root"
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the names and sizes in bytes of all images in order, 16 hexadecimal digits."""

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Decode the upright image, uint8 [H, W, 3], RGB; DataError if that fails or its size has changed."""
        encoded = self.encoded(index)
        known = int(self.widths[index]), int(self.heights[index])
        try:
            with open_image(encoded) as image:
                if (size := upright_size(image)) != known:
                    raise ValueError(f"it has {size} pixels and had {known} when the index was made")
                return decode(image)
        except BROKEN_IMAGE as error:
            raise broken_image(self.describe(index), error, self.option) from error


def broken_image(name: str, error: Exception, option: str) -> DataError:
    """DataError for an image called `name` for which Pillow raised `error`."""
    unknown = isinstance(error, UnidentifiedImageError)  # Its message shows the address of an object
    reason = f"it is not one of {', '.join(FORMATS)}" if unknown else " ".join(str(error).split())
    return DataError(f"{name} cannot be read as an image ({reason}); remove or replace it in {option}")


def digest_of(*parts: bytes | memoryview) -> str:
    """SHA-256 of the concatenated parts, its first 16 hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


class ArraySource(Source):
    """Images in memory: `images` uint8 [n, H, W, 3], `labels` int [n], -1 = unknown.

    ValueError for other arrays and for labels outside -1, ..., len(classes) - 1.
    """

    def __init__(
        self, name: str, images: NDArray[np.uint8], labels: NDArray[np.integer], classes: tuple[str, ...]
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}; they must be uint8 [n, H, W, 3]")
        if len(labels) != len(images):
            raise ValueError(
                f"{len(images)} images were given with {len(labels)} labels; there must be one label per image"
            )
        self.name = name
        self.labels = np.asarray(labels, dtype=np.int64)
        outside = self.labels[(self.labels < -1) | (self.labels >= len(classes))]
        if len(outside):
            raise ValueError(
                f"label {outside[0]} was given with {len(classes)} classes; a label must be -1 (unknown) or the"
                " index of a class, from 0 on"
            )
        self.classes = classes
        self.heights = np.full(len(images), images.shape[1], np.int32)
        self.widths = np.full(len(images), images.shape[2], np.int32)
        self._images = images

    def encoded(self, index: int) -> bytes:
        file = io.BytesIO()
        # The file is temporary, so speed matters and size does not.
        Image.fromarray(self._images[index]).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def fingerprint(self) -> str:
        # These images have no names; for a large set, a part of the pixels is enough
        part = self._images[:: 1 + len(self._images) // _FINGERPRINT_IMAGES]
        return digest_of(self.labels.tobytes(), repr(self._images.shape).encode(), np.ascontiguousarray(part).data)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        return self._images[index]


class Subset(Source):
    """Images `rows`, int [n], of another source, in that order."""

    def __init__(self, source: Source, rows: NDArray[np.integer]) -> None:
        self.name = f"{len(rows)} images of {source.name}"
        self.labels, self.classes = source.labels[rows], source.classes
        self.widths, self.heights = source.widths[rows], source.heights[rows]
        broken = np.flatnonzero(np.isin(rows, list(source.defects))).tolist()
        self.defects = {row: source.defects[int(rows[row])] for row in broken}
        self.option = source.option
        self._source, self._rows = source, rows

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(int(self._rows[index]))

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._rows[index]))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        return self._source.pixels(int(self._rows[index]))

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self._rows[index]))

    def fingerprint(self) -> str:
        return digest_of(self._source.fingerprint().encode(), np.asarray(self._rows, np.int64).tobytes())


class JointSource(Source):
    """Images of `labeled`, followed by those of `unlabeled`, whose labels are set to unknown.

    The unlabeled images come last, so the labeled ones keep their indices and an evaluation can drop the end.
    """

    def __init__(self, labeled: Source, unlabeled: Source) -> None:
        self.name = f"{labeled.name} and {unlabeled.name}"
        self.classes = labeled.classes
        self.labels = np.concatenate([labeled.labels, np.full(len(unlabeled), -1, np.int64)])
        self.widths = np.concatenate([labeled.widths, unlabeled.widths])
        self.heights = np.concatenate([labeled.heights, unlabeled.heights])
        self.defects = {**labeled.defects, **{len(labeled) + row: why for row, why in unlabeled.defects.items()}}
        self._labeled, self._unlabeled = labeled, unlabeled

    def encoded(self, index: int) -> bytes:
        source, index = self._part(index)
        return source.encoded(index)

    def describe(self, index: int) -> str:
        source, index = self._part(index)
        return source.describe(index)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        source, index = self._part(index)
        return source.pixels(index)

    def name_of(self, index: int) -> str:
        source, index = self._part(index)
        return source.name_of(index)

    def fingerprint(self) -> str:
        return digest_of(*(source.fingerprint().encode() for source in (self._labeled, self._unlabeled)))

    def _part(self, index: int) -> tuple[Source, int]:
        count = len(self._labeled)
        return (self._labeled, index) if index < count else (self._unlabeled, index - count)
