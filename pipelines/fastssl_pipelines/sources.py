"""Where images come from: an indexed collection of JPEG or PNG files with sizes and labels."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastssl_pipelines.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png")
_FORMATS = ("JPEG", "PNG")
_SCAN_THREADS = 8  # they wait for the disk; a header takes the CPU 30 microseconds
_SCAN_CHUNK = 256  # a future for every file would cost more than reading its header

# What PIL raises on broken files; a SyntaxError is a broken PNG chunk.
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Source(ABC):
    """Numbered images with known sizes.

    `labels`: int64 [n], the true labels, -1 = unknown, else an index into `classes`.
    `widths`, `heights`: int32 [n], pixels as stored; an EXIF orientation is not applied.
    """

    name: str
    option: str = "--data.root"  # the one that names it on the command line, for error messages
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of a JPEG or PNG file."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What to call image `index` in an error message."""

    def name_of(self, index: int) -> str:
        """The path of image `index` relative to the data set's folder; DataError for images that are no files."""
        raise DataError(f"the images of {self.name} have no file names; --data.label-list needs those of --data.root")

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The decoded image, uint8 [H, W, 3], RGB; DataError if it cannot be decoded."""
        encoded = self.encoded(index)
        try:
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                if image.mode == "I;16":
                    # PIL would clip 16-bit grey at 255, which makes nearly every pixel white.
                    return np.repeat(np.array(image)[:, :, None] >> 8, 3, axis=2).astype(np.uint8)
                return np.array(image.convert("RGB"))
        except _BROKEN_IMAGE as error:
            raise self._broken_image(self.describe(index), error) from error

    def _broken_image(self, name: str, error: Exception) -> DataError:
        reason = "it is neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        return DataError(f"{name} cannot be read as an image ({reason}); remove or replace it in {self.option}")


class ImageFolder(Source):
    """JPEG and PNG files under `root`, one folder a class in sorted order; files at any depth of it count.

    Without class folders, the files directly in `root` are the images and every label is -1. With `labelled` False
    (--data.unlabelled) all files at any depth are images with label -1, whatever folders they are in.
    Names that start with a dot are ignored. The headers of all files are read once, for the sizes.
    """

    def __init__(self, root: str | os.PathLike[str], *, labelled: bool = True) -> None:
        self.name = os.fspath(root)
        if not labelled:
            self.option = "--data.unlabelled"
        self._files, labels, self.classes = _listing(Path(root)) if labelled else _unlabelled_listing(Path(root))
        self.labels = np.array(labels, dtype=np.int64)
        chunks = [range(len(self))[start : start + _SCAN_CHUNK] for start in range(0, len(self), _SCAN_CHUNK)]
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            sizes = np.concatenate(list(pool.map(self._sizes, chunks)))
        self.widths, self.heights = sizes[:, 0].copy(), sizes[:, 1].copy()

    def encoded(self, index: int) -> bytes:
        path = self.describe(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check {self.option}") from error

    def describe(self, index: int) -> str:
        return os.path.join(self.name, self._files[index])

    def name_of(self, index: int) -> str:
        return self._files[index]

    def _sizes(self, indices: range) -> NDArray[np.int32]:
        return np.array([self._size(index) for index in indices], dtype=np.int32)

    def _size(self, index: int) -> tuple[int, int]:
        path = self.describe(index)
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return image.size
        except _BROKEN_IMAGE as error:
            raise self._broken_image(path, error) from error


class ArraySource(Source):
    """Images that are already in memory: `images` uint8 [n, H, W, 3], `labels` int [n], -1 = unknown.

    ValueError for other arrays and for labels outside -1, ..., len(classes) - 1.
    """

    def __init__(
        self, name: str, images: NDArray[np.uint8], labels: NDArray[np.integer], classes: tuple[str, ...]
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}; they must be uint8 [n, H, W, 3]")
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images came with {len(labels)} labels; they must be as many")
        self.name = name
        self.labels = np.asarray(labels, dtype=np.int64)
        outside = self.labels[(self.labels < -1) | (self.labels >= len(classes))]
        if len(outside):
            raise ValueError(
                f"label {outside[0]} was given with {len(classes)} classes; a label must be -1 (unknown) or the number"
                " of a class, from 0 on"
            )
        self.classes = classes
        self.heights = np.full(len(images), images.shape[1], np.int32)
        self.widths = np.full(len(images), images.shape[2], np.int32)
        self._images = images

    def encoded(self, index: int) -> bytes:
        file = io.BytesIO()
        # Nothing keeps the file, so speed matters and size does not.
        Image.fromarray(self._images[index]).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def pixels(self, index: int) -> NDArray[np.uint8]:
        return self._images[index]


class Subset(Source):
    """The images of another source at `rows`, int [n], in that order."""

    def __init__(self, source: Source, rows: NDArray[np.integer]) -> None:
        self.name = f"{len(rows)} images of {source.name}"
        self.labels, self.classes = source.labels[rows], source.classes
        self.widths, self.heights = source.widths[rows], source.heights[rows]
        self._source, self._rows = source, rows

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(int(self._rows[index]))

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._rows[index]))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        return self._source.pixels(int(self._rows[index]))

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self._rows[index]))


class JointSource(Source):
    """The images of `labelled` and after them those of `unlabelled`, whose labels count as unknown.

    The unlabelled images stand last: so the labelled ones keep their numbers, and an evaluation can leave off the end.
    """

    def __init__(self, labelled: Source, unlabelled: Source) -> None:
        self.name = f"{labelled.name} and {unlabelled.name}"
        self.classes = labelled.classes
        self.labels = np.concatenate([labelled.labels, np.full(len(unlabelled), -1, np.int64)])
        self.widths = np.concatenate([labelled.widths, unlabelled.widths])
        self.heights = np.concatenate([labelled.heights, unlabelled.heights])
        self._labelled, self._unlabelled = labelled, unlabelled

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

    def _part(self, index: int) -> tuple[Source, int]:
        count = len(self._labelled)
        return (self._labelled, index) if index < count else (self._unlabelled, index - count)


def _listing(root: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Paths relative to `root`, a label for each, and the class names."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data.root must be a folder of images or of class folders")
    entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    classes = tuple(name for name in entries if (root / name).is_dir())
    loose = [name for name in entries if name.lower().endswith(_SUFFIXES) and name not in classes]
    if not classes:
        if not loose:
            raise DataError(f"{root} holds no {', '.join(_SUFFIXES)} file and no class folder; check --data.root")
        return loose, [-1] * len(loose), ()
    if loose:
        raise DataError(
            f"{root} holds class folders and also {loose[0]} beside them, so its label is unclear;"
            " --data.root must hold either images or class folders"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list(_images_under(root / name, root))
        if not found:
            raise DataError(
                f"the class folder {root / name} holds no {', '.join(_SUFFIXES)} file; remove it or check --data.root"
            )
        files += found
        labels += [label] * len(found)
    return files, labels, classes


def _unlabelled_listing(root: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    """As `_listing`, of all images at any depth, without labels and classes."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data.unlabelled must be a folder of images")
    files = list(_images_under(root, root))
    if not files:
        raise DataError(f"{root} holds no {', '.join(_SUFFIXES)} file at any depth; check --data.unlabelled")
    return files, [-1] * len(files), ()


def _images_under(folder: Path, root: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = "" if parent == os.fspath(root) else os.path.relpath(parent, root)
        for name in sorted(names):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield os.path.join(relative, name)
