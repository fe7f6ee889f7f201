"""Find defects of image files by reading and decoding all of them before a run does."""

from __future__ import annotations

import hashlib
import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.decoding import (
    BROKEN_IMAGE,
    UnsupportedPixels,
    keep_pillow_quiet,
    open_image,
    orientation_of,
)
from fastssl_pipelines.sources.headers import PNG_BIT_DEPTH_AT
from fastssl_pipelines.sources.listing import SUFFIXES_OF, Listing, Progress

_CHUNK = 16  # Images per task: few futures, and a progress bar that moves
_DIGEST_BYTES = 16
_ANOTHER = "another image takes its place"

# Magic bytes at the start of files, and at the end for formats with an end marker.
_STARTS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"(II|MM)([*+]\0|\0[*+])",
    "GIF": rb"GIF8[79]a",
    "PPM": rb"P[0-6fy]",
}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TIFF_BIT_DEPTHS = 258  # TIFF tag


class DefectKind(Enum):
    """Kind of defect: its title, what training does with such an image, and whether it is harmless."""

    ZERO_SIZE = "zero size", _ANOTHER, False
    UNREADABLE = "unreadable file", _ANOTHER, False
    TRUNCATED = "truncated", _ANOTHER, False
    CORRUPT = "corrupt", _ANOTHER, False
    OTHER_FORMAT = "another format", _ANOTHER, False
    TOO_LARGE = "too large", _ANOTHER, False
    MISLABELED = "one file in two classes", "used with each of the labels", False
    LEAKED = "in training and test images", "used in both: accuracies are too high", True
    TURNED = "EXIF orientation", "applied", True
    WRONG_SUFFIX = "misleading suffix", "no effect: the content counts", True
    CMYK = "CMYK", "converted to RGB", True
    SIXTEEN_BIT = "16 bits per channel", "the upper 8 bits are used", True
    ANIMATED = "several images in a file", "the first one is used", True

    def __init__(self, title: str, consequence: str, harmless: bool) -> None:
        self.title, self.consequence, self.harmless = title, consequence, harmless


@dataclass(frozen=True, slots=True)
class Defect:
    """Defect of a file; `detail` says what was found if `kind` alone does not."""

    kind: DefectKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """Defect of the image `name` in the listing with index `listing`."""

    listing: int
    name: str
    defect: Defect


def inspect(encoded: bytes, name: str) -> tuple[Defect, ...]:
    """Defects of one file, at most one of which makes it unusable; only the suffix of `name` is checked.

    Pillow decodes the file, as in training. Damage that a JPEG decoder tolerates is not found: it only gives wrong
    pixels.
    """
    if not encoded:
        return (Defect(DefectKind.ZERO_SIZE),)
    format = next((format for format, start in _STARTS.items() if re.match(start, encoded, re.DOTALL)), None)
    if format is None:
        return (Defect(DefectKind.OTHER_FORMAT, _other_format(encoded)),)
    try:
        with open_image(encoded) as image:
            found = {
                DefectKind.TURNED: orientation_of(image) != 1,
                DefectKind.WRONG_SUFFIX: not name.lower().endswith(SUFFIXES_OF[format]),
                DefectKind.CMYK: image.mode == "CMYK",
                DefectKind.SIXTEEN_BIT: _has_16_bits(image, encoded),
            }
            # Decode at an eighth of the size: the whole file is still read, and the pixels are not needed
            image.draft(None, (1, 1))
            image.load()
            found[DefectKind.ANIMATED] = _has_more_pictures(image)
    except UnsupportedPixels as error:
        return (Defect(DefectKind.OTHER_FORMAT, str(error)),)
    except Image.DecompressionBombError as error:
        return (Defect(DefectKind.TOO_LARGE, str(error).split(",")[0]),)
    except BROKEN_IMAGE as error:
        reason = "its header is broken" if isinstance(error, UnidentifiedImageError) else str(error)
        return (Defect(DefectKind.TRUNCATED if _ends_early(encoded, format, reason) else DefectKind.CORRUPT, reason),)
    return tuple(
        Defect(kind, format if kind is DefectKind.WRONG_SUFFIX else "") for kind, is_so in found.items() if is_so
    )


def inspect_all(listings: Sequence[Listing], *, workers: int, progress: Progress | None = None) -> list[Finding]:
    """Defects of all images of the listings, in order; `workers` threads read and decode.

    Usable files with the same bytes in two classes, of one listing or several, are all MISLABELED, since the right
    label is unknown. Those of one class in two listings are LEAKED.
    """
    images = _Joined(listings)
    found: list[tuple[int, Defect]] = []
    first: dict[bytes, int] = {}
    copies: dict[bytes, list[int]] = {}
    chunks = [range(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(lambda chunk: [_inspect_image(*images.place(image)) for image in chunk], chunks)
        for chunk, inspected in zip(chunks, results, strict=True):
            for image, (digest, defects) in zip(chunk, inspected, strict=True):
                found += [(image, defect) for defect in defects]
                if digest and first.setdefault(digest, image) != image:
                    copies.setdefault(digest, [first[digest]]).append(image)
            if progress:
                progress("reading images", chunk.stop, len(images))
    for group in copies.values():
        classes = sorted({name for name in map(images.class_of, group) if name is not None})
        if len(classes) > 1:
            found += [(image, Defect(DefectKind.MISLABELED, " and ".join(classes))) for image in group]
        elif len({images.name_of(image)[0] for image in group}) > 1:
            found += [(image, Defect(DefectKind.LEAKED)) for image in group]
    found.sort(key=lambda pair: pair[0])
    return [Finding(*images.name_of(image), defect) for image, defect in found]


class _Joined:
    """Images of several listings with consecutive indices."""

    def __init__(self, listings: Sequence[Listing]) -> None:
        self._listings = listings
        self._ends = list(accumulate(map(len, listings)))

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, image: int) -> tuple[Listing, int]:
        index = self._listing_of(image)
        return self._listings[index], image - self._ends[index] + len(self._listings[index])

    def class_of(self, image: int) -> str | None:
        listing, row = self.place(image)
        label = int(listing.labels[row])
        return listing.classes[label] if label >= 0 else None

    def name_of(self, image: int) -> tuple[int, str]:
        listing, row = self.place(image)
        return self._listing_of(image), listing.names[row]

    def _listing_of(self, image: int) -> int:
        return bisect_right(self._ends, image)


def _inspect_image(listing: Listing, row: int) -> tuple[bytes | None, tuple[Defect, ...]]:
    """Hash of the file if it is usable, and its defects."""
    try:
        encoded = listing.encoded(row)
    except DataError as error:
        return None, (Defect(DefectKind.UNREADABLE, str(error)),)
    defects = inspect(encoded, listing.names[row])
    if all(defect.kind.harmless for defect in defects):
        return hashlib.sha256(encoded).digest()[:_DIGEST_BYTES], defects
    return None, defects


def _ends_early(encoded: bytes, format: str, reason: str) -> bool:
    # An incomplete download into a preallocated file leaves zeros at the end
    return not encoded.rstrip(b"\0").endswith(_ENDS[format]) if format in _ENDS else "truncated" in reason


def _has_16_bits(image: Image.Image, encoded: bytes) -> bool:
    if isinstance(image, TiffImageFile):
        return 16 in image.tag_v2.get(_TIFF_BIT_DEPTHS, ())
    return encoded[PNG_BIT_DEPTH_AT] == 16 if image.format == "PNG" else image.mode.startswith("I")


def _has_more_pictures(image: Image.Image) -> bool:
    try:
        return int(getattr(image, "n_frames", 1)) > 1
    except Exception:  # What follows the first frame can be broken in any way, and is not used
        return True


def _other_format(encoded: bytes) -> str:
    keep_pillow_quiet()
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.format or ""
    except BROKEN_IMAGE:
        return "not an image format that Pillow knows"
