"""Untrusted shards: clear labels or an error, damaged headers refused, in bounded memory."""

from __future__ import annotations

import io
import os
import random
import tarfile

import pytest

from fastssl_pipelines import DataError, open_source
from tests.pipelines.test_shards import png, shard

GIB = 2**30


def refused(path, words):
    with pytest.raises(DataError, match=words) as raised:
        open_source(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    return str(raised.value)


def labels(path):
    source = open_source(path)
    return {
        source.name_of(i).split("/", 1)[1]: source.classes[label] if label >= 0 else None
        for i, label in enumerate(source.labels.tolist())
    }


def header(name, size, kind=b"0", size_field=None):
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size_field if size_field is not None else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def test_a_dot_before_the_number_keeps_every_label(tmp_path):
    members = {}
    for i in range(9):
        members[f"img.{i:05}.jpg"] = png(i)
        members[f"img.{i:05}.cls"] = b"%d" % (i % 3)
    assert labels(shard(tmp_path / "a.tar", members)) == {f"img.{i:05}.jpg": str(i % 3) for i in range(9)}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.input.jpg": "", "a.target.cls": "4"}, {"a.input.jpg": "4"}),
        ({"a.left.png": "", "a.right.png": "", "a.cls": "4"}, {"a.left.png": "4", "a.right.png": "4"}),
        ({"a.png": "", "a.x.png": "", "a.cls": "4", "a.x.cls": "5"}, {"a.png": "4", "a.x.png": "5"}),
        ({"a.png": "", "a.x.png": "", "a.cls": "4"}, {"a.png": "4", "a.x.png": "4"}),
        ({"d/a.png": "", "d/a.cls": "4", "a.png": "", "a.cls": "5"}, {"d/a.png": "4", "a.png": "5"}),
        ({"a.png": "", "a.cls": "-1", "b.png": "", "b.cls": "2\n"}, {"a.png": None, "b.png": "2"}),
        ({"a.png": "", "a.cls": "-1"}, {"a.png": None}),
        ({"__MACOSX/a.png": "", "../b.png": "", ".git/c.png": ""}, {"../b.png": None}),
    ],
    ids=["target", "two of a key", "own first", "shared", "folders", "unknown", "all unknown", "hidden"],
)
def test_the_label_of_each_image(tmp_path, members, expected):
    content = {name: png(1) if name.endswith("g") else text.encode() for name, text in members.items()}
    if "../b.png" in expected:
        expected = {"../b.png": ".."}  # Its folder
    assert labels(shard(tmp_path / "a.tar", content)) == expected


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.x.png": png(1), "a.y.cls": b"1", "a.z.cls": b"2"}, r"a\.x\.png .*a\.y\.cls or a\.z\.cls.*--data\.root"),
        (
            {"img.0.png": png(1), "img.1.png": png(2), "img.1.cls": b"1"},
            r"img\.0\.png .*from nothing and .*\.cls files",
        ),
        ({"a.png": png(1), "a.cls": b"1" * 5000}, r"a\.cls holds more than 64 bytes"),
        ({"a.png": png(1), "a.cls": b"-2"}, r"a\.cls holds '-2'.*or -1 for unknown"),
        ({"a.png": png(1), "a.cls": b"\xff\n\n"}, r"a\.cls holds"),
        ({"a.png": png(1), "a.cls": b""}, r"a\.cls holds ''"),
    ],
    ids=["two labels", "label of another", "long", "-2", "bytes", "empty"],
)
def test_an_ambiguous_label_is_one_sentence(tmp_path, members, words):
    refused(shard(tmp_path / "a.tar", members), words)


def test_a_repeated_name_is_one_sentence(tmp_path):
    for name in ("a.png", "a.cls"):
        shard(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"1"})
        with tarfile.open(tmp_path / "a.tar", "a") as archive:
            info = tarfile.TarInfo("./" + name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"2"))
        refused(tmp_path, rf"a\.tar holds {name} twice.*--data\.root")


def test_unused_files_are_reported_and_kept_in_the_index(tmp_path, notes):
    shard(tmp_path / "0.tar", {"a.png": png(1), "a.json": b"{}", "b.WEBM": b"", "c.webm": b"", "README": b""})
    shard(tmp_path / "1.tar", {"d.png": png(1), "d.json": b"{}"})
    with tarfile.open(tmp_path / "1.tar", "a") as archive:
        info = tarfile.TarInfo("e.png")
        info.type, info.linkname = tarfile.LNKTYPE, "d.png"
        archive.addfile(info)
    expected = [
        f"{tmp_path}: 6 files are not used: 2 .json, 2 .webm, 1 without a suffix, 1 .png link",
        f"{tmp_path}: no .cls in the shards: labels in .json or .txt are not read; write the index of a class into "
        "KEY.cls next to each image",
    ]
    for _ in range(2):
        open_source(tmp_path)
        assert notes.take() == expected
    os.utime(tmp_path / "0.tar", ns=(1, 1))  # Only this one is scanned again
    open_source(tmp_path)
    assert notes.take() == expected


SIZES = {
    "2^80": b"\x80" + (2**80).to_bytes(11, "big"),
    "negative": b"\xff" * 11 + b"\0",
    "-512": (-512).to_bytes(12, "big", signed=True),
    "no octal": b"99999999999\0",
    "terabytes": b"\x80" + (2**42).to_bytes(11, "big"),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K"])
def test_an_impossible_size_is_a_damaged_shard(tmp_path, memory, size, kind):
    tar = padded(header("a.png", 0, kind, size)) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(tar)
    refused(tmp_path, r"a\.tar is cut short or damaged \(the data of a\.png goes beyond the end.*--data\.root")


def record(keyword, value):
    text = b" " + keyword + b"=" + value + b"\n"
    length = next(n for n in range(len(text), len(text) + 20) if len(str(n)) + len(text) == n)
    return str(length).encode() + text


PAX = {
    "size of 30 digits": record(b"size", b"9" * 30),
    "size below zero": record(b"size", b"-512"),
    "size that is no number": record(b"size", b"a" * 2000),
    "length of 5000 digits": b"1" * 5000 + b" path=a.png\n",
    "length 0": b"0 path=a.png\n",
    "length 1": b"1 path=a.png\n",
    "length -1": b"-1 path=a.png\n",
    "beyond": b"999 path=a.png\n",
    "no =": b"7 path\n",
    "digits": b"1" * 300_000,
    "many short": b"2 " * 100_000 + b"=",
    "sparse": record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"),
    "sparse map": record(b"GNU.sparse.map", b"0,1"),
}


@pytest.mark.parametrize("pax", PAX.values(), ids=PAX)
@pytest.mark.parametrize("kind", [b"x", b"g"])
def test_an_impossible_pax_header_is_a_damaged_shard(tmp_path, memory, pax, kind):
    tar = header("pax", len(pax), kind) + padded(pax) + header("a.png", 512) + bytes(512) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(tar)
    refused(tmp_path, r"a\.tar is cut short or damaged \(.*(goes beyond|damaged|is sparse).*--data\.root")


def test_extended_headers_of_gigabytes_are_not_read(tmp_path, memory):
    for kind in (b"x", b"g", b"L", b"K"):
        with (tmp_path / "a.tar").open("wb") as file:
            file.write(header("pax", 2 * GIB, kind))
            file.truncate(3 * GIB)
        refused(tmp_path, r"damaged \(an extended header has 2147483648 bytes and at most 1048576 are allowed")


def test_a_sparse_member_of_gnu_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(header("a.png", 0, b"S") + bytes(1024))
    refused(tmp_path, r"a\.png is sparse; make the shard again without sparse files")


def test_chains_of_headers_do_not_recurse(tmp_path):
    link = header("L", 6, b"L") + padded(b"a.png\0")
    (tmp_path / "a.tar").write_bytes(link * 5000 + header("x", 3) + padded(b"abc") + bytes(1024))
    message = refused(tmp_path, "none of the 1 images")  # It is not an image, but has the name in the last header
    assert "a.tar/a.png" in message


def test_a_member_of_gigabytes_is_one_unreadable_image(tmp_path, memory):
    with (tmp_path / "a.tar").open("wb") as file:
        first = png(1)
        file.write(header("a.png", len(first)) + padded(first) + header("b.png", 6 * GIB))
        file.truncate(file.tell() + 6 * GIB + 1024)
    source = open_source(tmp_path)
    assert list(source.defects) == [1]
    assert "b.png cannot be read (it has 6442450944 bytes and at most 1073741824 are allowed)" in source.defects[1]


def test_a_label_of_gigabytes_is_one_sentence(tmp_path, memory):
    with (tmp_path / "a.tar").open("wb") as file:
        first = png(1)
        file.write(header("a.png", len(first)) + padded(first) + header("a.cls", 6 * GIB))
        file.truncate(file.tell() + 6 * GIB + 1024)
    refused(tmp_path, r"a\.cls holds more than 64 bytes")


def test_a_shard_that_is_not_a_regular_file_is_one_sentence(tmp_path):
    shard(tmp_path / "good.tar", {"a.png": png(1)})
    bad = tmp_path / "bad.tar"
    for make, words in (
        (lambda: bad.symlink_to("bad.tar"), r"bad\.tar cannot be read \(Too many levels of symbolic links"),
        (lambda: bad.symlink_to("nowhere"), r"bad\.tar cannot be read \(No such file"),
        (lambda: os.mkfifo(bad), r"bad\.tar cannot be read \(it is not a regular file"),
        (lambda: bad.symlink_to("/dev/zero"), r"bad\.tar cannot be read \(it is not a regular file"),
    ):
        make()
        for root in (tmp_path, bad):
            refused(root, words)
        bad.unlink()
    assert len(open_source(tmp_path)) == 1


def test_damaged_shards_are_refused_or_read(tmp_path):
    """Random cuts and bit flips give an error, or a listing whose images can all be read."""
    rng = random.Random(0)
    members = {f"d/{i}.png": png(i) for i in range(6)} | {"n" * 150 + ".png": png(7)}
    members = {f"k/{name}": content for name, content in members.items()}
    path = shard(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    whole = path.read_bytes()[: 512 * 40]
    outcomes = []
    for case in range(300):
        content = bytearray(whole)
        if case % 3 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice((1, 1, 3, 40))):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        outcomes.append(outcome_of(path))
    assert all("\n" not in outcome for outcome in outcomes)
    assert 20 < outcomes.count("listed") < 250


def outcome_of(path):
    try:
        source = open_source(path, labeled=False)
    except DataError as error:
        return str(error)
    for i in range(len(source)):
        if i not in source.defects:
            source.encoded(i)
    return "listed"
