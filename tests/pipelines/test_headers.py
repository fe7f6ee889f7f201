"""Headers of JPEG and PNG files."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from fastssl_pipelines.headers import well_formed
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
def test_what_is_put_together_as_it_should_be(content):
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
def test_what_is_not(content):
    assert not well_formed(content, 50, 40)
