"""The one way to open and decode an image file: which formats and pixels count, and which way up they are."""

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

FORMATS = tuple(SUFFIXES_OF)  # As Pillow calls them

# What Pillow raises on broken files; a SyntaxError is a broken PNG chunk.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # Tags

Pixels = NDArray[np.uint8]


class UnsupportedPixels(ValueError):
    """The file is whole and its pixels are none that a picture could be made of."""


_ORIENTED_BY = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))  # In Image.info

# From the pixels as stored to the upright picture.
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
    """The image file with its pixels not yet decoded; an error of BROKEN_IMAGE for what training cannot use."""
    keep_pillow_quiet()
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    # Pillow brings the 16 bits of a PGM file to the range of 16 bits and calls them I
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise UnsupportedPixels(
            "its numbers have no range that is black to white; 8 or 16 bits a channel, unsigned, have one"
        )
    return image


def orientation_of(image: Image.Image) -> int:
    """Its EXIF orientation, 1 to 8, as EXIF or XMP in front of the pixels tell it; 1 where they do not.

    Of a PNG file, what stands behind the pixels does not count: a header is enough to tell the size of every image.
    """
    if image.format == "TIFF" or _ORIENTED_BY.isdisjoint(image.info):  # Pillow turns TIFF itself
        return 1
    try:
        # That of a PNG would decode the pixels to look behind them
        found = Image.Image.getexif(image).get(Base.Orientation)
    except Exception:  # Damaged metadata fail in ways of their own, and the pixels are good
        return 1
    return found if found in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright picture in pixels."""
    width, height = image.size
    return (height, width) if orientation_of(image) >= 5 else (width, height)


def decode(image: Image.Image) -> Pixels:
    """The upright picture, uint8 [H, W, 3], RGB; of 16 bits the upper 8, of several pictures the first."""
    turn = _TURNS.get(orientation_of(image))
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit gray at 255, which makes nearly every pixel white
        pixels = np.repeat(_gray(image)[:, :, None], 3, axis=2)
    else:
        pixels = np.array(image.convert("RGB"))
    return np.ascontiguousarray(turn(pixels)) if turn else pixels


def _gray(image: Image.Image) -> Pixels:
    """The upper 8 bits of gray of 16 bits, or of 12 in TIFF."""
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2[_TIFF_BITS][0]
        white_is_zero = image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0  # Which Pillow sees to for 8 bits alone
    levels = (np.array(image) >> (bits - 8)).astype(np.uint8)
    return 255 - levels if white_is_zero else levels


@cache
def keep_pillow_quiet() -> None:
    """What Pillow finds odd but decodes is told by `fastssl data check`, not by warnings among the lines of a run."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(OSError, AttributeError):  # A Pillow whose libtiff cannot be reached
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # It writes to stderr what Pillow raises as well
