"""The training and test images that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl_pipelines.labels import listed_labels
from fastssl_pipelines.pictures import picture_source
from fastssl_pipelines.plan import partial_labels
from fastssl_pipelines.sources import ImageFolder, JointSource, Source, Subset

HELD_OUT = 10  # without a test split, every tenth image of a class is kept from training and used as one


class Splits(NamedTuple):
    """Images to train on, the unlabelled ones last, and images to test on, with the same classes."""

    train: Source
    test: Source


def open_splits(config: Config) -> Splits:
    """The images of --data.root, or the embedded pictures where the preset has some and no root is given.

    Those of --data.unlabelled stand behind the training images.
    """
    splits = _labelled_splits(config)
    root, folder = config.data.root, config.data.unlabelled
    if root is None or folder is None:
        return splits
    used = [path for path in (root / "train", _test_root(root)) if path] if (root / "train").is_dir() else [root]
    for path in used:
        if _overlap(path, folder):
            raise ConfigError(
                f"--data.unlabelled {folder} and {path}, which --data.root names, lie in one another, so images would "
                "count twice; give a folder apart from it"
            )
    return splits._replace(train=JointSource(splits.train, ImageFolder(folder, labelled=False)))


def known_labels(config: Config, source: Source, warn: Callable[[str], object]) -> NDArray[np.int64]:
    """The labels that the method may see, int64 [n], -1 = unknown: by --data.label-list, else --data.label-fraction.

    `warn` is called with a sentence where some names of the list are not found.
    """
    path = config.data.label_list
    if path is None:
        return partial_labels(source.labels, config.data.label_fraction, config.seed)
    labels, unmatched = listed_labels(source, path)
    if unmatched:
        warn(f"{path}: {len(unmatched)} of its names belong to no labelled training image, as {unmatched[0]}")
    return labels


def _labelled_splits(config: Config) -> Splits:
    root = config.data.root
    if root is None:
        if not config.data.pictures:
            raise ConfigError(
                f"preset {config.preset} trains on your images and no folder was given; "
                "add --data.root DIR, or run `fastssl pretrain` alone for the embedded pictures"
            )
        count = config.data.pictures
        return Splits(
            train=picture_source(count, seed=config.seed),
            test=picture_source(max(1, count // 5), seed=config.seed, stream=1),
        )
    if not (root / "train").is_dir():
        return _hold_out(ImageFolder(root))
    train, test_root = ImageFolder(root / "train"), _test_root(root)
    if test_root is None:
        return _hold_out(train)
    test = ImageFolder(test_root)
    if test.classes != train.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"{root / 'train'} and {test_root} under --data.root must hold the same class folders; "
            f"only one of them has {', '.join(differing[:5])}"
        )
    return Splits(train, test)


def _test_root(root: Path) -> Path | None:
    return next((root / name for name in ("test", "val") if (root / name).is_dir()), None)


def _hold_out(source: Source) -> Splits:
    order = np.argsort(source.labels, kind="stable")
    held = np.zeros(len(source), bool)
    held[order[min(HELD_OUT, len(order)) - 1 :: HELD_OUT]] = True  # of a handful of images, one
    return Splits(Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held)))


def _overlap(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
