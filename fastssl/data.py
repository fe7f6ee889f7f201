"""The training and test images that a configuration names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl.observe.screen import DelayedProgressBar
from fastssl_pipelines.labels import listed_labels, quarantine_list, without
from fastssl_pipelines.plan import partial_labels
from fastssl_pipelines.sources.base import JointSource, Source, Subset
from fastssl_pipelines.sources.listing import Progress, is_hidden
from fastssl_pipelines.sources.open import open_source
from fastssl_pipelines.sources.shards import SHARD_SUFFIX
from fastssl_pipelines.sources.torchvision_sets import open_named
from fastssl_pipelines.synthetic.shapes import picture_source

_SHOWN = 5  # names in a sentence
HELD_OUT = 10  # without a test split, every tenth image of a class is kept from training and used as one


# The first that is there is taken.
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "val", "valid", "validation")


class Splits(NamedTuple):
    """Images to train on, the unlabeled ones last, and images to test on, with the same classes."""

    train: Source
    test: Source


def open_splits(config: Config) -> Splits:
    """The images of --data.root or --data.dataset, or the embedded pictures where no root is given.

    Those of --data.unlabeled stand behind the training images; those of --data.quarantine are left out. A bar shows
    how the index is made, where that takes long. Sentences for the user are in the `notes` of the sources.
    """
    with DelayedProgressBar() as progress:
        splits = _labeled_splits(config, progress)
        if config.data.unlabeled is not None:
            splits = splits._replace(train=JointSource(splits.train, _unlabeled(config, progress)))
    if config.data.quarantine is not None:
        splits = _without_quarantined(splits, config.data.quarantine)
    return splits


def split_roots(root: Path) -> tuple[Path, ...]:
    """Where under --data.root the training images are and, if there are any apart, the test images."""
    train = _split(root, _TRAIN_NAMES)
    return tuple(filter(None, (train, _split(root, _TEST_NAMES)))) if train else (root,)


def _split(root: Path, names: tuple[str, ...]) -> Path | None:
    """What is called by the first of the names that is there, in small or capital letters."""
    try:
        entries = sorted(os.listdir(root), reverse=True)  # small letters first
    except OSError:  # which opening it explains
        return None
    for name in names:
        for suffix, is_there in (("", os.path.isdir), (SHARD_SUFFIX, os.path.isfile), (".txt", os.path.isfile)):
            for entry in entries:
                if entry.endswith(suffix) and entry.removesuffix(suffix).lower() == name and is_there(root / entry):
                    return root / entry
    return None


def known_labels(config: Config, source: Source, warn: Callable[[str], object]) -> NDArray[np.int64]:
    """The labels that the method may see, int64 [n], -1 = unknown: by --data.label-list, else --data.label-fraction.

    `warn` is called with a sentence where some names of the list are not found, and where labels teach nothing.
    """
    path = config.data.label_list
    if path is None:
        labels = partial_labels(source.labels, config.data.label_fraction, config.seed)
    else:
        labels, unmatched = listed_labels(source, path)
        if unmatched:
            warn(f"{path}: {len(unmatched)} of its names belong to no labeled training image, as {unmatched[0]}")
    known = np.unique(labels[labels >= 0])
    if len(known) == 1 and METHODS[config.method.name].uses_labels:
        warn(
            f"all known labels are one class, {source.classes[known[0]]}, so its images have no negatives among one "
            f"another, and without other images the loss is 0; {config.method.name} needs labels of two classes"
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
    train.notes += tuple(_oddities(data.root, roots, train))
    if len(roots) == 1:
        return _hold_out(train)
    test = open_source(roots[1], progress=progress)
    _number_alike(train, test)
    return Splits(train, test)


def _oddities(root: Path, roots: tuple[Path, ...], train: Source) -> Iterator[str]:
    """Sentences about folders that are perhaps no splits, or splits that are taken for classes."""
    if roots[0] != root and roots[0].is_dir():
        beside = [path.name for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
        if unused := sorted(set(beside) - {path.name for path in roots}):
            taken = " and ".join(path.name for path in roots)
            yield f"{root}: {taken} is what is used; the folders beside it are not: {_some(unused)}"
    if train.classes and all(name.lower() in _TRAIN_NAMES + _TEST_NAMES for name in train.classes):
        yield (
            f"the classes of {train.name} are called {_some(train.classes)}, as splits are; if they are splits, call "
            "the folder of the training images train"
        )


def _number_alike(train: Source, test: Source) -> None:
    """Give the test images the labels that their classes have in training; ConfigError for a class that is not there.

    Classes without test images are allowed, with a note.
    """
    if test.classes == train.classes:
        return
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise ConfigError(
            f"{test.name} has {len(test.classes)} classes and {train.name} {len(train.classes)}, and the training "
            f"images have none called {_some(unknown)}; the test images under --data.root must be of training classes"
        )
    label_of = {name: label for label, name in enumerate(train.classes)}
    # the last one is for the label -1
    renumbered = np.array([*(label_of[name] for name in test.classes), -1], np.int64)
    without_test = [name for name in train.classes if name not in set(test.classes)]
    test.labels, test.classes = renumbered[test.labels], train.classes
    test.notes += (f"{test.name} has no images of {len(without_test)} of the training classes: {_some(without_test)}",)


def _some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unlabeled(config: Config, progress: Progress) -> Source:
    root, more = config.data.root, config.data.unlabeled
    assert root is not None
    assert more is not None
    # what a list names lies anywhere
    is_list = more.is_file() and more.suffix != SHARD_SUFFIX
    if config.data.dataset is None and not is_list:
        for path in split_roots(root):
            if _overlap(path, more):
                raise ConfigError(
                    f"--data.unlabeled {more} and {path}, which --data.root names, lie in one another, so images "
                    "would count twice; give a folder apart from it"
                )
    return open_source(more, labeled=False, progress=progress)


def _without_quarantined(splits: Splits, path: Path) -> Splits:
    names = quarantine_list(path)
    train, test = (without(source, names) for source in splits)
    if unmatched := sorted(names - train.matched - test.matched):
        train.source.notes += (f"{path}: {len(unmatched)} of its names belong to no image, as {unmatched[0]}",)
    return Splits(train.source, test.source)


def _hold_out(source: Source) -> Splits:
    order = np.argsort(source.labels, kind="stable")
    held = np.zeros(len(source), bool)
    held[order[min(HELD_OUT, len(order)) - 1 :: HELD_OUT]] = True  # of a handful of images, one
    train, test = Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))
    test.notes = ()  # the same, so said once
    return Splits(train, test)


def _overlap(one: Path, other: Path) -> bool:
    one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))  # resolve raises for a link to itself
    return one.is_relative_to(other) or other.is_relative_to(one)
