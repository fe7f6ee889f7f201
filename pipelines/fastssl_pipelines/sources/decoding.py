"""Open and decode image files: accepted formats and pixel types, and orientation."""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile

from fastssl_pipelines.sources.listing import SUFFIXES_OF

FORMATS = tuple(SUFFIXES_OF)  # Pillow's names

# What Pillow raises on broken files; a SyntaxError is a broken PNG chunk.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # Tags

Pixels = NDArray[np.uint8]


class UnsupportedPixels(ValueError):
    """An intact file whose pixels cannot be converted to 8 bits."""


_ORIENTED_BY = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))  # In Image.info

# From the pixels as stored to the upright image.
_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


def open_image(encoded: bytes) -> Image.Image:
    """Open an image file without decoding its pixels; an error in BROKEN_IMAGE if training cannot use it."""
    keep_pillow_quiet()
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    # Pillow scales a PGM file to the full range of 16 bits and calls its mode I
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise UnsupportedPixels(
            "its pixel type has no fixed range from black to white; use 8 or 16 bits per channel, unsigned"
        )
    return image


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from EXIF or XMP stored before the pixels; 1 without either.

    Metadata after the pixels of a PNG file are ignored, so that the header is enough to know the size of an image.
    """
    if image.format == "TIFF" or _ORIENTED_BY.isdisjoint(image.info):  # Pillow applies that of TIFF itself
        return 1
    try:
        # PngImageFile.getexif would decode the pixels to find metadata after them
        found = Image.Image.getexif(image).get(Base.Orientation)
    except Exception:  # Damaged metadata can fail in any way, and the pixels are good
        return 1
    return found if found in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright image in pixels."""
    width, height = image.size
    return (height, width) if orientation_of(image) >= 5 else (width, height)


def decode(image: Image.Image) -> Pixels:
    """Decode the upright image, uint8 [H, W, 3], RGB; the upper 8 of 16 bits, the first of several frames."""
    turn = _TURNS.get(orientation_of(image))
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit gray at 255, which makes nearly every pixel white
        pixels = np.repeat(_gray(image)[:, :, None], 3, axis=2)
    else:
        pixels = np.array(image.convert("RGB"))
    return np.ascontiguousarray(turn(pixels)) if turn else pixels


def _gray(image: Image.Image) -> Pixels:
    """Upper 8 bits of 16-bit gray, or of the 12 bits of some TIFF files."""
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2[_TIFF_BITS][0]
        white_is_zero = image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0  # Pillow inverts these for 8 bits only
    levels = (np.array(image) >> (bits - 8)).astype(np.uint8)
    return 255 - levels if white_is_zero else levels


@cache
def keep_pillow_quiet() -> None:
    """Silence Pillow's warnings about odd files that it decodes; `fastssl data check` reports them."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(OSError, AttributeError):  # A Pillow whose libtiff is not accessible
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # It prints what Pillow raises anyway
