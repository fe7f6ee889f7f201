"""A damaged or forged index cache is not used, needs no extra memory, and is never blamed on the images."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest

from fastssl_pipelines import open_source
from fastssl_pipelines.sources import index
from tests.pipelines.test_shards import png, shard


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that changes the arrays of an index and opens its shards again, those arrays, and the file."""
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        members = {f"{i}.png": png(i, width=3 + i) for i in range(3)}
        shard(tmp_path / "data" / f"{number}.tar", members | {f"{i}.cls": b"%d" % i for i in range(3)})
    open_source(tmp_path / "data")
    (file,) = (tmp_path / "cache").iterdir()
    with np.load(file) as stored:
        arrays = dict(stored)

    def reopened(save=np.savez, sealed=False, **changed):
        found = {name: array for name, array in (arrays | changed).items() if array is not None}
        if sealed:
            found.pop("checksum")
            found["checksum"] = np.frombuffer(index._checksum(found), np.uint8)
        with file.open("wb") as target:
            save(target, **found)
        source = open_source(tmp_path / "data")
        return source.labels.tolist(), source.widths.tolist(), len(source.defects)

    return reopened, arrays, file


RIGHT = [0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5], 0


def test_the_index_of_shards_is_used(cached, monkeypatch):
    reopened, *_ = cached
    monkeypatch.setattr(index, "_size", None)  # No header is read
    assert reopened() == reopened(sealed=True) == RIGHT


def tampered(arrays):
    """Arrays with valid names and types, but wrong values or lengths."""
    for name, array in arrays.items():
        if name in ("checksum", "version", "key"):
            continue
        yield name, None
        yield name, array[:0]
        yield name, np.concatenate([array, array])
        yield name, array[:-1] if len(array) else np.zeros(1, array.dtype)
        if array.dtype.kind == "i":
            yield name, array[::-1].copy() if len(set(array.ravel().tolist())) > 1 else array + 1
            yield name, array + 10**6
            yield name, -array - 5
            yield name, array.astype(np.float64)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_forged_index_does_no_harm(cached, sealed):
    """It is not used without a valid checksum; with one, it never blames the images or ends the run."""
    reopened, arrays, _ = cached
    cases = list(tampered(arrays))
    assert len(cases) > 60
    for name, array in cases:
        found = reopened(sealed=sealed, **{name: array})
        assert len(found[0]) == 6, (name, array)
        if not sealed:
            assert found == RIGHT, (name, array)


def test_a_compressed_bomb_is_not_unpacked(cached, memory):
    reopened, _, file = cached
    assert reopened(np.savez_compressed, widths=np.zeros(10**8, np.int32)) == RIGHT
    for shape in ((10**12,), (2**31, 2**31)):
        with zipfile.ZipFile(file, "w") as archive:
            content = io.BytesIO()
            np.lib.format.write_array_header_1_0(content, {"descr": "<i8", "fortran_order": False, "shape": shape})
            archive.writestr("version.npy", content.getvalue())
        assert open_source(file.parent.parent / "data").labels.tolist() == RIGHT[0]


def test_a_special_file_as_index_is_not_opened(cached, notes):
    _, _, file = cached
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.mkdir()):
        file.unlink()
        make()
        source = open_source(file.parent.parent / "data")
        assert (source.labels.tolist(), source.widths.tolist()) == RIGHT[:2]
        if file.is_dir():
            assert "could not be kept" in notes.take()[0]


def test_ignored_files_in_the_index_are_plain_json(cached):
    _, arrays, _ = cached
    assert json.loads(arrays["ignored_in"].tobytes()) == [[], []]
