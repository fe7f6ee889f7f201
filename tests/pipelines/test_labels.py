"""Partial labels: unlabeled images after the labeled ones, and label lists."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from fastssl_pipelines import (
    ArraySource,
    DataError,
    EvaluationSampler,
    ImageFolder,
    SamplePlan,
    ViewSpec,
    build_executor,
)
from fastssl_pipelines.labels import listed_labels
from fastssl_pipelines.sources.base import JointSource, Subset


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def joint(tmp_path) -> JointSource:
    """Rows 0 to 3 are cat, cat, dog, dog; 4 to 6 come from an unlabeled folder with class folders."""
    for number, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png")):
        save(tmp_path / "labeled" / name, picture(8, 8, number))
    for number, name in enumerate(("1.png", "bird/9.png", "cat/2.png")):
        save(tmp_path / "more" / name, picture(8 + number, 10, 10 + number))
    return JointSource(ImageFolder(tmp_path / "labeled"), ImageFolder(tmp_path / "more", labeled=False))


def test_a_joint_source_has_the_unlabeled_images_last(joint):
    assert (len(joint), joint.classes) == (7, ("cat", "dog"))
    assert joint.labels.tolist() == [0, 0, 1, 1, -1, -1, -1]
    assert joint.heights.tolist() == [8, 8, 8, 8, 8, 9, 10]
    assert joint.widths.tolist() == [8, 8, 8, 8, 10, 10, 10]
    for index in range(7):
        pixels = picture(int(joint.heights[index]), int(joint.widths[index]), index + 6 * (index >= 4))
        np.testing.assert_array_equal(joint.pixels(index), pixels)
        np.testing.assert_array_equal(Image.open(io.BytesIO(joint.encoded(index))), pixels)
        assert joint.describe(index).endswith(joint.name_of(index))
    assert [joint.name_of(index) for index in (3, 4, 5)] == ["dog/3.png", "1.png", "bird/9.png"]


def test_labels_of_the_unlabeled_part_do_not_count():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    first = ArraySource("first", images, np.array([1, 0]), ("a", "b"))
    second = ArraySource("second", images, np.array([0, 1]), ("c", "d"))
    assert JointSource(first, second).labels.tolist() == [1, 0, -1, -1]


def test_a_subset_of_a_joint_source(joint):
    subset = Subset(joint, np.array([5, 0]))
    assert subset.labels.tolist() == [-1, 0]
    assert [subset.name_of(0), subset.name_of(1)] == ["bird/9.png", "cat/1.png"]
    np.testing.assert_array_equal(subset.pixels(0), joint.pixels(5))


@pytest.mark.parametrize("pipeline", ["dali", "torchvision", "resident"])
def test_every_executor_accepts_a_joint_source(joint, pipeline):
    source = pickle.loads(pickle.dumps(joint))  # As in worker processes
    plan = SamplePlan(
        widths=source.widths,
        heights=source.heights,
        labels=source.labels,
        views=[ViewSpec(size=8, center_crop=1.0)],
        seed=0,
        shuffle=False,
    )
    executor = build_executor(pipeline, source, mean=(0, 0, 0), std=(1, 1, 1), workers=0)
    (batch,) = executor.stream(EvaluationSampler(plan, batch_size=7), 0, 1)
    assert batch.labels.tolist() == [0, 0, 1, 1, -1, -1, -1]
    (boxes,) = (view.boxes for view in plan.batch(0, 0, 7).views)
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        side = min(joint.heights[row], joint.widths[row])
        assert height == width == side
        if side == 8:  # Not resized, so exact
            cut = joint.pixels(row)[top : top + 8, left : left + 8]
            got = (batch.views[0][row].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
            np.testing.assert_array_equal(got, cut)


def label_list(tmp_path, text: str):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "labels", "unmatched"),
    [
        ("", [-1, -1, -1, -1], ()),
        ("\n  \n", [-1, -1, -1, -1], ()),
        ("2.png\n", [-1, 0, -1, -1], ()),
        ("\n3.png\r\n2.png", [-1, 0, -1, 1], ()),
        ("dog/1.png\n", [-1, -1, 1, -1], ()),
        ("./dog/1.png\ncat/1.png\n", [0, -1, 1, -1], ()),
        ("dog/3.png\n3.png\n3.png\n", [-1, -1, -1, 1], ()),
        ("2.png\n8.png\ncat/3.png\n9.png\n", [-1, 0, -1, -1], ("8.png", "9.png", "cat/3.png")),
    ],
    ids=["empty", "blank", "base", "windows", "folder", "dotted", "twice", "some missing"],
)
def test_a_label_list_keeps_the_labels_of_the_images_it_names(joint, tmp_path, text, labels, unmatched):
    result = listed_labels(joint, label_list(tmp_path, text))
    assert result.labels.tolist() == [*labels, -1, -1, -1]
    assert result.labels.dtype == np.int64
    assert result.unmatched == unmatched
    assert joint.labels.tolist() == [0, 0, 1, 1, -1, -1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.png\n", r"1\.png in .*list\.txt names both cat/1\.png and dog/1\.png; .*--data\.label-list"),
        ("cat/1.png\n1.png\n", r"names both cat/1\.png and dog/1\.png"),
        ("z.png\nb.png", r"list\.txt names no image of .*: it has b\.png .* cat/1\.png; change --data\.label-list"),
        ("bird/9.png\n", r"names no image"),
    ],
    ids=["ambiguous", "also ambiguous", "of another data set", "unlabeled"],
)
def test_a_wrong_label_list_is_explained(joint, tmp_path, text, message):
    with pytest.raises(DataError, match=message) as raised:
        listed_labels(joint, label_list(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_an_unreadable_label_list_is_explained(joint, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("none", "No such file"), ("", "not a regular file"), ("binary", "is not UTF-8")):
        with pytest.raises(DataError, match=rf"{reason}.*--data\.label-list must be a text file"):
            listed_labels(joint, tmp_path / name)


def test_a_label_list_needs_labels_and_file_names(tmp_path):
    images, path = np.zeros((2, 4, 4, 3), np.uint8), label_list(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"pictures has no labels; drop --data\.label-list"):
        listed_labels(ArraySource("pictures", images, np.array([-1, -1]), ()), path)
    with pytest.raises(DataError, match=r"pictures have no file names; --data\.label-list"):
        listed_labels(ArraySource("pictures", images, np.array([0, 0]), ("a",)), path)
