"""Training and test images of a configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl.observe.screen import DelayedProgressBar
from fastssl_pipelines.labels import listed_labels, quarantine_list, without
from fastssl_pipelines.names import printable
from fastssl_pipelines.plan import partial_labels
from fastssl_pipelines.sources.base import JointSource, Source, Subset
from fastssl_pipelines.sources.listing import Progress, is_hidden
from fastssl_pipelines.sources.open import open_source
from fastssl_pipelines.sources.shards import SHARD_SUFFIX
from fastssl_pipelines.sources.torchvision_sets import open_named
from fastssl_pipelines.synthetic.shapes import picture_source

_log = logging.getLogger(__name__)

_SHOWN = 5  # Names listed in a message
HELD_OUT = 10  # Without a test split, every tenth image of a class is held out as one


# The first name that exists is used.
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "val", "valid", "validation")


class Splits(NamedTuple):
    """Training images, the unlabeled ones last, and test images with the same classes."""

    train: Source
    test: Source


def open_splits(config: Config) -> Splits:
    """Open the images of --data.root or --data.dataset, or the embedded pictures if no root is given.

    Those of --data.unlabeled follow the training images; those of --data.quarantine are left out. A progress bar
    appears if building the index takes long. What may be a mistake is logged as a warning.
    """
    with DelayedProgressBar() as progress:
        splits = _labeled_splits(config, progress)
        if config.data.unlabeled is not None:
            splits = splits._replace(train=JointSource(splits.train, _unlabeled(config, progress)))
    if config.data.quarantine is not None:
        splits = _without_quarantined(splits, config.data.quarantine)
    return splits


def split_roots(root: Path) -> tuple[Path, ...]:
    """Paths of the training images and, if there is a test split, the test images under --data.root."""
    train = _split(root, _TRAIN_NAMES)
    return tuple(filter(None, (train, _split(root, _TEST_NAMES)))) if train else (root,)


def _split(root: Path, names: tuple[str, ...]) -> Path | None:
    """Folder, shard or list file with the first of the names that exists, in upper or lower case."""
    try:
        entries = sorted(os.listdir(root), reverse=True)  # Lower case first
    except OSError:  # Opening it will raise the error
        return None
    for name in names:
        for suffix, is_there in (("", os.path.isdir), (SHARD_SUFFIX, os.path.isfile), (".txt", os.path.isfile)):
            for entry in entries:
                if entry.endswith(suffix) and entry.removesuffix(suffix).lower() == name and is_there(root / entry):
                    return root / entry
    return None


def known_labels(config: Config, source: Source) -> NDArray[np.int64]:
    """Labels that the method may see, int64 [n], -1 = unknown: from --data.label-list, else --data.label-fraction.

    Warns where names of the list are not found, and where the labels teach nothing.
    """
    path = config.data.label_list
    if path is None:
        labels = partial_labels(source.labels, config.data.label_fraction, config.seed)
    else:
        labels, unmatched = listed_labels(source, path)
        if unmatched:
            _warn(f"{path}: {len(unmatched)} of its names match no labeled training image, among them {unmatched[0]}")
    known = np.unique(labels[labels >= 0])
    if len(known) == 1 and METHODS[config.method.name].uses_labels:
        _warn(
            f"all known labels are one class, {source.classes[known[0]]}, so its images have no negatives among each "
            f"other, and without other images the loss is 0; {config.method.name} needs labels of two classes"
        )
    return labels


def _labeled_splits(config: Config, progress: Progress) -> Splits:
    data = config.data
    if data.root is None:
        if not data.pictures:
            raise ConfigError(
                f"preset {config.preset} trains on your images and no folder was given; "
                "add --data.root DIR, or run `fastssl pretrain` alone for the embedded pictures"
            )
        return Splits(
            train=picture_source(data.pictures, seed=config.seed),
            test=picture_source(max(1, data.pictures // 5), seed=config.seed, stream=1),
        )
    if data.dataset is not None:
        return Splits(*open_named(data.dataset, data.root, download=data.download))
    roots = split_roots(data.root)
    train = open_source(roots[0], progress=progress)
    _warn_of_layout(data.root, roots, train)
    if len(roots) == 1:
        return _hold_out(train)
    test = open_source(roots[1], progress=progress)
    _align_labels(train, test)
    return Splits(train, test)


def _warn_of_layout(root: Path, roots: tuple[Path, ...], train: Source) -> None:
    """Warn of unused folders next to the splits, and of classes with the names of splits."""
    if roots[0] != root and roots[0].is_dir():
        others = [path.name for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
        if unused := sorted(set(others) - {path.name for path in roots}):
            taken = " and ".join(path.name for path in roots) + (" are" if len(roots) > 1 else " is")
            _warn(f"{root}: only {taken} used; these folders are not: {_some(unused)}")
    if train.classes and all(name.lower() in _TRAIN_NAMES + _TEST_NAMES for name in train.classes):
        _warn(
            f"the classes of {train.name} have the names of splits, {_some(train.classes)}; if they are splits, rename "
            "the folder of the training images to train"
        )


def _align_labels(train: Source, test: Source) -> None:
    """Relabel the test images by the training classes; ConfigError for a class without training images.

    Warns of classes without test images, which are allowed.
    """
    if test.classes == train.classes:
        return
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise ConfigError(
            f"{test.name} has {len(test.classes)} classes and {train.name} {len(train.classes)}, and the training "
            f"images have none called {_some(unknown)}; the test images under --data.root must be of training classes"
        )
    label_of = {name: label for label, name in enumerate(train.classes)}
    # The last entry is for label -1
    renumbered = np.array([*(label_of[name] for name in test.classes), -1], np.int64)
    without_test = [name for name in train.classes if name not in set(test.classes)]
    test.labels, test.classes = renumbered[test.labels], train.classes
    _warn(f"{test.name} has no images of {len(without_test)} of the training classes: {_some(without_test)}")


def _warn(message: str) -> None:
    _log.warning(printable(message))


def _some(names: Sequence[str]) -> str:
    """First few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unlabeled(config: Config, progress: Progress) -> Source:
    root, more = config.data.root, config.data.unlabeled
    assert root is not None
    assert more is not None
    # A list may name files anywhere
    is_list = more.is_file() and more.suffix != SHARD_SUFFIX
    if config.data.dataset is None and not is_list:
        for path in split_roots(root):
            if _overlap(path, more):
                raise ConfigError(
                    f"--data.unlabeled {more} and {path}, which --data.root names, overlap, so images "
                    "would count twice; give a separate folder"
                )
    return open_source(more, labeled=False, progress=progress)


def _without_quarantined(splits: Splits, path: Path) -> Splits:
    names = quarantine_list(path)
    train, test = (without(source, names) for source in splits)
    if unmatched := sorted(names - train.matched - test.matched):
        _warn(f"{path}: {len(unmatched)} of its names match no image, among them {unmatched[0]}")
    return Splits(train.source, test.source)


def _hold_out(source: Source) -> Splits:
    order = np.argsort(source.labels, kind="stable")
    held = np.zeros(len(source), bool)
    held[order[min(HELD_OUT, len(order)) - 1 :: HELD_OUT]] = True  # At least one, even of a handful of images
    train, test = Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))
    return Splits(train, test)


def _overlap(one: Path, other: Path) -> bool:
    one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))  # Path.resolve raises for a link to itself
    return one.is_relative_to(other) or other.is_relative_to(one)
