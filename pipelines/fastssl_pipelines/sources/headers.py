"""Check the structure of a JPEG or PNG file without decoding it."""

from __future__ import annotations

from typing import NamedTuple

from fastssl_pipelines.sources.decoding import BROKEN_IMAGE, open_image, orientation_of

PNG_BIT_DEPTH_AT = 24  # Offset in the file

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # Start of frame; the three others are tables and reserved
_START_OF_SCAN = 0xDA
_APP1 = 0xE1  # EXIF or XMP
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # EXIF, XMP, and EXIF in hexadecimal digits


class _Header(NamedTuple):
    """Width and height in pixels as stored, and whether there are metadata, which may hold an orientation."""

    width: int
    height: int
    metadata: bool


def well_formed(encoded: bytes, width: int, height: int) -> bool:
    """Whether the segments of a JPEG lead to a scan or the chunks of a PNG to its end, upright and of that size.

    `width`, `height`: in pixels. The pixels may still be broken, and a decoder may still accept a file that is not
    well formed. False for a PNG of 16 bits, since decoders convert it to 8 bits in different ways.
    """
    if encoded[:2] == b"\xff\xd8":
        header = _jpeg_header(encoded)
    elif encoded[:8] == _PNG_SIGNATURE:
        header = _png_header(encoded)
    else:
        return False
    if header is None or header[:2] != (width, height):
        return False
    return not header.metadata or _is_upright(encoded)


def _is_upright(encoded: bytes) -> bool:
    try:
        with open_image(encoded) as image:
            return orientation_of(image) == 1
    except BROKEN_IMAGE:
        return False


def _jpeg_header(encoded: bytes) -> _Header | None:
    at, size, metadata = 2, None, False
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            height, width = (int.from_bytes(encoded[at + i : at + i + 2], "big") for i in (5, 7))
            size = width, height
        if length < 2 or not 0xC0 <= marker <= 0xFE:
            return None
        metadata |= marker == _APP1
        at += 2 + length
        if marker == _START_OF_SCAN:
            return _Header(*size, metadata) if size and at < len(encoded) else None
    return None


def _png_header(encoded: bytes) -> _Header | None:
    if encoded[12:16] != b"IHDR" or encoded[PNG_BIT_DEPTH_AT : PNG_BIT_DEPTH_AT + 1] == b"\x10":
        return None
    at, metadata = 8, False
    while at + 12 <= len(encoded):
        length, kind = int.from_bytes(encoded[at : at + 4], "big"), encoded[at + 4 : at + 8]
        if kind == b"IEND":
            width, height = (int.from_bytes(encoded[i : i + 4], "big") for i in (16, 20))
            return _Header(width, height, metadata)
        metadata |= kind in _PNG_METADATA
        at += 12 + length
    return None
