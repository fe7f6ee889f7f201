"""Tar files that hold images, read through a table of offsets."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.index import IndexedSource
from fastssl_pipelines.listing import SUFFIXES, THREADS, Listing, Names, OpenFiles, Progress, file_signatures, numbered

SHARD_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = tuple(f"{tar}{end}" for tar in (".tar.", ".t") for end in ("gz", "bz2", "xz", "zst", "lz4", "Z"))
_WORDNET_ID = re.compile(r"n\d{8}")
_BLOCK = 512  # bytes; a block of zeros ends a tar file


class _Shard(NamedTuple):
    """What a shard holds: a name, offset, length and class (with what told it) for every image."""

    names: list[str]
    offsets: list[int]
    lengths: list[int]
    classes: list[tuple[str, str]]


class TarShards(IndexedSource):
    """The images in tar files, as `list_shards` finds them; `progress` is called while headers are read."""

    def __init__(
        self, root: str | os.PathLike[str], *, labelled: bool = True, progress: Progress | None = None
    ) -> None:
        super().__init__(
            root,
            lambda known: list_shards(Path(root), labelled=labelled, known=known, progress=progress),
            labelled=labelled,
            progress=progress,
        )


def list_shards(
    root: Path, *, labelled: bool = True, known: Listing | None = None, progress: Progress | None = None
) -> Listing:
    """The images in the .tar files directly in the folder `root`, or in `root` itself if it is one.

    The class of an image is the integer in KEY.cls beside KEY.jpg (as WebDataset writes it; KEY ends at the first
    dot), else the folder it lies in, else the name of its shard if that is a WordNet id (as ImageNet's n01440764.tar),
    else unknown (-1); with `labelled` False always unknown. An image is called SHARD/MEMBER. `known`, an earlier
    listing, spares the scan of shards that did not change since.
    DataError for a shard that is compressed or cut short, without images, or with classes from different sources.
    """
    option = "--data.root" if labelled else "--data.unlabelled"
    folder = root if root.is_dir() else root.parent
    shards = _shards_in(root, option)
    files = Names.of(shards)
    # taken before the scan, so that what changes during it counts as changed
    signatures = file_signatures(os.fspath(folder), files)
    if known is not None and known.files == files and np.array_equal(known.signatures, signatures):
        archives = OpenFiles(os.fspath(folder), files)
        return replace(known, name=os.fspath(root), option=option, folder=os.fspath(folder), archives=archives)
    earlier = _rows_of_unchanged(known, shards, signatures)

    def content(number: int) -> _Shard:
        name = shards[number]
        if known is not None and name in earlier:
            return _from_listing(known, earlier[name])
        return _scan(folder / name, option, labelled)

    contents = []
    with ThreadPoolExecutor(THREADS) as pool:
        for done, shard in enumerate(pool.map(content, range(len(shards))), 1):
            contents.append(shard)
            if progress:
                progress("scanning shards", done, len(shards))
    return _listing(root, option, files, signatures, contents, labelled=labelled)


def _listing(
    root: Path, option: str, files: Names, signatures: NDArray[np.int64], contents: list[_Shard], *, labelled: bool
) -> Listing:
    given = [each for shard in contents for each in shard.classes]
    if not given:
        raise DataError(f"the shards of {root} hold no {', '.join(SUFFIXES)} file; check {option}")
    names = Names.of(name for shard in contents for name in shard.names)
    labelled_by = _one_source(given, names, root, option) if labelled else "nothing"
    labels, classes = np.full(len(given), -1, np.int64), tuple[str, ...]()
    if labelled_by != "nothing":
        labels, classes = numbered([name for _, name in given])
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
        labelled_by=labelled_by,
        archives=OpenFiles(folder, files),
    )


def _shards_in(root: Path, option: str) -> list[str]:
    names = sorted(os.listdir(root)) if root.is_dir() else [root.name]
    names = [name for name in names if not name.startswith(".")]
    if packed := [name for name in names if name.endswith(COMPRESSED_SUFFIXES)]:
        raise DataError(
            f"{packed[0]} in {root} is compressed, so single images cannot be read from it; {option} takes .tar files: "
            "decompress it"
        )
    return [name for name in names if name.endswith(SHARD_SUFFIX)]


def _scan(path: Path, option: str, labelled: bool) -> _Shard:
    """Reads the headers of all members and, for labels, the .cls files; DataError for a shard without its end."""
    images: list[tarfile.TarInfo] = []
    integers: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                base = posixpath.basename(member.name)
                if not member.isreg() or base.startswith("."):
                    continue
                if base.lower().endswith(SUFFIXES):
                    images.append(member)
                elif labelled and base.endswith(".cls"):
                    integers[_key(member.name)] = _integer(archive, member, path, option)
            # tarfile takes a torn or damaged header for the end
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            ended = archive.fileobj.read(_BLOCK) == bytes(_BLOCK)  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, len(images), str(error), option) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check {option}") from None
    if not ended:
        raise _damaged(path, len(images), "the end mark of a tar file is missing", option)
    return _Shard(
        names=[f"{path.name}/{posixpath.normpath(member.name)}" for member in images],
        offsets=[member.offset_data for member in images],
        lengths=[member.size for member in images],
        classes=[_class_of(member.name, path, integers) for member in images],
    )


def _damaged(path: Path, images: int, reason: str, option: str) -> DataError:
    return DataError(
        f"the shard {path} is cut short or damaged ({reason}, after {images} images in {path.stat().st_size} bytes); "
        f"copy or download it again, or remove it from {option}"
    )


def _key(name: str) -> str:
    folder, base = posixpath.split(posixpath.normpath(name))
    return posixpath.join(folder, base.split(".")[0])


def _integer(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, option: str) -> str:
    file = archive.extractfile(member)
    text = (file.read() if file else b"").decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise DataError(
            f"{path}/{member.name} holds {text[:40]!r}; a .cls file in {option} must hold the number of a class"
        )
    return str(int(text))


def _class_of(member: str, path: Path, integers: dict[str, str]) -> tuple[str, str]:
    """What told the class, and the class."""
    if (integer := integers.get(_key(member))) is not None:
        return ".cls files", integer
    if folder := posixpath.basename(posixpath.dirname(posixpath.normpath(member))):
        return "folders", folder
    if _WORDNET_ID.fullmatch(path.stem):
        return "names of shards", path.stem
    return "nothing", ""


def _one_source(given: Sequence[tuple[str, str]], names: Names, root: Path, option: str) -> str:
    first = given[0][0]
    for row, (source, _) in enumerate(given):
        if source != first:
            raise DataError(
                f"the class of {names[0]} in {root} comes from {first} and that of {names[row]} from {source}, so "
                f"labels are unclear; make the shards of {option} alike"
            )
    return first


def _rows_of_unchanged(known: Listing | None, shards: list[str], signatures: NDArray[np.int64]) -> dict[str, slice]:
    """Where the images of the shards that did not change stand in the earlier listing."""
    if known is None:
        return {}
    first = np.searchsorted(known.file, np.arange(len(known.files) + 1))
    earlier = {name: number for number, name in enumerate(known.files)}
    return {
        name: slice(int(first[earlier[name]]), int(first[earlier[name] + 1]))
        for name, signature in zip(shards, signatures, strict=True)
        if name in earlier and (known.signatures[earlier[name]] == signature).all()
    }


def _from_listing(known: Listing, rows: slice) -> _Shard:
    labels = known.labels[rows].tolist()
    return _Shard(
        names=[known.names[row] for row in range(rows.start, rows.stop)],
        offsets=known.offsets[rows].tolist(),
        lengths=known.lengths[rows].tolist(),
        classes=[(known.labelled_by, known.classes[label] if label >= 0 else "") for label in labels],
    )
