"""The training and test images that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.observe.progress import PatientBar
from fastssl_pipelines.labels import listed_labels
from fastssl_pipelines.listing import Progress
from fastssl_pipelines.named import open_named
from fastssl_pipelines.opening import open_source
from fastssl_pipelines.pictures import picture_source
from fastssl_pipelines.plan import partial_labels
from fastssl_pipelines.quarantine import quarantine_list, without
from fastssl_pipelines.shards import SHARD_SUFFIX
from fastssl_pipelines.sources import JointSource, Source, Subset

HELD_OUT = 10  # without a test split, every tenth image of a class is kept from training and used as one


class Splits(NamedTuple):
    """Images to train on, the unlabelled ones last, and images to test on, with the same classes."""

    train: Source
    test: Source


def open_splits(config: Config) -> Splits:
    """The images of --data.root or --data.dataset, or the embedded pictures where no root is given.

    Those of --data.unlabelled stand behind the training images; those of --data.quarantine are left out. A bar shows
    how the index is made, where that takes long. Sentences for the user are in the `notes` of the sources.
    """
    with PatientBar() as progress:
        splits = _labelled_splits(config, progress)
        if config.data.unlabelled is not None:
            splits = splits._replace(train=JointSource(splits.train, _unlabelled(config, progress)))
    if config.data.quarantine is not None:
        splits = _without_quarantined(splits, config.data.quarantine)
    return splits


def split_roots(root: Path) -> tuple[Path, ...]:
    """Where under --data.root the training images are and, if there are any apart, the test images."""

    def part(*names: str) -> Path | None:
        paths = [root / (name + suffix) for name in names for suffix in ("", ".tar", ".txt")]
        return next((path for path in paths if (path.is_file() if path.suffix else path.is_dir())), None)

    train = part("train")
    return tuple(filter(None, (train, part("test", "val")))) if train else (root,)


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


def _labelled_splits(config: Config, progress: Progress) -> Splits:
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
    if len(roots) == 1:
        return _hold_out(train)
    test = open_source(roots[1], progress=progress)
    if test.classes != train.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"{roots[0]} and {roots[1]} under --data.root must hold the same classes; "
            f"only one of them has {', '.join(differing[:5])}"
        )
    return Splits(train, test)


def _unlabelled(config: Config, progress: Progress) -> Source:
    root, more = config.data.root, config.data.unlabelled
    assert root is not None
    assert more is not None
    # what a list names lies anywhere
    is_list = more.is_file() and more.suffix != SHARD_SUFFIX
    if config.data.dataset is None and not is_list:
        for path in split_roots(root):
            if _overlap(path, more):
                raise ConfigError(
                    f"--data.unlabelled {more} and {path}, which --data.root names, lie in one another, so images "
                    "would count twice; give a folder apart from it"
                )
    return open_source(more, labelled=False, progress=progress)


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
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
