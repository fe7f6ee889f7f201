"""The index: what a start reads, what the cache provides, and what a bad cache cannot do."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastssl_pipelines import ImageFolder
from fastssl_pipelines.sources import index
from fastssl_pipelines.sources.packed_strings import PackedStrings


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTSSL_CACHE", str(folder))
    return folder


@pytest.fixture
def headers(monkeypatch):
    """Names of the images whose headers were read since the list was last cleared."""
    read, size = [], index._size
    monkeypatch.setattr(index, "_size", lambda listing, row: (read.append(listing.names[row]), size(listing, row))[1])
    return read


@pytest.fixture
def root(tmp_path, cache):
    for number in range(6):
        write(tmp_path / "data" / f"class{number % 2}" / f"{number}.png", 10 + number, 20)
    return tmp_path / "data"


def write(path, width, height):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), width, np.uint8)).save(path)


def facts(source):
    names = [source.name_of(number) for number in range(len(source))]
    return names, source.labels.tolist(), source.classes, source.widths.tolist(), source.heights.tolist()


def test_an_unchanged_folder_is_not_opened_again(root, cache, headers):
    first = ImageFolder(root)
    assert len(headers) == 6
    headers.clear()
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again = ImageFolder(root)
    assert (headers, facts(again)) == ([], facts(first))
    assert file.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again.pixels(5), first.pixels(5))


def test_only_what_changed_is_read_again(root, headers):
    ImageFolder(root)
    headers.clear()
    write(root / "class0" / "0.png", 33, 44)  # Changed
    write(root / "class1" / "0.png", 7, 8)  # New, first in its class
    (root / "class1" / "3.png").unlink()
    write(root / "class2" / "9.png", 5, 5)  # A new class
    os.utime(root / "class0" / "4.png", ns=(0, 0))  # Touched
    changed = ImageFolder(root)
    assert sorted(headers) == ["class0/0.png", "class0/4.png", "class1/0.png", "class2/9.png"]
    names = ["class0/0.png", "class0/2.png", "class0/4.png", "class1/0.png", "class1/1.png", "class1/5.png"]
    assert facts(changed) == (
        [*names, "class2/9.png"],
        [0, 0, 0, 1, 1, 1, 2],
        ("class0", "class1", "class2"),
        [33, 12, 14, 7, 11, 15, 5],
        [44, 20, 20, 8, 20, 20, 5],
    )
    headers.clear()
    assert (facts(ImageFolder(root)), headers) == (facts(changed), [])


def test_a_change_of_only_the_size_is_noticed(root, headers):
    ImageFolder(root)
    headers.clear()
    path = root / "class0" / "0.png"
    before = path.stat()
    write(path, 40, 41)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size != before.st_size
    assert ImageFolder(root).widths[0] == 40
    assert headers == ["class0/0.png"]


def test_labeled_and_unlabeled_have_separate_indices(root, cache, headers):
    labeled, unlabeled = ImageFolder(root), ImageFolder(root, labeled=False)
    assert len(list(cache.iterdir())) == 2
    headers.clear()
    assert facts(ImageFolder(root)) == facts(labeled)
    assert facts(ImageFolder(root, labeled=False)) == facts(unlabeled)
    assert headers == []


def test_images_that_could_not_be_read_are_tried_again(root, headers):
    (root / "class0" / "x.png").write_bytes(b"no image")
    assert list(ImageFolder(root).defects) == [3]
    headers.clear()
    assert list(ImageFolder(root).defects) == [3]
    assert headers == ["class0/x.png"]


def test_a_size_after_a_long_header_is_found(tmp_path, cache):
    image = Image.fromarray(np.zeros((9, 8, 3), np.uint8))
    image.save(tmp_path / "profile.jpg", icc_profile=bytes(200_000))
    source = ImageFolder(tmp_path)
    assert (source.widths.tolist(), source.heights.tolist(), dict(source.defects)) == ([8], [9], {})


def damage(content: bytes) -> dict[str, tuple[bytes, bool]]:
    """Damaged copies, and whether the damage is in data that the index reads, unlike a date in a zip header."""
    data = stored_data(content)
    return {
        "empty": (b"", True),
        "cut": (content[: len(content) // 2], True),
        "without its end": (content[:-1], True),
        "text": (b"no index", True),
        **{f"bit {at}": (flipped(content, at), at in data) for at in range(0, len(content), 97)},
    }


def stored_data(content: bytes) -> set[int]:
    """Positions of the stored arrays in a zip file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    positions = set()
    for entry in entries:
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))
        positions.update(range(start, start + entry.file_size))
    return positions


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_damaged_cache_is_made_again(root, cache, headers):
    expected = facts(ImageFolder(root))
    (file,) = cache.iterdir()
    kinds = damage(file.read_bytes())
    assert sum(counts for _, counts in kinds.values()) > 20
    for kind, (content, counts) in kinds.items():
        headers.clear()
        file.write_bytes(content)
        assert facts(ImageFolder(root)) == expected, kind
        assert len(headers) in ((6,) if counts else (0, 6)), kind


def test_a_cache_of_another_data_set_is_not_used(root, cache, headers, tmp_path):
    for number in range(6):
        write(tmp_path / "other" / f"class{number % 2}" / f"{number}.png", 99, 98)
        before = (root / f"class{number % 2}" / f"{number}.png").stat()
        other = tmp_path / "other" / f"class{number % 2}" / f"{number}.png"
        other.write_bytes(other.read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
        os.utime(other, ns=(0, before.st_mtime_ns))
    ImageFolder(tmp_path / "other")
    (foreign,) = cache.iterdir()
    content = foreign.read_bytes()
    foreign.unlink()
    expected = facts(ImageFolder(root))
    (file,) = cache.iterdir()
    file.write_bytes(content)
    headers.clear()
    assert facts(ImageFolder(root)) == expected
    assert len(headers) == 6


def test_a_cache_of_another_version_is_not_used(root, cache, headers, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(index, "_VERSION", index._VERSION + 1)
        expected = facts(ImageFolder(root))
    headers.clear()
    assert facts(ImageFolder(root)) == expected
    assert len(headers) == 6


def test_a_cache_with_pickles_is_never_loaded(root, cache, headers):
    ImageFolder(root)
    (file,) = cache.iterdir()
    with np.load(file) as arrays:
        evil = {**arrays, "widths": np.array([PackedStrings.of(["x"])] * 6, object)}
    np.savez(file, **evil)
    headers.clear()
    assert ImageFolder(root).widths.tolist() == [10, 12, 14, 11, 13, 15]
    assert len(headers) == 6


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "numpy.savez"])
def test_a_full_disk_costs_a_note_and_leaves_nothing(root, cache, headers, monkeypatch, call, notes):
    with monkeypatch.context() as patch:
        patch.setattr(call, lambda *_, **__: full_disk())
        source = ImageFolder(root)
    (note,) = notes.take()
    assert "No space left on device" in note
    assert "FASTSSL_CACHE" in note
    assert "\n" not in note
    assert list(cache.iterdir()) == []
    assert source.widths.tolist() == [10, 12, 14, 11, 13, 15]
    headers.clear()
    ImageFolder(root)
    assert notes.take() == []
    assert len(headers) == 6


def test_a_full_disk_keeps_the_earlier_cache(root, cache, headers, notes):
    ImageFolder(root)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    write(root / "class0" / "0.png", 33, 44)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # A write beyond it fails, as on a full disk
    try:
        ImageFolder(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (note,) = notes.take()
    assert "File too large" in note
    assert (list(cache.iterdir()), file.read_bytes()) == ([file], content)
    headers.clear()
    assert ImageFolder(root).widths[0] == 33
    assert headers == ["class0/0.png"]


def test_a_folder_that_cannot_be_made_costs_a_note(root, tmp_path, monkeypatch, notes):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "file" / "cache"))
    ImageFolder(root)
    (note,) = notes.take()
    assert "could not be kept in" in note


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "own"))
    assert index.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FASTSSL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert index.cache_folder() == tmp_path / "xdg" / "fastssl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index.cache_folder() == tmp_path / ".cache" / "fastssl"


def test_progress_reports_what_is_read(root, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 4)
    calls = []
    ImageFolder(root, progress=lambda *call: calls.append(call))
    assert calls == [("reading image headers", 4, 6), ("reading image headers", 6, 6)]
    calls.clear()
    ImageFolder(root, progress=lambda *call: calls.append(call))
    assert calls == []


def test_a_relative_and_an_absolute_path_share_an_index(root, headers, monkeypatch):
    ImageFolder(root)
    headers.clear()
    monkeypatch.chdir(root.parent)
    source = ImageFolder("data")
    assert headers == []
    assert source.describe(0) == "data/class0/0.png"


def test_names_are_a_compact_list_of_strings():
    given = ["", "a/b.jpg", "löwe.png", os.fsdecode(b"\xff.jpg"), ""]
    names = PackedStrings.of(given)
    assert (list(names), [names[i] for i in range(5)], len(names)) == (given, given, 5)
    copy = pickle.loads(pickle.dumps(names))
    assert copy == names
    assert PackedStrings.of(given[:-1]) != names
    assert PackedStrings.of(["ab", "c"]) != PackedStrings.of(["a", "bc"])
    assert list(PackedStrings.of([])) == []


def test_a_name_that_is_not_utf8_is_kept(tmp_path, cache):
    (tmp_path / "data").mkdir()
    path = os.fsdecode(os.fsencode(tmp_path) + b"/data/\xff.png")
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(path)
    for _ in range(2):
        source = ImageFolder(tmp_path / "data")
        assert source.describe(0) == path
        assert source.pixels(0).shape == (3, 4, 3)
