"""Images in tar shards, read through a table of offsets."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.files import open_regular, raise_if_machine_error
from fastssl_pipelines.sources.index import IndexedSource
from fastssl_pipelines.sources.listing import (
    SUFFIXES_SHOWN,
    THREADS,
    Ignored,
    Listing,
    Progress,
    file_signatures,
    is_hidden,
    is_image,
    numbered,
    suffixes_of,
    total_of,
)
from fastssl_pipelines.sources.packed_strings import PackedStrings
from fastssl_pipelines.sources.shard_labels import (
    FROM_NOTHING,
    LABEL_AT_MOST_BYTES,
    class_index,
    classes_of,
    is_label,
    one_source,
)
from fastssl_pipelines.sources.tar import Member, OpenFiles, members, read_stretch

SHARD_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = tuple(f"{tar}{end}" for tar in (".tar.", ".t") for end in ("gz", "bz2", "xz", "zst", "lz4", "Z"))


class _Shard(NamedTuple):
    """Content of a shard: name, offset, length and (origin of the class, class) of every image."""

    names: list[str]
    offsets: list[int]
    lengths: list[int]
    classes: list[tuple[str, str]]
    ignored: Ignored


class TarShards(IndexedSource):
    """Images in tar files, listed by `list_shards`; `progress` is called while headers are read."""

    def __init__(self, root: str | os.PathLike[str], *, labeled: bool = True, progress: Progress | None = None) -> None:
        super().__init__(
            root,
            lambda known: list_shards(Path(root), labeled=labeled, known=known, progress=progress),
            labeled=labeled,
            progress=progress,
        )


def list_shards(
    root: Path, *, labeled: bool = True, known: Listing | None = None, progress: Progress | None = None
) -> Listing:
    """List the images in the .tar files directly in the folder `root`, or in `root` itself if it is one.

    The class of an image is the integer in KEY.cls next to KEY.jpg (see `classes_of`; -1 is unknown), else its folder,
    else the name of its shard if that is a WordNet id (like ImageNet's n01440764.tar), else unknown (-1); always
    unknown if `labeled` is False. The name of an image is SHARD/MEMBER. Shards that did not change since the earlier
    listing `known` are not scanned.
    DataError for a shard that is compressed or cut short, that has no images or a name twice, and for classes of
    mixed origin.
    """
    option = "--data.root" if labeled else "--data.unlabeled"
    folder = root if root.is_dir() else root.parent
    shards = _shards_in(root, option)
    files = PackedStrings.of(shards)
    # Taken before the scan, so that a change during the scan is noticed
    signatures = file_signatures(os.fspath(folder), files)
    if known is not None and known.files == files and np.array_equal(known.signatures, signatures):
        archives = OpenFiles(os.fspath(folder), files)
        return replace(known, name=os.fspath(root), option=option, folder=os.fspath(folder), archives=archives)
    earlier = _rows_of_unchanged(known, shards, signatures)

    def content(index: int) -> _Shard:
        name = shards[index]
        if known is not None and name in earlier:
            return _from_listing(known, *earlier[name])
        return _scan(folder / name, option, labeled)

    contents = []
    with ThreadPoolExecutor(THREADS) as pool:
        for done, shard in enumerate(pool.map(content, range(len(shards))), 1):
            contents.append(shard)
            if progress:
                progress("scanning shards", done, len(shards))
    return _listing(root, option, files, signatures, contents, labeled=labeled)


def _listing(
    root: Path,
    option: str,
    files: PackedStrings,
    signatures: NDArray[np.int64],
    contents: list[_Shard],
    *,
    labeled: bool,
) -> Listing:
    given = [each for shard in contents for each in shard.classes]
    if not given:
        raise DataError(f"the shards of {root} hold no image file ({SUFFIXES_SHOWN}); check {option}")
    names = PackedStrings.of(name for shard in contents for name in shard.names)
    labeled_by = one_source(given, names, root, option) if labeled else FROM_NOTHING
    labels, classes = np.full(len(given), -1, np.int64), tuple[str, ...]()
    if labeled_by != FROM_NOTHING:
        known = np.array([name != "" for _, name in given])
        labels[known], classes = numbered([name for _, name in given if name])
    folder = os.fspath(root if root.is_dir() else root.parent)
    return Listing(
        name=os.fspath(root),
        option=option,
        folder=folder,
        files=files,
        signatures=signatures,
        names=names,
        file=np.repeat(np.arange(len(contents), dtype=np.int32), [len(shard.names) for shard in contents]),
        offsets=np.array([offset for shard in contents for offset in shard.offsets], np.int64),
        lengths=np.array([length for shard in contents for length in shard.lengths], np.int64),
        labels=labels,
        classes=classes,
        labeled_by=labeled_by,
        archives=OpenFiles(folder, files),
        ignored=total_of(shard.ignored for shard in contents),
        ignored_in=tuple(shard.ignored for shard in contents),
    )


def _shards_in(root: Path, option: str) -> list[str]:
    try:
        names = sorted(os.listdir(root)) if os.path.isdir(root) else [root.name]
    except OSError as error:
        raise DataError(f"the folder {root} cannot be read ({error.strerror}); check {option}") from None
    names = [name for name in names if not is_hidden(name)]
    if packed := [name for name in names if name.endswith(COMPRESSED_SUFFIXES)]:
        raise DataError(
            f"{packed[0]} in {root} is compressed, so single images cannot be read from it; decompress it, since "
            f"{option} takes .tar files only"
        )
    return [name for name in names if name.endswith(SHARD_SUFFIX)]


def _scan(path: Path, option: str, labeled: bool) -> _Shard:
    """Read the headers of all members and, for labels, the .cls files; DataError for a shard without its end."""
    images: dict[str, Member] = {}
    indices: dict[str, str] = {}
    others: list[str] = []
    try:
        with open_regular(path) as file:
            for member in members(file.fileno()):
                name = posixpath.normpath(member.name)
                if member.is_folder or any(map(is_hidden, name.split("/"))):
                    continue
                if not member.is_file:
                    others.append(f"{name} link")
                elif is_label(name):
                    if labeled:
                        _require_new(name, indices, path, option)
                        content = read_stretch(file.fileno(), member.offset, min(member.size, LABEL_AT_MOST_BYTES + 1))
                        indices[name] = class_index(content, f"{path}/{name}", option)
                elif is_image(name):
                    _require_new(name, images, path, option)
                    images[name] = member
                else:
                    others.append(name)
    except DataError:
        raise
    except ValueError as error:
        raise _damaged(path, len(images), str(error), option) from None
    except OSError as error:
        raise_if_machine_error(error, path)
        raise DataError(f"{path} cannot be read ({error.strerror}); check {option}") from None
    return _Shard(
        names=[f"{path.name}/{name}" for name in images],
        offsets=[member.offset for member in images.values()],
        lengths=[member.size for member in images.values()],
        classes=classes_of(list(images), indices, path, option),
        ignored=suffixes_of(others),
    )


def _require_new(name: str, earlier: Container[str], path: Path, option: str) -> None:
    if name in earlier:
        raise DataError(
            f"{path} holds {name} twice, so it is unclear which one counts; create the shard for {option} again"
        )


def _damaged(path: Path, images: int, reason: str, option: str) -> DataError:
    return DataError(
        f"the shard {path} is cut short or damaged ({reason}, after {images} images); "
        f"copy or download it again, or remove it from {option}"
    )


def _rows_of_unchanged(
    known: Listing | None, shards: list[str], signatures: NDArray[np.int64]
) -> dict[str, tuple[int, slice]]:
    """For each unchanged shard, its index and the slice of its images in the earlier listing."""
    if known is None:
        return {}
    first = np.searchsorted(known.file, np.arange(len(known.files) + 1))
    earlier = {name: index for index, name in enumerate(known.files)}
    return {
        name: (earlier[name], slice(int(first[earlier[name]]), int(first[earlier[name] + 1])))
        for name, signature in zip(shards, signatures, strict=True)
        if name in earlier and (known.signatures[earlier[name]] == signature).all()
    }


def _from_listing(known: Listing, index: int, rows: slice) -> _Shard:
    labels = known.labels[rows].tolist()
    return _Shard(
        names=[known.names[row] for row in range(rows.start, rows.stop)],
        offsets=known.offsets[rows].tolist(),
        lengths=known.lengths[rows].tolist(),
        classes=[(known.labeled_by, known.classes[label] if label >= 0 else "") for label in labels],
        ignored=known.ignored_in[index],
    )
