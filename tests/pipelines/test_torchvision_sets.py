"""torchvision's data sets, from small files in the official formats."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
from typing import get_type_hints

import numpy as np
import pytest
import torchvision.datasets as known

from fastssl.config import DataConfig
from fastssl_pipelines import DataError
from fastssl_pipelines.sources.torchvision_sets import NAMED, open_named

RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
STL = RNG.integers(0, 256, (9, 3, 96, 96), dtype=np.uint8)  # Channel, column, row
GRAY = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
STL_FILES = ("train_X.bin", "train_y.bin", "unlabeled_X.bin", "test_X.bin", "test_y.bin")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    for module in (known.cifar, known.stl10, known.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


def cifar(root, monkeypatch, name):
    kind = getattr(known, name)
    folder = root / kind.base_folder
    folder.mkdir()
    key = "fine_labels" if name == "CIFAR100" else "labels"
    train = [entry[0] for entry in kind.train_list]
    rows = np.array_split(np.arange(10), len(train))
    for file, part in zip((*train, "test_batch" if name == "CIFAR10" else "test"), (*rows, [10, 11]), strict=True):
        batch = {"data": CIFAR[part].reshape(len(part), -1), key: [int(i) % 10 for i in part]}
        (folder / file).write_bytes(pickle.dumps(batch))
    names = [f"class {i}" for i in range(10)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "train_list", [[file, md5(folder / file)] for file in train])
    monkeypatch.setattr(kind, "test_list", [[entry[0], md5(folder / entry[0])] for entry in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    return folder


def stl10(root, monkeypatch):
    folder = root / "stl10_binary"
    folder.mkdir()
    labels = np.arange(1, 11, dtype=np.uint8)
    for file, content in zip(STL_FILES, (STL[:3], labels[:3], STL[3:7], STL[7:], labels[8:]), strict=True):
        content.tofile(folder / file)
    (folder / "class_names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    (folder / "fold_indices.txt").write_text("0 1\n" * 10)
    monkeypatch.setattr(known.STL10, "train_list", [[file, md5(folder / file)] for file in STL_FILES[:3]])
    monkeypatch.setattr(known.STL10, "test_list", [[file, md5(folder / file)] for file in STL_FILES[3:]])
    return folder


def fashion_mnist(root):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, rows in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        images, labels = GRAY[rows], np.arange(10, dtype=np.uint8)[rows]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape) + images.tobytes()
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">BBBBI", 0, 0, 8, 1, len(labels)) + labels.tobytes()
        )
    return folder


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, no_network, name):
    cifar(tmp_path, monkeypatch, name)
    train, test = open_named(name, tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == (list(range(10)), [0, 1])
    assert train.classes == test.classes == tuple(f"class {i}" for i in range(10))
    for source, rows in ((train, range(10)), (test, (10, 11))):
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(source.pixels(number), CIFAR[row].transpose(1, 2, 0))
    assert np.shares_memory(train.pixels(0), train.pixels(1).base)  # No copies


def test_stl10_has_its_unlabeled_images_last(tmp_path, monkeypatch, no_network):
    stl10(tmp_path, monkeypatch)
    train, test = open_named("STL10", tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, -1, -1, -1, -1], [8, 9])
    assert train.classes == tuple(f"class {i}" for i in range(10))
    copy = pickle.loads(pickle.dumps(train))
    for source, rows in ((train, range(7)), (copy, range(7)), (test, (7, 8))):
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(source.pixels(number), STL[row].transpose(2, 1, 0))


def test_a_worker_process_gets_no_copy_of_the_unlabeled_images(tmp_path, monkeypatch, no_network):
    folder = stl10(tmp_path, monkeypatch)
    with_unlabeled, _ = open_named("STL10", tmp_path)
    assert len(pickle.dumps(with_unlabeled)) < 3 * 3 * 96 * 96 + 4000 < (folder / "unlabeled_X.bin").stat().st_size


def test_fashion_mnist_becomes_rgb(tmp_path, no_network):
    fashion_mnist(tmp_path)
    train, test = open_named("FashionMNIST", tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, 3, 4], [5, 6])
    assert train.classes[9] == "Ankle boot"
    for source, rows in ((train, range(5)), (test, (5, 6))):
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(source.pixels(number), np.repeat(GRAY[row][:, :, None], 3, axis=2))


@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_downloaded_unless_allowed(tmp_path, no_network, name):
    with pytest.raises(DataError, match=rf"{name} could not be read from .*--data\.root .*--data\.download") as raised:
        open_named(name, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", NAMED)
def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise RuntimeError("no network\nat all")

    for module in (known.cifar, known.stl10, known.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=rf"{name} could not be read .*no network.*at all.*the network") as raised:
        open_named(name, tmp_path, download=True)
    assert "\n" not in str(raised.value)


def test_an_allowed_download_fetches_the_missing_files(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    cifar(made, monkeypatch, "CIFAR10")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(made / "cifar-10-batches-py", "cifar-10-batches-py")
    asked = []

    def fetch(url, root, **_):
        asked.append(url)
        with tarfile.open(fileobj=io.BytesIO(packed.getvalue())) as archive:
            archive.extractall(root, filter="data")

    monkeypatch.setattr(known.cifar, "download_and_extract_archive", fetch)
    train, _ = open_named("CIFAR10", tmp_path / "new", download=True)
    assert len(train) == 10
    assert set(asked) == {known.CIFAR10.url}
    asked.clear()
    open_named("CIFAR10", tmp_path / "new", download=True)
    assert asked == []


def test_damaged_files_are_explained(tmp_path, monkeypatch, no_network):
    batch = cifar(tmp_path, monkeypatch, "CIFAR10") / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    images = fashion_mnist(tmp_path) / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    for name in ("CIFAR10", "FashionMNIST"):
        with pytest.raises(DataError, match=rf"{name} could not be read from"):
            open_named(name, tmp_path)


def test_the_option_offers_the_names():
    assert str(NAMED).strip("()") in str(get_type_hints(DataConfig)["dataset"])
