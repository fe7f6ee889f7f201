"""Formats, modes and EXIF orientations: every pipeline has the same upright pixels, and Pillow prints nothing."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastssl_pipelines import DataError, ImageFolder, ViewSpec, available_executors, build_executor
from fastssl_pipelines.sources.decoding import BROKEN_IMAGE, decode, open_image, orientation_of, upright_size
from fastssl_pipelines.sources.index import _HEADER_BYTES
from tests.pipelines.photos import NORMALIZATION, photo, plan_of

EXECUTORS = ("torchvision", "resident", "dali")
STORED = photo(24, 40, 0)
ORIENTATION = 0x0112


def encoded(format: str, pixels: np.ndarray | Image.Image = STORED, **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def xmp(orientation: int) -> str:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'


def png_text(key: str, text: str, *, international: bool = False) -> PngInfo:
    info = PngInfo()
    (info.add_itxt if international else info.add_text)(key, text)
    return info


TURNED = {
    "JPEG": lambda o: encoded("JPEG", quality=95, exif=exif(o)),
    "JPEG by XMP": lambda o: encoded("JPEG", quality=95, xmp=xmp(o).encode()),
    "PNG": lambda o: encoded("PNG", exif=exif(o)),
    "PNG by text": lambda o: encoded(
        "PNG", pnginfo=png_text("Raw profile type exif", f"\nexif\n      99\n{exif(o).tobytes().hex()}")
    ),
    "PNG by XMP": lambda o: encoded("PNG", pnginfo=png_text("XML:com.adobe.xmp", xmp(o), international=True)),
    "WebP": lambda o: encoded("WEBP", lossless=True, exif=exif(o)),
    "TIFF": lambda o: encoded("TIFF", tiffinfo={ORIENTATION: o}),
}


def upright(content: bytes) -> np.ndarray:
    """Upright pixels according to Pillow."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_to_size_and_pixels(kind, orientation, tmp_path):
    content = TURNED[kind](orientation)
    expected = upright(content)
    assert expected.shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))
    (tmp_path / "image.png").write_bytes(content)
    source = ImageFolder(tmp_path)
    assert (source.heights[0], source.widths[0]) == expected.shape[:2]
    np.testing.assert_array_equal(source.pixels(0), expected)
    # Independent of Pillow: the corner that EXIF defines as the first row and column
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    stored = np.asarray(Image.open(io.BytesIO(TURNED[kind](1))).convert("RGB"))
    np.testing.assert_array_equal(expected[corner[orientation]], stored[0, 0])


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("pixels", [STORED, STORED[:, :24]], ids=["oblong", "square"])
def test_every_executor_returns_the_upright_image(name, pixels, tmp_path):
    if reason := available_executors()[name]:
        pytest.skip(reason)
    for orientation in range(1, 9):
        for format in ("JPEG", "PNG", "WEBP"):
            content = encoded(format, pixels, exif=exif(orientation))
            (tmp_path / f"{format} {orientation}.png").write_bytes(content)
    source = ImageFolder(tmp_path)
    decodes = ("cpu", "cpu-region") if name == "dali" else ("auto",)
    for decode_by in decodes:
        executor = build_executor(name, source, workers=0, decode=decode_by, **NORMALIZATION)
        batch = plan_of(source, ViewSpec(size=24, center_crop=1.0), shuffle=False).batch(0, 0, len(source))
        (crops,) = executor.crops(batch)
        for row in range(len(source)):
            top, left, height, width = batch.views[0].boxes[row].tolist()
            assert height == width == 24
            expected = upright((tmp_path / source.name_of(row)).read_bytes())[top : top + 24, left : left + 24]
            np.testing.assert_array_equal(crops[row], expected, err_msg=source.name_of(row))


@pytest.mark.parametrize("name", EXECUTORS)
def test_exif_after_the_pixels_of_a_png_is_ignored_by_all(name, tmp_path):
    if reason := available_executors()[name]:
        pytest.skip(reason)
    content = encoded("PNG", STORED[:, :24], exif=exif(3))
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4], "big")
    last = content.index(b"IEND") - 4
    assert end < last
    (tmp_path / "a.png").write_bytes(content[:at] + content[end:last] + content[at:end] + content[last:])
    source = ImageFolder(tmp_path)
    batch = plan_of(source, ViewSpec(size=24, center_crop=1.0)).batch(0, 0, 1)
    (crops,) = build_executor(name, source, workers=0, **NORMALIZATION).crops(batch)
    np.testing.assert_array_equal(crops[0], STORED[:, :24])


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_invalid_orientation_changes_nothing(value):
    with open_image(encoded("PNG", exif=exif(value))) as image:
        assert orientation_of(image) == 1
        np.testing.assert_array_equal(decode(image), STORED)


@pytest.mark.parametrize(
    "content",
    [
        encoded("PNG", pnginfo=png_text("Raw profile type exif", "\n\n\nno digits")),
        encoded("JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40),
        encoded("WEBP", exif=b"Exif\0\0rubbish"),
    ],
    ids=["PNG", "JPEG", "WebP"],
)
def test_an_image_with_damaged_metadata_is_used(content):
    with open_image(content) as image:
        assert upright_size(image) == (40, 24)
        assert decode(image).shape == (24, 40, 3)


def gray(values: int, dtype: str) -> np.ndarray:
    return np.linspace(0, values, 24 * 40).reshape(24, 40).astype(dtype)


def repeated(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.astype(np.uint8)[:, :, None], 3, axis=2)


GRAY16 = gray(65535, "uint16")
PALETTE = Image.fromarray(STORED).quantize(16)
FIRST, SECOND = Image.fromarray(STORED).quantize(), Image.fromarray(255 - STORED).quantize()


def tiff(order: str, bits: int, strip: bytes, *, photometric: int = 1) -> bytes:
    """TIFF file with one strip of gray, which Pillow reads but cannot write; `order`: "<" or ">"."""
    tags = {256: 40, 257: 24, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: 24, 279: len(strip)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)) + entries + bytes(4)
    return header.ljust(200, b"\0") + strip


def packed_12_bits(levels: np.ndarray) -> bytes:
    """Pack two 12-bit pixels into three bytes."""
    digits = "".join(f"{level:03x}" for level in levels.ravel().tolist())
    return bytes.fromhex(digits)


RIGHT = {
    "gray.tif": (encoded("TIFF", GRAY16), repeated(GRAY16 >> 8)),
    "big endian.tif": (tiff(">", 16, GRAY16.astype(">u2").tobytes()), repeated(GRAY16 >> 8)),
    "white is zero.tif": (tiff("<", 16, GRAY16.tobytes(), photometric=0), repeated(255 - (GRAY16 >> 8))),
    "12 bits.tif": (tiff("<", 12, packed_12_bits(GRAY16 >> 4)), repeated(GRAY16 >> 8)),
    "gray.png": (encoded("PNG", GRAY16), repeated(GRAY16 >> 8)),
    "gray.pgm": (b"P5 40 24 65535\n" + GRAY16.astype(">u2").tobytes(), repeated(GRAY16 >> 8)),
    "color.ppm": (encoded("PPM"), STORED),
    "color.bmp": (encoded("BMP"), STORED),
    "color.tiff": (encoded("TIFF", compression="tiff_lzw"), STORED),
    "color.webp": (encoded("WEBP", lossless=True), STORED),
    "turned gray.tif": (encoded("TIFF", GRAY16, tiffinfo={ORIENTATION: 3}), repeated(GRAY16 >> 8)[::-1, ::-1]),
    "turned gray.png": (encoded("PNG", GRAY16, exif=exif(6)), np.rot90(repeated(GRAY16 >> 8), -1)),
    "first.gif": (encoded("GIF", FIRST, save_all=True, append_images=[SECOND]), np.asarray(FIRST.convert("RGB"))),
    "first.webp": (
        encoded("WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - STORED)]),
        STORED,
    ),
    "see-through.png": (encoded("PNG", PALETTE, transparency=bytes(range(16))), np.asarray(PALETTE.convert("RGB"))),
    "see-through.gif": (encoded("GIF", PALETTE, transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "jpeg.jfif": (encoded("JPEG"), np.asarray(Image.open(io.BytesIO(encoded("JPEG"))))),
    "jpeg.jpe": (encoded("JPEG", progressive=True), np.asarray(Image.open(io.BytesIO(encoded("JPEG"))))),
}


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_executor_decodes_every_format(name, tmp_path):
    if reason := available_executors()[name]:
        pytest.skip(reason)
    for file, (content, _) in RIGHT.items():
        (tmp_path / file).write_bytes(content)
    source = ImageFolder(tmp_path)
    assert len(source) == len(RIGHT)
    assert not source.defects
    batch = plan_of(source, ViewSpec(size=24, center_crop=1.0), shuffle=False).batch(0, 0, len(source))
    (crops,) = build_executor(name, source, workers=0, **NORMALIZATION).crops(batch)
    for row in range(len(source)):
        top, left, height, width = batch.views[0].boxes[row].tolist()
        expected = RIGHT[source.name_of(row)][1][top : top + height, left : left + width]
        np.testing.assert_array_equal(crops[row], expected, err_msg=source.name_of(row))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_pixel_types_without_a_fixed_range_are_refused(dtype, tmp_path):
    (tmp_path / "measured.tif").write_bytes(encoded("TIFF", gray(1000, dtype)))
    (tmp_path / "good.png").write_bytes(encoded("PNG"))
    source = ImageFolder(tmp_path)
    assert list(source.defects) == [1]
    with pytest.raises(DataError, match=r"measured\.tif .*8 or 16 bits per channel.*--data\.root"):
        source.pixels(1)


def test_an_incomplete_header_gives_no_wrong_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (170, 250, 3), dtype=np.uint8)
    for format in ("WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG", "PNG"):
        options = {"quality": 100} if format in ("WEBP", "JPEG") else {}
        options |= {"tiffinfo": {ORIENTATION: 6}} if format == "TIFF" else {}
        options |= {"exif": exif(6)} if format in ("WEBP", "JPEG", "PNG") else {}
        content = encoded(format, noise, **options)
        assert len(content) > _HEADER_BYTES
        (tmp_path / f"{format}.png").write_bytes(content)
    source = ImageFolder(tmp_path)
    for row in range(len(source)):
        turned = source.name_of(row) not in ("GIF.png", "BMP.png", "PPM.png")
        assert (source.widths[row], source.heights[row]) == ((170, 250) if turned else (250, 170))
        assert source.pixels(row).shape == ((250, 170, 3) if turned else (170, 250, 3))


def test_damaged_files_of_all_formats_are_decoded_or_refused():
    rng = np.random.default_rng(0)
    contents = [content for content, _ in RIGHT.values()] + [make(6) for make in TURNED.values()]
    decoded = 0
    for content in contents * 20:
        damaged = bytearray(content[: rng.integers(0, len(content) + 1)] if rng.random() < 0.3 else content)
        for _ in range(int(rng.integers(0, 5))):
            if damaged:
                damaged[int(rng.integers(0, min(len(damaged), 200)))] = int(rng.integers(0, 256))
        try:
            with open_image(bytes(damaged)) as image:
                pixels = decode(image)
        except BROKEN_IMAGE:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        decoded += 1
    assert 20 < decoded < len(contents) * 20


@pytest.mark.slow
def test_warnings_of_pillow_do_not_reach_the_console(tmp_path):
    odd = {
        "see-through.png": encoded("PNG", PALETTE, transparency=bytes(range(16))),
        "bomb.png": encoded("PNG", Image.new("1", (10_000, 9_000))),
        "corrupt.tif": encoded("TIFF", compression="tiff_lzw")[:-300] + bytes(300),
        "tags.tif": encoded("TIFF").replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 277, 3, 9)),
        "exif.jpg": encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03"),
    }
    for name, content in odd.items():
        (tmp_path / name).write_bytes(content)
    program = """
import sys, pathlib
from fastssl_pipelines.sources.decoding import BROKEN_IMAGE, decode, open_image
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        with open_image(path.read_bytes()) as image:
            decode(image)
    except BROKEN_IMAGE as error:
        print(path.name, "is refused")
"""
    command = [sys.executable, "-W", "default", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "corrupt.tif is refused" in done.stdout
