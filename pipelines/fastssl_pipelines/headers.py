"""Whether a JPEG or PNG file is put together as it should be, without decoding it."""

from __future__ import annotations

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame; the three are tables and reserved
_START_OF_SCAN = 0xDA


def well_formed(encoded: bytes, width: int, height: int) -> bool:
    """True for a JPEG whose segments lead to a scan and a PNG whose chunks lead to its end, of that size in pixels.

    The pixels may still be broken. False does not mean that no decoder takes it.
    """
    if encoded[:2] == b"\xff\xd8":
        return _jpeg_size(encoded) == (width, height)
    return encoded[:8] == _PNG_SIGNATURE and _png_size(encoded) == (width, height)


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    at, size = 2, None
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            height, width = (int.from_bytes(encoded[at + i : at + i + 2], "big") for i in (5, 7))
            size = width, height
        if length < 2 or not 0xC0 <= marker <= 0xFE:
            return None
        at += 2 + length
        if marker == _START_OF_SCAN:
            return size if at < len(encoded) else None
    return None


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    if encoded[12:16] != b"IHDR":
        return None
    at = 8
    while at + 12 <= len(encoded):
        length = int.from_bytes(encoded[at : at + 4], "big")
        if encoded[at + 4 : at + 8] == b"IEND":
            return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
        at += 12 + length
    return None
