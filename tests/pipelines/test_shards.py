"""Tar shards: their images, the origin of labels, and damaged shards."""

from __future__ import annotations

import gc
import io
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastssl_pipelines import DataError, TarShards, list_images, open_source
from fastssl_pipelines.sources import index, shards
from fastssl_pipelines.sources.tar import OpenFiles


def png(value, width=6, height=5):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def webdataset(tmp_path):
    """Two shards of three images with .cls files; image i is i + 1 wide, filled with i, of class 12 - 5 * (i % 3)."""
    for part in range(2):
        members = {}
        for i in range(3 * part, 3 * part + 3):
            members[f"{i:04}.cls"] = b"%d" % (12 - 5 * (i % 3))
            members[f"{i:04}.png"] = png(i, width=i + 1)
            members[f"{i:04}.json"] = b"{}"
        shard(tmp_path / "wds" / f"part-{part}.tar", members)
    (tmp_path / "wds" / "index.json").write_text("{}")
    return tmp_path / "wds"


def test_webdataset_shards(webdataset):
    source = open_source(webdataset)
    assert type(source) is TarShards
    assert source.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert source.classes == ("2", "7", "12")
    assert (source.widths.tolist(), source.heights.tolist()) == ([1, 2, 3, 4, 5, 6], [5] * 6)
    for i in range(6):
        assert source.pixels(i).shape == (5, i + 1, 3)
        assert (source.pixels(i) == i).all()
        assert source.name_of(i) == f"part-{i // 3}.tar/{i:04}.png"
        assert source.describe(i) == f"{webdataset}/part-{i // 3}.tar/{i:04}.png"


def test_unlabeled_shards_have_no_classes(webdataset):
    shard(webdataset / "z.tar", {"cat/1.png": png(9), "cat/1.cls": b"a cat"})
    source = open_source(webdataset, labeled=False)
    assert (source.labels.tolist(), source.classes, source.option) == ([-1] * 7, (), "--data.unlabeled")


def test_classes_by_folder_in_the_shard(tmp_path):
    content = {"./train/dog/1.png": png(1), "./train/cat/._1.png": b"x", "train/cat/1.JPEG": png(2), "readme.txt": b"x"}
    source = open_source(shard(tmp_path / "one.tar", content))
    assert [source.name_of(i) for i in range(2)] == ["one.tar/train/dog/1.png", "one.tar/train/cat/1.JPEG"]
    assert (source.labels.tolist(), source.classes) == ([1, 0], ("cat", "dog"))


def test_classes_by_imagenets_names_of_shards(tmp_path):
    for name, value in (("n01440764", 1), ("n01443537", 2)):
        shard(tmp_path / f"{name}.tar", {f"{name}_{i}.JPEG": png(value) for i in range(2)})
    source = open_source(tmp_path)
    assert (source.labels.tolist(), source.classes) == ([0, 0, 1, 1], ("n01440764", "n01443537"))
    assert source.name_of(3) == "n01443537.tar/n01443537_1.JPEG"


def test_other_shards_have_no_labels(tmp_path):
    source = open_source(shard(tmp_path / "images.tar", {f"{i}.png": png(i) for i in range(3)}))
    assert (source.labels.tolist(), source.classes) == ([-1] * 3, ())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_form_of_tar(tmp_path, form):
    name = f"{'very/' * 18}deep folder/löwe.png" if form != tarfile.USTAR_FORMAT else f"{'very/' * 18}a/b.png"
    source = open_source(shard(tmp_path / "long.tar", {name: png(3), "x/y.png": png(4)}, format=form))
    assert source.name_of(0) == f"long.tar/{name}"
    assert (source.pixels(0) == 3).all()
    assert (source.pixels(1) == 4).all()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(1), "a.cls": b"3", "b.png": png(2)}, r"of one\.tar/a\.png .*\.cls files .*b\.png from nothing"),
        ({"cat/a.png": png(1), "b.png": png(2)}, r"cat/a\.png .*folders .*b\.png from nothing"),
        ({"a.png": png(1), "a.cls": b"cat"}, r"a\.cls holds 'cat'; a \.cls file"),
        ({"a.txt": b"1"}, r"hold no image file \(\.jpg"),
        ({}, r"hold no image file \(\.jpg"),
    ],
    ids=["some cls", "some folders", "text", "no images", "empty"],
)
def test_unclear_shards_are_explained(tmp_path, members, message):
    with pytest.raises(DataError, match=rf"{message}.*--data\.root") as raised:
        open_source(shard(tmp_path / "one.tar", members).parent)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.xz", "a.tar.zst"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_compressed_shard_is_refused(tmp_path, name, alone):
    (tmp_path / name).write_bytes(b"packed")
    if not alone:
        shard(tmp_path / "b.tar", {"a.png": png(1)})
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{re.escape(name)} .*compressed.*decompress.*--data\.root"):
            open_source(root)


@pytest.mark.parametrize("beside", ["cat/1.png", "1.png"])
def test_shards_next_to_images_are_refused(tmp_path, beside):
    shard(tmp_path / "cat.tar", {"a.png": png(1)})
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_bytes(png(1))
    with pytest.raises(DataError, match=r"cat\.tar and also .*--data\.root must hold either"):
        open_source(tmp_path)


def test_a_shard_cut_anywhere_is_refused(webdataset):
    path = webdataset / "part-1.tar"
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        end = [member.offset_data + member.size for member in archive][-1]
    end += -end % 512  # The end marker
    cuts = [*range(0, end, 256), end - 1, end, end + 100]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"shard .*part-1\.tar is cut short or damaged.*--data\.root") as raised:
            open_source(webdataset)
        assert "\n" not in str(raised.value)
    path.write_bytes(content[: end + 512])
    assert len(open_source(webdataset)) == 6


def test_a_damaged_member_header_is_refused(webdataset):
    path = webdataset / "part-0.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset
    content = bytearray(path.read_bytes())
    content[last + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part-0\.tar is cut short or damaged .*end mark"):
        open_source(webdataset)


def test_a_shard_that_shrinks_after_the_index_is_named(webdataset):
    source = open_source(webdataset)
    path = webdataset / "part-1.tar"
    with path.open("r+b") as file:
        file.truncate(source._listing.offsets[5] + 10)
    with pytest.raises(DataError, match=r"part-1\.tar/0005\.png has 10 bytes and had \d+ .*changed.*--data\.root"):
        source.encoded(5)
    assert (source.pixels(4) == 4).all()
    assert (source.pixels(0) == 0).all()


def test_a_shard_that_disappears_after_the_index_is_named(webdataset):
    source = open_source(webdataset)
    (webdataset / "part-1.tar").unlink()
    again = pickle.loads(pickle.dumps(source))
    with pytest.raises(DataError, match=r"part-1\.tar/0005\.png cannot be read \(No such file.*--data\.root"):
        again.encoded(5)


@pytest.fixture
def scans(monkeypatch):
    done, scan, size = [], shards._scan, index._size
    monkeypatch.setattr(shards, "_scan", lambda path, *more: (done.append(path.name), scan(path, *more))[1])
    monkeypatch.setattr(index, "_size", lambda listing, row: (done.append(listing.names[row]), size(listing, row))[1])
    return done


def test_only_changed_shards_are_scanned_again(webdataset, scans):
    first = open_source(webdataset)
    assert len(scans) == 2 + 6
    scans.clear()
    again = open_source(webdataset)
    assert scans == []
    for one, other in ((first.labels, again.labels), (first.widths, again.widths)):
        assert one.tolist() == other.tolist()
    assert (again.pixels(5) == 5).all()

    shard(webdataset / "part-1.tar", {"new.cls": b"40", "new.png": png(77, width=9)})
    shard(webdataset / "part-0a.tar", {"x.cls": b"7", "x.png": png(78, width=8)})
    changed = open_source(webdataset)
    assert sorted(scans) == ["part-0a.tar", "part-0a.tar/x.png", "part-1.tar", "part-1.tar/new.png"]
    assert changed.widths.tolist() == [1, 2, 3, 8, 9]
    assert changed.classes == ("2", "7", "12", "40")
    assert changed.labels.tolist() == [2, 1, 0, 1, 3]
    assert [int(changed.pixels(i)[0, 0, 0]) for i in range(5)] == [0, 1, 2, 78, 77]


def test_a_mixture_is_found_where_one_shard_changed(webdataset):
    open_source(webdataset)
    shard(webdataset / "part-1.tar", {"cat/1.png": png(1)})
    with pytest.raises(DataError, match=r"\.cls files and that of part-1\.tar/cat/1\.png from folders"):
        open_source(webdataset)


def test_unreadable_images_in_a_shard_keep_their_indices(tmp_path):
    members = {"a/1.png": png(1), "a/2.png": b"", "a/3.png": b"no image", "b/4.png": png(4)}
    source = open_source(shard(tmp_path / "one.tar", members))
    assert (source.labels.tolist(), list(source.defects)) == ([0, 0, 0, 1], [1, 2])
    listing = list_images(tmp_path / "one.tar")
    assert [listing.encoded(i) for i in range(4)] == list(members.values())
    assert listing.describe(2) == f"{tmp_path}/one.tar/a/3.png"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors as Linux shows them")
def test_descriptors_are_few_and_closed_at_the_end(tmp_path, monkeypatch):
    gc.collect()
    monkeypatch.setattr("fastssl_pipelines.sources.tar._KEPT_AT_MOST", OpenFiles._kept + 3)
    for number in range(6):
        shard(tmp_path / f"{number}.tar", {"a.png": png(number)})
    before = open_descriptors()
    source = open_source(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        pixels = list(pool.map(source.pixels, [i % 6 for i in range(600)]))
    assert [int(image[0, 0, 0]) for image in pixels] == [i % 6 for i in range(600)]
    assert open_descriptors() == before + 3
    copy = pickle.loads(pickle.dumps(source))
    assert open_descriptors() == before + 3
    assert (copy.pixels(4) == 4).all()
    del source, copy
    assert open_descriptors() == before
