"""Sources: which files are images, their sizes and labels, and the messages about broken ones."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from fastssl_pipelines import ArraySource, DataError, ImageFolder
from fastssl_pipelines.sources.base import JointSource, Subset


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    save(tmp_path / "b" / "deep" / "z.PNG", picture(5, 6))
    save(tmp_path / "b" / "a.jpeg", picture(7, 8))
    save(tmp_path / "a" / "x.jpg", picture(9, 10))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._x.jpg").write_bytes(b"left by another system")
    (tmp_path / ".cache").mkdir()
    source = ImageFolder(tmp_path)
    assert source.classes == ("a", "b")
    assert [source.describe(i).removeprefix(str(tmp_path)) for i in range(3)] == [
        "/a/x.jpg",
        "/b/a.jpeg",
        "/b/deep/z.PNG",
    ]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.heights.tolist() == [9, 7, 5]
    assert source.widths.tolist() == [10, 8, 6]
    assert (source.labels.dtype, source.widths.dtype) == (np.int64, np.int32)
    assert len(source) == 3


def test_a_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "b.png", picture(4, 4, 1))
    save(tmp_path / "a.png", picture(4, 4, 2))
    source = ImageFolder(tmp_path)
    assert source.labels.tolist() == [-1, -1]
    assert source.classes == ()
    np.testing.assert_array_equal(source.pixels(0), picture(4, 4, 2))


def test_more_files_than_a_scan_chunk(tmp_path):
    for number in range(300):
        save(tmp_path / f"{number:03}.png", picture(1 + number % 7, 1 + number % 5))
    source = ImageFolder(tmp_path)
    assert source.heights.tolist() == [1 + number % 7 for number in range(300)]
    assert source.widths.tolist() == [1 + number % 5 for number in range(300)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is not a folder"),
        (lambda root: root.write_text("a file"), "is not a folder"),
        (lambda root: root.mkdir(), r"holds no image file \(\.jpg, \.png, \.\.\.\) and no class folder"),
        (lambda root: (root / "cat").mkdir(parents=True), "class folder .*cat holds no"),
        (
            lambda root: [save(root / "cat" / "1.png", picture(2, 2)), save(root / "2.png", picture(2, 2))],
            "also 2.png next to them",
        ),
    ],
)
def test_a_wrong_root_is_explained(tmp_path, make, message):
    root = tmp_path / "root"
    make(root)
    with pytest.raises(DataError, match=rf"(?s){message}.*--data\.root"):
        ImageFolder(root)


@pytest.fixture
def with_garbage(tmp_path) -> ImageFolder:
    """Indices 1 and 2 of four images have no readable header."""
    for name in ("a/0.png", "b/3.png"):
        save(tmp_path / name, picture(4, 5))
    (tmp_path / "a" / "1.jpg").write_bytes(b"hello" * 50)
    (tmp_path / "a" / "2.jpg").write_bytes(b"")
    return ImageFolder(tmp_path)


def test_files_without_a_readable_header_keep_their_indices(with_garbage):
    assert with_garbage.labels.tolist() == [0, 0, 0, 1]
    assert with_garbage.widths.tolist() == [5, 0, 0, 5]
    assert with_garbage.heights.tolist() == [4, 0, 0, 4]
    assert list(with_garbage.defects) == [1, 2]
    for number, name in ((1, "1.jpg"), (2, "2.jpg")):
        for read in (with_garbage.pixels, with_garbage.encoded):
            with pytest.raises(
                DataError, match=rf"{name} cannot be read .*not one of JPEG, PNG.*--data\.root"
            ) as raised:
                read(number)
            assert str(raised.value) == with_garbage.defects[number]
            assert "\n" not in str(raised.value)


def test_defects_of_subsets_and_joint_sources(with_garbage):
    subset = Subset(with_garbage, np.array([3, 2, 0, 2]))
    assert subset.defects == {1: with_garbage.defects[2], 3: with_garbage.defects[2]}
    joint = JointSource(subset, with_garbage)
    assert list(joint.defects) == [1, 3, 5, 6]
    for source in (subset, joint):
        for number, reason in source.defects.items():
            assert source.widths[number] == 0
            with pytest.raises(DataError, match=re.escape(reason)):
                source.encoded(number)


def test_a_data_set_without_any_readable_image_is_refused(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(DataError, match=r"none of the 2 images of .*; the first: .*1\.jpg .*--data\.root"):
        ImageFolder(tmp_path)


def test_a_file_that_breaks_or_disappears_after_the_scan_is_named(tmp_path):
    for name in ("cut.jpg", "gone.jpg"):
        save(tmp_path / name, picture(40, 40))
    source = ImageFolder(tmp_path)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "gone.jpg").unlink()
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read .*truncated.*--data\.root"):
        source.pixels(0)
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read .*--data\.root"):
        source.pixels(1)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_color_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(picture(8, 9)).convert(mode)
    image.save(tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"))
    assert ImageFolder(tmp_path).pixels(0).shape == (8, 9, 3)


def test_16_bit_gray_keeps_its_range(tmp_path):
    gray = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    save(tmp_path / "deep.png", gray)
    pixels = ImageFolder(tmp_path).pixels(0)
    np.testing.assert_array_equal(pixels, np.repeat((gray >> 8)[:, :, None], 3, axis=2))


def test_an_array_source_encodes_without_loss():
    images = np.stack([picture(6, 7, seed) for seed in range(3)])
    source = ArraySource("pictures", images, np.array([1, 0, -1]), ("a", "b"))
    assert (source.heights.tolist(), source.widths.tolist()) == ([6] * 3, [7] * 3)
    for index in range(3):
        np.testing.assert_array_equal(source.pixels(index), images[index])
        np.testing.assert_array_equal(Image.open(io.BytesIO(source.encoded(index))), images[index])


def test_an_array_source_refuses_other_arrays():
    with pytest.raises(ValueError, match=r"uint8 \[n, H, W, 3\]"):
        ArraySource("wrong", np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, int), ())
    with pytest.raises(ValueError, match="2 images were given with 3 labels"):
        ArraySource("wrong", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int), ())


def test_a_subset_has_the_rows_in_order():
    images = np.stack([picture(6, 7, seed) for seed in range(4)])
    source = Subset(ArraySource("pictures", images, np.array([1, 0, -1, 1]), ("a", "b")), np.array([3, 0]))
    assert (len(source), source.labels.tolist(), source.classes) == (2, [1, 1], ("a", "b"))
    np.testing.assert_array_equal(source.pixels(0), images[3])
    assert source.describe(1) == "image 0 of pictures"


@pytest.mark.parametrize(
    ("label", "classes"), [(2, ("a", "b")), (-2, ("a", "b")), (0, ())], ids=["above", "below", "no classes"]
)
def test_an_array_source_refuses_labels_outside_its_classes(label, classes):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=rf"label {label} was given with {len(classes)} classes; a label must be -1"):
        ArraySource("wrong", images, np.array([-1, label]), classes)
    assert ArraySource("right", images, np.array([-1, len(classes) - 1]), classes).classes == classes


def test_an_unlabeled_folder_is_read_at_any_depth(tmp_path):
    for name in ("b.png", "cat/1.png", "cat/deep/2.JPG", "dog/1.jpeg"):
        save(tmp_path / name, picture(4, 5))
    (tmp_path / "cat" / ".1.png").write_bytes(b"left by another system")
    (tmp_path / "empty").mkdir()
    source = ImageFolder(tmp_path, labeled=False)
    names = [source.name_of(index) for index in range(len(source))]
    assert names == ["b.png", "cat/1.png", "cat/deep/2.JPG", "dog/1.jpeg"]
    assert source.labels.tolist() == [-1] * 4
    assert source.classes == ()
    assert [source.describe(index) for index in range(4)] == [str(tmp_path / name) for name in names]


def test_a_wrong_unlabeled_folder_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"none is not a folder; --data\.unlabeled"):
        ImageFolder(tmp_path / "none", labeled=False)
    with pytest.raises(DataError, match=r"holds no .*--data\.unlabeled"):
        ImageFolder(tmp_path, labeled=False)
    save(tmp_path / "a" / "good.png", picture(4, 4))
    source = ImageFolder(tmp_path, labeled=False)
    (tmp_path / "a" / "good.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"good\.png cannot be read .*--data\.unlabeled"):
        source.pixels(0)
