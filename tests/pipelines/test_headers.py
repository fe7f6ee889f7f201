"""Headers of JPEG and PNG files."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from fastssl_pipelines.sources.headers import well_formed
from tests.pipelines.photos import photo


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(40, 50, 0)).save(file, kind, **options)
    return file.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


@pytest.mark.parametrize(
    "content",
    [JPEG, encoded("JPEG", progressive=True), encoded("JPEG", exif=b"Exif\0\0" + bytes(99)), PNG, JPEG[:-50]],
    ids=["jpeg", "progressive", "exif", "png", "cut pixels"],
)
def test_well_formed_files(content):
    assert well_formed(content, 50, 40)
    assert not well_formed(content, 40, 50)


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"\xff",
            b"hello" * 99,
            JPEG[:3],
            JPEG[:100],
            JPEG[:600],
            JPEG[:4] + b"hello" * 99,
            JPEG[:2] + bytes(99),
        ),
        *(PNG[:8], PNG[:60], PNG[:-6], PNG[: len(PNG) // 2], PNG[:8] + b"hello" * 99, encoded("GIF"), encoded("BMP")),
    ],
)
def test_malformed_files(content):
    assert not well_formed(content, 50, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_rotated_image_is_not_well_formed_and_an_upright_one_is(kind):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        content = encoded(kind, exif=exif)
        for size in ((50, 40), (40, 50)):
            assert well_formed(content, *size) == (orientation == 1 and size == (50, 40))


def test_a_png_of_16_bits_is_not_well_formed():
    file = io.BytesIO()
    Image.fromarray(photo(40, 50, 0)[:, :, 0].astype("uint16") * 257).save(file, "PNG")
    assert not well_formed(file.getvalue(), 50, 40)
