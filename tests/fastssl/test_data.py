"""Training and test images of a configuration, from every kind of --data.root, without quarantined ones."""

from __future__ import annotations

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.commands.pretrain import parse
from fastssl.config import from_json, to_json
from fastssl.data import open_splits
from fastssl.errors import ConfigError
from fastssl.observe import screen
from fastssl_pipelines import ArraySource, DataError
from fastssl_pipelines.sources.torchvision_sets import NamedSplits


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Ten training and two test images of cat and dog; the first test image has the name of a training image."""
    for name in ("cat", "dog"):
        for number in range(10):
            write(tmp_path / "data" / "train" / name / f"{name}{number}.png", number)
        for number in (0, 11):
            write(tmp_path / "data" / "val" / name / f"{name}{number}.png", number)
    return tmp_path / "data"


def pack(folder):
    """Replace a folder of class folders by a .tar file."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.add(path, path.relative_to(folder))
    shutil.rmtree(folder)


def listed(folder):
    """Write a list file and rename the folder, so that only the list leads to the images."""
    moved = folder.rename(folder.with_name(f"images of {folder.name}"))
    lines = [f"{path.relative_to(folder.parent)}\t{path.parent.name}\n" for path in sorted(moved.rglob("*.png"))]
    folder.with_suffix(".txt").write_text("".join(lines))


def shards(folder):
    """Replace a folder of class folders by a folder of .tar files."""
    pack(folder)
    folder.mkdir()
    folder.with_suffix(".tar").rename(folder / "part-0.tar")


def splits(root, *options):
    return open_splits(parse(["mocov2-cifar10", "--data.root", str(root), *options]))


@pytest.mark.parametrize("form", [None, pack, listed, shards])
def test_every_form_of_a_split(root, form, notes):
    for name in ("train", "val"):
        if form:
            form(root / name)
    train, test = splits(root)
    assert train.labels.tolist() == [0] * 10 + [1] * 10
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.classes == test.classes == ("cat", "dog")
    assert notes.take() == []


def test_splits_of_different_classes_are_refused(root):
    write(root / "val" / "bird" / "1.png")
    write(root / "val" / "ape" / "1.png")
    message = r"val has 4 classes and .*train 2, and the training images have none called ape, bird; .*--data\.root"
    with pytest.raises(ConfigError, match=message):
        splits(root)


def test_test_images_are_labeled_by_the_names_of_the_training_classes(root, notes):
    shutil.rmtree(root / "val" / "cat")
    for number in (0, 1):
        write(root / "train" / "ape" / f"{number}.png")
    train, test = splits(root)
    assert train.classes == test.classes == ("ape", "cat", "dog")
    assert test.labels.tolist() == [2, 2]
    (note,) = notes.take()
    assert "val has no images of 2 of the training classes: ape, cat" in note


@pytest.mark.parametrize(
    ("train", "test"),
    [("training", "validation"), ("Train", "Test"), ("TRAIN", "valid"), ("Training", "VAL")],
)
@pytest.mark.parametrize("form", [None, pack, listed])
def test_splits_may_have_other_names(root, train, test, form, notes):
    for old, new in (("train", train), ("val", test)):
        (root / old).rename(root / new)
        if form:
            form(root / new)
    found = splits(root)
    assert (len(found.train), len(found.test)) == (20, 4)
    assert notes.take() == []


def test_unused_test_splits_are_reported(root, notes):
    shutil.copytree(root / "val", root / "test")
    (root / "annotations").mkdir()
    _, test = splits(root)
    assert test.name == str(root / "test")
    (note,) = notes.take()
    assert "only train and test are used; these folders are not: annotations, val" in note


def test_classes_with_the_names_of_splits_are_reported(root, notes):
    (root / "train").rename(root / "test")
    train, _ = splits(root)
    assert train.classes == ("test", "val")
    (note,) = notes.take()
    assert "have the names of splits, test, val; " in note


def test_files_that_are_not_images_are_reported(root, notes):
    for number in range(3):
        (root / "train" / "cat" / f"{number}.webm").touch()
    for _ in range(2):  # The second time from the cached index
        splits(root)
        (note,) = notes.take()
        assert "3 files are not used: 3 .webm" in note


def test_quarantined_images_are_left_out_of_training_and_test(root, tmp_path, notes):
    path = tmp_path / "bad.txt"
    path.write_text("cat/cat0.png\ndog3.png\nnone.png\ndog11.png\n")
    train, test = splits(root, "--data.quarantine", str(path))
    names = [[source.name_of(i) for i in range(len(source))] for source in (train, test)]
    assert not {"cat/cat0.png", "dog/dog3.png", "dog/dog11.png"} & {*names[0], *names[1]}
    assert [len(part) for part in names] == [18, 2]
    assert train.labels.tolist() == [0] * 9 + [1] * 9
    (note,) = notes.take()
    assert "bad.txt: 1 of its names match no image, among them none.png" in note


def test_an_empty_quarantine_changes_nothing(root, tmp_path, notes):
    (tmp_path / "bad.txt").write_text("\n")
    train, test = splits(root, "--data.quarantine", str(tmp_path / "bad.txt"))
    assert (len(train), len(test), notes.take()) == (20, 4, [])


def test_quarantine_keeps_unlabeled_images_out_too(root, tmp_path):
    for number in range(3):
        write(tmp_path / "more" / f"{number}.png")
    (tmp_path / "bad.txt").write_text("1.png\ncat/cat5.png\n")
    options = ["--data.unlabeled", str(tmp_path / "more"), "--data.quarantine", str(tmp_path / "bad.txt")]
    train, _ = splits(root, *options)
    assert train.labels.tolist() == [0] * 9 + [1] * 10 + [-1] * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("x.png\n", r"x\.png names both cat/x\.png and dog/x\.png .*--data\.quarantine"),
        (None, r"cannot be read .*--data\.quarantine must be a text file"),
        ("\n".join(f"{name}{n}.png" for name in ("cat", "dog") for n in (0, 11)), r"all 4 images .*--data\.quarantine"),
    ],
    ids=["ambiguous", "missing", "everything"],
)
def test_a_wrong_quarantine_is_explained(root, tmp_path, names, message):
    for name in ("cat", "dog"):
        write(root / "train" / name / "x.png")
    if names is not None:
        (tmp_path / "bad.txt").write_text(names)
    with pytest.raises(DataError, match=message) as raised:
        splits(root, "--data.quarantine", str(tmp_path / "bad.txt"))
    assert "\n" not in str(raised.value)


def test_a_file_without_a_header_does_not_stop_the_others(root):
    (root / "train" / "cat" / "cat4.png").write_bytes(b"no image")
    train, _ = splits(root)
    assert (len(train), list(train.defects)) == (20, [4])
    held_out_train, held_out_test = splits(root / "train")
    assert len(held_out_train.defects) + len(held_out_test.defects) == 1


def test_a_cache_that_cannot_be_written_is_reported_once(root, tmp_path, monkeypatch, notes):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "file" / "cache"))
    splits(root / "train")
    assert ["could not be kept in" in note for note in notes.take()] == [True]


def test_a_named_data_set(tmp_path, monkeypatch):
    source = ArraySource("some", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, ("a", "b"))
    asked = []

    def open_named(*arguments, **options):
        asked.append((arguments, options))
        return NamedSplits(source, source)

    monkeypatch.setattr("fastssl.data.open_named", open_named)
    assert splits(tmp_path, "--data.dataset", "CIFAR100") == (source, source)
    splits(tmp_path, "--data.dataset", "STL10", "--data.download")
    assert asked == [(("CIFAR100", tmp_path), {"download": False}), (("STL10", tmp_path), {"download": True})]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data.dataset CIFAR10", ["--data.dataset CIFAR10", "--data.root"]),
        ("--data.dataset CIFAR11 --data.root x", ["CIFAR11", "CIFAR10"]),
        ("--data.download --data.root x", ["--data.download", "--data.dataset"]),
        ("--data.quarantine x", ["--data.quarantine x", "--data.root"]),
        ("--data.dataset CIFAR10 --data.root {root}", ["CIFAR10 could not be read", "--data.download"]),
        ("--data.root {root}/none", ["{root}/none", "--data.root"]),
    ],
)
def test_wrong_options_are_one_sentence(root, capsys, options, words):
    assert main(["pretrain", "mocov2-cifar10", *options.format(root=root).split()]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word.format(root=root) in error


def test_the_options_survive_json_and_another_folder(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    options = "--data.root data --data.quarantine bad.txt --data.dataset STL10 --data.download"
    config = parse(["mocov2-cifar10", *options.split()])
    assert from_json(to_json(config)) == config
    data = config.data.absolute()
    assert (data.root, data.quarantine, data.dataset, data.download) == (root, root.parent / "bad.txt", "STL10", True)


def test_a_bar_shows_any_name(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    with screen.DelayedProgressBar() as bar:
        now[0] = 1.5
        bar("reading caf\udce9\n[bold]\x1b[31m.jpg", 3, 10)
    assert r"caf\xe9\n[bold]\x1b[31m.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(("waited", "shown"), [(0.5, False), (1.5, True)])
def test_a_bar_appears_after_a_second(monkeypatch, capsys, waited, shown):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    with screen.DelayedProgressBar() as bar:
        now[0] = waited
        bar("reading image headers", 3, 10)
    printed = capsys.readouterr()
    assert ("reading image headers" in printed.err) == bool(printed.err) == shown
    assert printed.out == ""
