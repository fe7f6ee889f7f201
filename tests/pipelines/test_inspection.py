from __future__ import annotations

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from fastssl_pipelines.sources.inspection import DefectKind, inspect, inspect_all
from fastssl_pipelines.sources.open import list_images
from fastssl_pipelines.synthetic.photos import photograph

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def encode(format: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, format, **options)
    return file.getvalue()


def turned(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(format, exif=exif)


JPEG, PNG = encode("JPEG"), encode("PNG")
GRAY16 = encode("PNG", Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)))
FRAMES = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]


def kinds(encoded: bytes, name: str) -> list[DefectKind]:
    return [defect.kind for defect in inspect(encoded, name)]


def rgb16() -> bytes:
    """16-bit RGB PNG, which Pillow reads but cannot write: an 8-bit one with its bit depth changed."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
    header = struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("encoded", "name"),
    [
        (JPEG, "a/b.JPEG"),
        (JPEG, "b.jpg"),
        (PNG, "b.PNG"),
        (encode("JPEG", progressive=True), "b.jpg"),
        (encode("JPEG", Image.fromarray(PIXELS).convert("L")), "gray.jpg"),
        (photograph(0, seed=0), "photograph.jpg"),
        (JPEG, "b.jfif"),
        (JPEG, "b.JPE"),
        (encode("WEBP"), "b.webp"),
        (encode("GIF"), "b.gif"),
        (encode("BMP"), "b.bmp"),
        (encode("TIFF"), "b.tif"),
        (encode("TIFF", compression="tiff_lzw"), "b.TIFF"),
        (encode("PPM"), "b.ppm"),
        (encode("PPM", Image.fromarray(PIXELS).convert("L")), "b.pgm"),
        (turned("JPEG", 1), "b.jpg"),
    ],
)
def test_a_good_file_has_no_defect(encoded, name):
    assert inspect(encoded, name) == ()


def test_an_empty_file_is_of_zero_size():
    assert kinds(b"", "b.jpg") == [DefectKind.ZERO_SIZE]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("padding", [b"", bytes(1000)])
@pytest.mark.parametrize("encoded", [photograph(0, seed=0), PNG], ids=["JPEG", "PNG"])
def test_a_file_that_ends_early_is_truncated(encoded, padding, share):
    length = int(share * len(encoded))
    filled = padding[: len(encoded) - length]
    assert kinds(encoded[:length] + filled, "b.png" if encoded is PNG else "b.jpg") == [DefectKind.TRUNCATED]


def test_a_whole_file_that_cannot_be_decoded_is_corrupt():
    damaged = bytearray(PNG)
    damaged[len(PNG) // 2] ^= 1
    assert kinds(bytes(damaged), "b.png") == [DefectKind.CORRUPT]
    start_of_scan = JPEG.index(b"\xff\xda")
    (defect,) = inspect(JPEG[:start_of_scan] + JPEG[-40:], "b.jpg")
    assert defect.kind is DefectKind.CORRUPT
    assert defect.detail


def test_too_many_pixels_are_too_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (defect,) = inspect(PNG, "b.png")
    assert defect.kind is DefectKind.TOO_LARGE
    assert not defect.kind.harmless
    assert "768 pixels" in defect.detail
    assert "limit of 200 pixels" in defect.detail


@pytest.mark.parametrize("format", ["ICO", "PCX", "JPEG2000", "TGA"])
def test_another_format_is_named(format):
    (defect,) = inspect(encode(format), "b.jpg")
    assert (defect.kind, defect.detail) == (DefectKind.OTHER_FORMAT, format)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixel_types_without_a_fixed_range_are_another_format(mode):
    (defect,) = inspect(encode("TIFF", Image.new(mode, (8, 8))), "b.tif")
    assert defect.kind is DefectKind.OTHER_FORMAT
    assert "8 or 16 bits per channel" in defect.detail


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_that_ends_early_is_unusable(compression):
    content = encode("TIFF", compression=compression)
    assert kinds(content, "b.tif") == []
    (kind,) = kinds(content[: len(content) // 2], "b.tif")
    assert kind in (DefectKind.TRUNCATED, DefectKind.CORRUPT)


@pytest.mark.parametrize("format", ["WEBP", "GIF", "BMP", "PPM"])
def test_other_files_that_end_early_are_unusable(format):
    content = encode(format)
    (kind,) = kinds(content[: len(content) // 2], "b." + format.lower())
    assert kind in (DefectKind.TRUNCATED, DefectKind.CORRUPT)


def test_a_file_that_is_not_an_image_is_another_format():
    (defect,) = inspect(b"<html>404 Not Found</html>", "b.jpg")
    assert (defect.kind, defect.detail) == (DefectKind.OTHER_FORMAT, "not an image format that Pillow knows")


@pytest.mark.parametrize(
    ("encoded", "name", "expected"),
    [
        (PNG, "b.jpg", DefectKind.WRONG_SUFFIX),
        (JPEG, "b.png", DefectKind.WRONG_SUFFIX),
        (encode("JPEG", Image.fromarray(PIXELS).convert("CMYK")), "b.jpg", DefectKind.CMYK),
        (GRAY16, "b.png", DefectKind.SIXTEEN_BIT),
        (rgb16(), "b.png", DefectKind.SIXTEEN_BIT),
        (encode("PNG", FRAMES[0], save_all=True, append_images=FRAMES[1:]), "b.png", DefectKind.ANIMATED),
        (encode("MPO", FRAMES[0], save_all=True, append_images=FRAMES[1:]), "b.jpg", DefectKind.ANIMATED),
        (encode("TIFF", Image.fromarray(np.zeros((4, 4), np.uint16))), "b.tif", DefectKind.SIXTEEN_BIT),
        (b"P5 2 2 65535\n" + bytes(8), "b.pgm", DefectKind.SIXTEEN_BIT),
        (encode("GIF", FRAMES[0], save_all=True, append_images=FRAMES[1:]), "b.gif", DefectKind.ANIMATED),
        (
            encode("TIFF", FRAMES[0].copy(), save_all=True, append_images=[FRAMES[1].copy()]),
            "b.tif",
            DefectKind.ANIMATED,
        ),
        (encode("WEBP"), "b.jpg", DefectKind.WRONG_SUFFIX),
        (turned("JPEG", 6), "b.jpg", DefectKind.TURNED),
        (turned("PNG", 3), "b.png", DefectKind.TURNED),
        (turned("WEBP", 8), "b.webp", DefectKind.TURNED),
    ],
    ids=[
        "PNG as jpg",
        "JPEG as png",
        "CMYK",
        "gray 16",
        "RGB 16",
        "APNG",
        "MPO",
        "TIFF 16",
        "PGM 16",
        "GIF frames",
        "TIFF pages",
        "WebP as jpg",
        "turned JPEG",
        "turned PNG",
        "turned WebP",
    ],
)
def test_what_training_can_use_is_harmless(encoded, name, expected):
    assert kinds(encoded, name) == [expected]
    assert expected.harmless


def test_a_file_can_have_several_harmless_defects():
    cmyk = encode("JPEG", Image.fromarray(PIXELS).convert("CMYK"))
    assert kinds(cmyk, "b.png") == [DefectKind.WRONG_SUFFIX, DefectKind.CMYK]


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list_images(root)


def jpeg(number):
    return encode("JPEG", Image.fromarray(PIXELS ^ number))


def found(*listings, workers=2):
    findings = inspect_all(listings, workers=workers)
    return [(finding.listing, finding.name, finding.defect.kind) for finding in findings]


def test_one_file_in_two_classes_is_mislabeled_with_all_its_copies(tmp_path):
    files = {"a/1.jpg": jpeg(1), "a/2.jpg": jpeg(1), "a/3.jpg": jpeg(2), "b/1.jpg": jpeg(1), "b/2.jpg": jpeg(3)}
    findings = inspect_all([write(tmp_path, files)], workers=1)
    assert [finding.name for finding in findings] == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    assert {(finding.defect.kind, finding.defect.detail) for finding in findings} == {
        (DefectKind.MISLABELED, "a and b")
    }


def test_copies_within_a_class_or_without_classes_are_not_a_defect(tmp_path):
    assert found(write(tmp_path / "one", {"a/1.jpg": JPEG, "a/2.jpg": JPEG, "b/1.jpg": PNG})) == [
        (0, "b/1.jpg", DefectKind.WRONG_SUFFIX)
    ]
    assert found(write(tmp_path / "flat", {"1.jpg": JPEG, "2.jpg": JPEG})) == []


def test_unusable_files_are_not_also_mislabeled(tmp_path):
    assert found(write(tmp_path, {"a/1.jpg": b"", "b/1.jpg": b""})) == [
        (0, "a/1.jpg", DefectKind.ZERO_SIZE),
        (0, "b/1.jpg", DefectKind.ZERO_SIZE),
    ]


def test_classes_are_compared_by_name_across_listings(tmp_path):
    train = write(tmp_path / "train", {"a/1.jpg": jpeg(1), "b/1.jpg": jpeg(2)})
    test = write(tmp_path / "test", {"a/2.jpg": jpeg(2), "b/3.jpg": jpeg(3)})
    assert found(train, test) == [(0, "b/1.jpg", DefectKind.MISLABELED), (1, "a/2.jpg", DefectKind.MISLABELED)]
    same = write(tmp_path / "same", {"a/1.jpg": jpeg(1)})
    assert found(train, same) == [(0, "a/1.jpg", DefectKind.LEAKED), (1, "a/1.jpg", DefectKind.LEAKED)]
    assert DefectKind.LEAKED.harmless


@pytest.mark.parametrize("prefix", [b"P0CMYK 2 2 255 ", b"PyP 2 2 255 ", b"P1\n2 2\n", b"P2\n2 2 255\n"])
def test_every_ppm_prefix_of_pillow_is_accepted(prefix):
    values = b"1 0 1 0" if prefix[1:2] in b"12" else bytes(16)
    assert kinds(prefix + values, "b.ppm") == ([DefectKind.CMYK] if b"CMYK" in prefix else [])


def test_frames_after_the_first_may_be_broken():
    content = encode("GIF", FRAMES[0], save_all=True, append_images=FRAMES[1:])
    second = content.rindex(b"!\xf9")
    assert kinds(content[:second] + b"\0" + content[second:], "b.gif") in ([], [DefectKind.ANIMATED])


def test_a_file_that_is_gone_is_unreadable(tmp_path):
    listing = write(tmp_path, {"a/1.jpg": JPEG, "a/2.jpg": jpeg(2)})
    (tmp_path / "a/1.jpg").unlink()
    (finding,) = inspect_all([listing], workers=1)
    assert (finding.name, finding.defect.kind) == ("a/1.jpg", DefectKind.UNREADABLE)
    assert "No such file" in finding.defect.detail


def test_images_in_tar_shards_are_inspected(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name, content in {"a/1.jpg": JPEG, "a/2.jpg": JPEG[:300], "b/1.jpg": JPEG}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    findings = found(list_images(tmp_path))
    assert [kind for _, _, kind in findings] == [DefectKind.MISLABELED, DefectKind.TRUNCATED, DefectKind.MISLABELED]
    assert [name.rsplit("/", 2)[-2:] for _, name, _ in findings] == [["a", "1.jpg"], ["a", "2.jpg"], ["b", "1.jpg"]]


def test_findings_keep_the_order_and_progress_ends_at_the_number_of_images(tmp_path):
    files = {f"a/{number:03d}.jpg": b"" if number % 7 == 0 else jpeg(number % 256) for number in range(100)}
    done = []
    findings = inspect_all([write(tmp_path, files)], workers=3, progress=lambda *arguments: done.append(arguments))
    assert [finding.name for finding in findings] == [f"a/{number:03d}.jpg" for number in range(0, 100, 7)]
    assert done == sorted(done)
    assert done[-1] == ("reading images", 100, 100)
