"""Listings hide nothing: circular links, special files, names of all kinds, and lists of them."""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastssl_pipelines import DataError, ImageFolder
from fastssl_pipelines.labels import listed_labels, quarantine_list, without
from fastssl_pipelines.names import read_names, to_line, write_names
from fastssl_pipelines.sources.listing import Listing
from fastssl_pipelines.sources.open import list_images, open_source


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), number % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path) -> Path:
    """Two birds and a cat."""
    for number, name in enumerate(("bird/1.png", "bird/2.png", "cat/3.png")):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "root"


def names(listing: Listing) -> list[str]:
    return list(listing.names)


def refusal(root: Path, **options) -> str:
    with pytest.raises(DataError) as raised:
        list_images(root, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("bird/a", "."),
        ("bird/z", ".."),
        ("bird/deep/er/up", "../.."),
        ("bird/outside", "../.."),
        ("bird/others", "../cat"),
        ("cat/birds", "../bird"),
        ("again", "bird"),
        ("bird/b", "{elsewhere}"),
    ],
)
def test_a_folder_reached_on_two_paths_is_refused(root, tmp_path, link, target):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "9.png").write_bytes(png(9))
    (root / "cat" / "first").symlink_to(elsewhere)
    before = list_images(root)
    assert names(before) == ["bird/1.png", "bird/2.png", "cat/3.png", "cat/first/9.png"]  # A link elsewhere is allowed
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(target.format(elsewhere=elsewhere))
    for labeled in (True, False):
        message = refusal(root, labeled=labeled)
        assert re.search(r"a link makes (\S+) and (\S+) one folder, (\S+), so its images would count twice", message)
        assert "--data.root" in message if labeled else "--data.unlabeled" in message
        assert f"/{link}" in message


def test_two_links_to_each_other_end(root):
    for one, other in (("bird", "cat"), ("cat", "bird")):
        (root / one / "other").symlink_to(f"../{other}")
    assert "one folder" in refusal(root)


def test_links_to_folders_and_images_elsewhere_are_followed(root, tmp_path):
    elsewhere = root.rename(tmp_path / "elsewhere")
    root.mkdir()
    for name in ("cat", "bird"):
        (root / name).symlink_to(elsewhere / name)
    (root / "cat" / "bird.png").symlink_to(elsewhere / "bird" / "1.png")
    (tmp_path / "linked").symlink_to(root)
    for path in (root, tmp_path / "linked"):
        listing = list_images(path)
        assert names(listing) == ["bird/1.png", "bird/2.png", "cat/3.png", "cat/bird.png"]
        assert listing.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("link", ["zdead", "cat/dead", "loop"])
def test_a_dangling_link_is_not_silently_left_out(root, link):
    (root / link).symlink_to(link if link == "loop" else "/nonexistent")
    assert re.search(rf"{link} is a link to .*, which cannot be reached.*--data\.root", refusal(root))


def test_files_that_are_no_images_are_counted(root):
    for name in ("bird/a.txt", "bird/b.TXT", "cat/movie.webm", "cat/deep/README", "labels.csv", "LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    for name in (".DS_Store", "cat/._3.png", "cat/.x/1.png", "__MACOSX/cat/._3.png", "cat/__MACOSX/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    listing = list_images(root)
    assert names(listing) == ["bird/1.png", "bird/2.png", "cat/3.png"]
    assert listing.classes == ("bird", "cat")
    assert listing.ignored == (("", 2), (".txt", 2), (".csv", 1), (".webm", 1))
    assert list_images(root, labeled=False).ignored == listing.ignored
    flat = list_images(root / "bird")
    assert flat.ignored == ((".txt", 2),)


def test_an_empty_class_is_explained(root):
    (root / "dog").mkdir()
    message = refusal(root)
    assert "class folder" in message
    assert "dog holds no image file" in message
    assert "remove the folder, or name the images and their classes in a list file as --data.root" in message


def special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "self":
        path.symlink_to(path.name)
    else:
        path.symlink_to({"device": "/dev/zero", "dead": "/nonexistent", "terminal": "/dev/tty"}[kind])


@pytest.mark.parametrize("kind", ["fifo", "device", "dead", "self", "terminal"])
def test_special_files_with_image_names_are_reported_without_blocking(root, kind):
    special(root / "bird" / "x.jpg", kind)
    source = open_source(root)
    assert len(source) == 4
    (reason,) = source.defects.values()
    assert "bird/x.jpg cannot be read" in reason
    assert source.name_of(next(iter(source.defects))) == "bird/x.jpg"


@pytest.mark.parametrize("kind", ["fifo", "device", "dead", "self", "folder"])
def test_special_files_are_not_lists(root, tmp_path, kind):
    special(tmp_path / "list", kind)
    for read in (quarantine_list, lambda path: listed_labels(ImageFolder(root), path), open_source):
        with pytest.raises(DataError, match=r"list .*--data\.") as raised:
            read(tmp_path / "list")
        assert "\n" not in str(raised.value)


HOSTILE = [
    "caf\udce9.jpg",
    "new\nline.jpg",
    "carriage\rreturn\r",
    " leading.jpg",
    "trailing.jpg ",
    "tab\t1.jpg",
    "number 7",
    '"quoted".jpg',
    '"',
    "\u2028\u2029\x85\x1c.jpg",
    "\ufeffmark.jpg",
    "\x1b[31mred.jpg",
    "\u202egpj.exe.jpg",
    "a\\b.jpg",
    "%s{0}[bold]$HOME.jpg",
    "x" * 251 + ".jpg",
    "Käse 猫.jpg",
]
file_names = st.binary(min_size=1, max_size=60).map(lambda raw: raw.translate(None, b"\0/")).filter(len)


def round_trips(folder: Path, given_names: set[str]) -> None:
    """Images with these names in two classes with such names, by folder, list, quarantine list and label list."""
    classes = ["a", to_line(min(given_names))[:40].replace("/", "")]
    for label, name in enumerate(sorted(given_names)):
        path = folder / "data" / f"{classes[label % 2]} {label % 2}" / f"{name[:60]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(label))
    source = open_source(folder / "data")
    listed = [source.name_of(row) for row in range(len(source))]
    (folder / "list").write_bytes(
        b"".join(
            os.fsencode(f"{to_line('data/' + name)}\t{to_line(source.classes[label])}\n")
            for name, label in zip(listed, source.labels.tolist(), strict=True)
        )
    )
    again = open_source(folder / "list")
    assert [again.name_of(row) for row in range(len(again))] == [f"data/{name}" for name in listed]
    assert again.classes == tuple(sorted(source.classes))
    assert again.labels.tolist() == source.labels.tolist()
    assert not again.defects
    chosen = listed[::2]
    write_names(folder / "names", chosen)
    assert read_names(folder / "names", "--data.quarantine") == set(chosen)
    assert np.flatnonzero(listed_labels(source, folder / "names").labels >= 0).tolist() == [*range(0, len(listed), 2)]
    if len(listed) > 1:
        left = without(source, quarantine_list(folder / "names")).source
        assert [left.name_of(row) for row in range(len(left))] == listed[1::2]


def test_hostile_names_round_trip(tmp_path):
    round_trips(tmp_path, {name[:60] for name in HOSTILE})


@given(st.sets(file_names.map(os.fsdecode), min_size=1, max_size=6))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_any_names_round_trip(some):
    with tempfile.TemporaryDirectory() as folder:
        round_trips(Path(folder), {os.fsdecode(os.fsencode(name)[:60]) for name in some})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a.png,1\n", ["line 1", "a.png,1", "a TAB and a class, or a space and an integer"]),
        (b"path label\na.png 1\n", ["line 1", "path label", "a space and an integer"]),
        (b"a.png 1.0\n", ["line 1", "a.png 1.0", "a space and an integer"]),
        (b"a.png\tcat\nb.png\n", ["line 2", "no class"]),
        (b"\xff\xfea\0.\0p\0n\0g\0", ["is not UTF-8 text"]),
        (b'"a\\u0000.png"\n', ["line 1", "cannot be found"]),
        (b'"\\ud800.png"\n', ["line 1", "cannot be found"]),
        (b"\n \r\n\t\n", ["names no image"]),
        (b"caf\xe9.png\n", ["line 1", "cannot be found"]),
    ],
)
def test_a_wrong_list_of_paths_is_explained(tmp_path, text, words):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "list").write_bytes(text)
    message = refusal(tmp_path / "list")
    for word in [*words, "--data.root"]:
        assert word in message


def test_a_byte_order_mark_and_windows_line_ends_are_ignored(tmp_path):
    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfa.png\tcat\r\nb c.png\tdog\r\n")
    listing = list_images(tmp_path / "list")
    assert (names(listing), listing.classes) == (["a.png", "b c.png"], ("cat", "dog"))
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfa.png\r\n\r\nb c.png")
    assert read_names(tmp_path / "names", "--data.quarantine") == {"a.png", "b c.png"}


def test_integer_classes_are_sorted_by_value_whatever_their_length(tmp_path):
    classes = ["10", "9", "01", "1", "1" * 5000, "0", "00", "2"]
    for number in range(len(classes)):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "list").write_text("".join(f"{number}.png\t{name}\n" for number, name in enumerate(classes)))
    listing = list_images(tmp_path / "list")
    assert listing.classes == ("0", "00", "01", "1", "2", "9", "10", "1" * 5000)
    assert [listing.classes[label] for label in listing.labels] == classes
