"""The data sets that torchvision knows by name, from its files on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.base import ArraySource, JointSource, Source

NAMED = ("CIFAR10", "CIFAR100", "STL10", "FashionMNIST")
_STL10_SIDE = 96


class NamedSplits(NamedTuple):
    """The official training and test images."""

    train: Source
    test: Source


def open_named(name: str, root: Path, *, download: bool = False) -> NamedSplits:
    """Open the data set `name` of NAMED in `root`, torchvision's folder for it; RGB, including FashionMNIST.

    In `train` of STL10, the 100 000 unlabeled images follow the 5000 labeled ones. With `download`, missing files are
    downloaded; otherwise they are a DataError, as are damaged ones.
    """
    import torchvision

    kind = getattr(torchvision.datasets, name)
    by_split = {"split": "train"}, {"split": "test"}
    by_flag = {"train": True}, {"train": False}
    try:
        train, test = (
            kind(os.fspath(root), download=download, **split) for split in (by_split if name == "STL10" else by_flag)
        )
        splits = NamedSplits(_source(f"{name} train", train), _source(f"{name} test", test))
        if name != "STL10":
            return splits
        unlabeled = _UnlabeledSTL10(os.path.join(root, kind.base_folder, kind.train_list[2][0]))
        return splits._replace(train=JointSource(splits.train, unlabeled))
    except (RuntimeError, OSError, ValueError, AssertionError) as error:  # A damaged file can fail in any way
        remedy = (
            "check --data.root and the network"
            if download
            else "change --data.root or allow the download with --data.download"
        )
        raise DataError(
            f"{name} could not be read from {root} in torchvision's format ({' '.join(str(error).split())}); {remedy}"
        ) from error


class _UnlabeledSTL10(ArraySource):
    """Memory map, not a copy: the file has 2.7 GB, and every worker process opens it."""

    def __init__(self, path: str) -> None:
        # Copy-on-write, since torch does not accept read-only memory; the file is stored column by column
        pixels = np.asarray(np.memmap(path, np.uint8, mode="c")).reshape(-1, 3, _STL10_SIDE, _STL10_SIDE)
        super().__init__("STL10 unlabeled", pixels.transpose(0, 3, 2, 1), np.full(len(pixels), -1), ())
        self._path = path

    def __reduce__(self) -> tuple[type[_UnlabeledSTL10], tuple[str]]:
        return type(self), (self._path,)


def _source(name: str, dataset: Any) -> ArraySource:
    images = np.asarray(dataset.data)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    elif images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    # STL10's file of class names may be missing
    classes = tuple(getattr(dataset, "classes", map(str, range(10))))
    return ArraySource(name, images, np.asarray(labels, np.int64), classes)
