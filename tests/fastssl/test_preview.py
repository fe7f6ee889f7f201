"""`fastssl preview`: the pixels and captions of the picture are those of the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from fastssl.cli import main
from fastssl.commands import preview
from fastssl.commands.preview import Options, caption
from fastssl.data import open_splits
from fastssl.presets import load
from fastssl.train.build import train_sampler
from fastssl_pipelines.plan import ViewPlan
from fastssl_pipelines.views import ViewSpec

PLAIN = ViewSpec(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter_probability=0.0, grayscale=0.0)
ENLARGED = 5  # Factor from 32 to 160 pixels
TOP, LEFTS = 50, (10, 180, 350)  # Of the source and the two views in the first row


def plain_config(**data):
    """The quickstart with views that are the images themselves."""
    config = load("quickstart")
    return replace(config, views=(PLAIN, PLAIN), data=replace(config.data, **data))


def drawn(config, tmp_path, **options):
    path = tmp_path / "preview.png"
    assert preview.run(config, Options(out=path, **options)) == 0
    return np.asarray(Image.open(path))


def tile(page, left):
    return page[TOP : TOP + 32 * ENLARGED, left : left + 32 * ENLARGED]


def same_picture(pixels):
    return pixels.repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def test_the_normalization_of_views_is_undone(tmp_path):
    config = plain_config(pictures=300)
    page = drawn(config, tmp_path, images=1, step=1)
    source = open_splits(config).train
    expected = same_picture(source.pixels(int(train_sampler(config, source)[1].ids[0])))
    for left in LEFTS[1:]:
        assert np.array_equal(tile(page, left), expected)
    inner = slice(2, -2)  # Inside the outlines of the boxes
    assert np.array_equal(tile(page, LEFTS[0])[inner, inner], expected[inner, inner])


def test_the_boxes_are_those_of_the_plan(tmp_path):
    config = load("quickstart")
    config = replace(config, seed=3, data=replace(config.data, pictures=300))
    page = tile(drawn(config, tmp_path, images=1), LEFTS[0])
    source = open_splits(config).train
    first, second = (view.boxes[0] * ENLARGED for view in train_sampler(config, source)[0].views)
    colors = [ImageColor.getrgb(color) for color in preview._COLORS[:2]]
    rows, columns = (np.flatnonzero((page == colors[1]).all(2).any(axis)) for axis in (1, 0))
    top, left, height, width = second.tolist()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (top, top + height - 1, left, left + width - 1)
    assert (page[first[0] : first[0] + 2] == colors[0]).all(2).any()


def test_the_caption_is_in_the_order_of_application():
    view = ViewPlan(
        size=32,
        boxes=np.int32([[1, 2, 30, 20], [0, 0, 32, 32], [0, 0, 8, 8]]),
        flip=np.array([True, False, False]),
        brightness=np.float32([1.25, 1, 1]),
        contrast=np.float32([0.5, 1, 1.5]),
        saturation=np.float32([0.75, 1, 1]),
        hue=np.float32([-0.05, 0, 0]),
        order=np.array([[3, 1, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]),
        grayscale=np.array([True, False, False]),
        blur_sigma=np.float32([1.5, 0, 0]),
        solarize=np.array([True, False, False]),
    )
    box, jitter = ["top 1, left 2", "height 30, width 20"], ["hue -0.050", "contrast 0.500", "brightness 1.250"]
    assert caption(view, 0) == [*box, *jitter, "saturation 0.750", "gray", "blur sigma 1.50", "solarize", "flip"]
    assert caption(view, 1) == ["top 0, left 0", "height 32, width 32"]
    assert caption(view, 2) == ["top 0, left 0", "height 8, width 8", "contrast 1.500"]


@pytest.mark.parametrize("pipeline", ["torchvision", "resident"])
def test_an_unreadable_image_is_replaced_as_in_training(tmp_path, pipeline):
    folder = tmp_path / "data" / "train" / "only"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "test" / "only").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "test" / "only" / "0.png")
    for number in range(256):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number:03d}.png")
    config = plain_config(root=tmp_path / "data", pipeline=pipeline, workers=0)
    first, second = train_sampler(config, open_splits(config).train)[0].ids[:2].tolist()
    page = drawn(config, tmp_path, images=1)
    assert (tile(page, LEFTS[1]) == (first, 0, 0)).all()
    broken = folder / f"{first:03d}.png"
    broken.write_bytes(broken.read_bytes()[:50])
    page = drawn(config, tmp_path, images=1)
    assert (tile(page, LEFTS[1]) == (second, 0, 0)).all()


def test_the_command_accepts_the_options_of_pretrain_and_prints_the_file(tmp_path, capsys):
    out = tmp_path / "views.png"
    arguments = [
        "--images",
        "3",
        "--data.pictures",
        "240",
        "--train.batch-size",
        "16",
        "--step",
        "7",
        "--out",
        str(out),
    ]
    assert main(["preview", "mocov2-cifar10", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as page:
        assert page.width == LEFTS[-1] + 160 + 10


def test_views_of_different_sizes_are_side_by_side(tmp_path):
    config = load("quickstart")
    config = replace(config, views=(PLAIN, replace(PLAIN, size=200)), data=replace(config.data, pictures=300))
    page = drawn(config, tmp_path, images=2)
    assert page.shape[1] == 10 + 200 + 10 + 160 + 10 + 200 + 10 - 8  # The source has 6 * 32 = 192 pixels


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "0"], "--images 0 was given; it must be at least 1"),
        (["--step", "-1"], "--step -1 was given; it must be at least 0"),
        (["--data.pictures", "300", "--step", "48"], "--step 48 was given; the run has 48 steps, counted from 0"),
        (["--data.pictures", "300", "--images", "200"], "--images 200 was given; a step has 128 (--train.batch-size)"),
        (["--out", "views.jpg"], "--out views.jpg was given; it must be the name of a .png file in an existing folder"),
        (["--out", "no/folder/views.png"], "it must be the name of a .png file in an existing folder"),
        (["--imges", "2"], "--imges"),
        (["mocov2-imagenet"], "trains on your images and no folder was given; add --data.root DIR"),
        (["mocov3"], "unknown preset 'mocov3'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["preview", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "views.png").mkdir()
    assert main(["preview", "--data.pictures", "240", "--images", "1", "--out", str(tmp_path / "views.png")]) == 2
    assert "could not be written (Is a directory); give another file" in capsys.readouterr().err
