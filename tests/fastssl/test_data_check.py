"""`fastssl data check`: its output, exit code, and list of exactly the bad images."""

from __future__ import annotations

import errno
import io
import os

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.commands.data_check import EXIT_FOUND
from fastssl.commands.pretrain import parse
from fastssl.data import open_splits


def picture(number: int, format: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(file, format, **options)
    return file.getvalue()


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


GOOD = {
    f"{folder}/{number}.jpg": picture(index * 10 + number) for index, folder in enumerate("ab") for number in range(5)
}
HARMLESS = {"a/cmyk.jpg": picture(30, mode="CMYK"), "b/misnamed.jpg": picture(31, "PNG")}
BAD = {
    "a/cut.jpg": picture(32)[:400],
    "a/empty.jpg": b"",
    "a/twice.jpg": picture(33),
    "b/icon.jpg": picture(34, "ICO"),
    "b/once more.jpg": picture(33),
}


def check(*arguments):
    return main(["data", "check", *map(str, arguments)])


def test_good_images_pass(tmp_path, capsys):
    assert check(write(tmp_path, GOOD)) == 0
    assert "10 images read at" in (printed := capsys.readouterr().out)
    assert "none of them unusable or contradictory" in printed


def test_harmless_kinds_are_shown_and_pass(tmp_path, capsys):
    assert check(write(tmp_path, GOOD | HARMLESS)) == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines() if "CMYK" in line] == [
        ["CMYK", "1", "converted", "to", "RGB"]
    ]
    assert "    a/cmyk.jpg\n" in printed
    assert "    b/misnamed.jpg (PNG)\n" in printed


def test_bad_images_fail_and_are_named(tmp_path, capsys):
    assert check(write(tmp_path, GOOD | HARMLESS | BAD), "--workers", 3) == EXIT_FOUND
    printed = capsys.readouterr().out
    assert "17 images read" in printed
    assert "5 of them unusable or contradictory" in printed
    for name in BAD:
        assert f"    {name}" in printed
    assert "    b/icon.jpg (ICO)\n" in printed
    assert "    a/twice.jpg (a and b)\n    b/once more.jpg (a and b)\n" in printed
    assert "--quarantine LIST" in printed


def test_files_that_are_no_images_are_counted(tmp_path, capsys):
    write(tmp_path / "train", GOOD | {"a/clip.webm": b"", "b/label.txt": b"", "b/other.txt": b""})
    write(tmp_path / "test", {"a/8.jpg": picture(98), "b/9.jpg": picture(99), "notes.csv": b"", ".hidden": b""})
    assert check(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "train: 3 files are not used: 2 .txt, 1 .webm\n" in printed
    assert "test: 1 file is not used: 1 .csv\n" in printed


def test_images_in_both_training_and_test_are_reported(tmp_path, capsys):
    write(tmp_path / "train", GOOD)
    write(tmp_path / "test", {"a/again.jpg": GOOD["a/1.jpg"], "b/new.jpg": picture(99)})
    assert check(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "in training and test images       2  used in both: accuracies are too high\n" in printed
    assert "    train: a/1.jpg\n    test: a/again.jpg\n" in printed


NAMES = [
    "caf\udce9.jpg",
    "new\nline.jpg",
    " leading.jpg",
    '"quoted".jpg',
    "\x1b[31mred.jpg",
    "\u2028.jpg",
    "tab\t1.jpg",
]


def test_any_name_is_shown_and_listed_and_found_again(tmp_path, capsys, notes):
    root = tmp_path / "data"
    write(root / "train", GOOD | {f"a/{name}": b"" for name in NAMES})
    write(root / "test", {"a/8.jpg": picture(98), "b/9.jpg": picture(99)})
    assert check(root, "--quarantine", tmp_path / "bad.txt") == EXIT_FOUND
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert r"    train: a/\x1b[31mred.jpg" in printed
    train = open_splits(parse(["--data.root", str(root), "--data.quarantine", str(tmp_path / "bad.txt")])).train
    assert notes.take() == []
    assert {train.name_of(row) for row in range(len(train))} == GOOD.keys()
    assert not train.defects


@pytest.mark.parametrize("kind", ["link", "dead link", "fifo"])
def test_the_list_never_overwrites_a_link_or_special_file(tmp_path, capsys, kind):
    root, listed, victim = write(tmp_path / "data", GOOD | BAD), tmp_path / "bad.txt", tmp_path / "victim"
    if kind == "fifo":
        os.mkfifo(listed)
    else:
        listed.symlink_to(victim)
        if kind == "link":
            victim.write_text("precious")
    assert check(root, "--quarantine", listed) == 2
    assert "bad.txt already exists" in capsys.readouterr().err
    assert victim.exists() == (kind == "link")


def test_only_the_first_of_many_names_are_shown(tmp_path, capsys):
    assert check(write(tmp_path, GOOD | {f"a/empty{number}.jpg": b"" for number in range(8)})) == EXIT_FOUND
    printed = capsys.readouterr().out
    assert "    a/empty4.jpg\n    and 3 more\n" in printed
    assert "empty5" not in printed


def test_the_list_excludes_exactly_the_bad_images_from_a_run(tmp_path):
    root = write(tmp_path / "data", {"train/" + name: content for name, content in (GOOD | HARMLESS | BAD).items()})
    write(root / "val", {"a/1.jpg": picture(50), "b/1.jpg": picture(51), "b/empty.jpg": b""})
    listed = tmp_path / "bad.txt"
    assert check(root, "--quarantine", listed) == EXIT_FOUND
    assert sorted(listed.read_text().splitlines()) == sorted([*BAD, "b/empty.jpg"])
    splits = open_splits(parse(["--data.root", str(root), "--data.quarantine", str(listed)]))
    assert sorted(splits.train.name_of(row) for row in range(len(splits.train))) == sorted(GOOD | HARMLESS)
    assert [splits.test.name_of(row) for row in range(len(splits.test))] == ["a/1.jpg", "b/1.jpg"]


def test_a_name_in_train_and_test_counts_twice_and_is_listed_once(tmp_path, capsys):
    root = write(tmp_path / "data", {"train/a/1.jpg": b"", "train/a/2.jpg": picture(1), "val/a/1.jpg": b""})
    assert check(root, "--quarantine", tmp_path / "bad.txt") == EXIT_FOUND
    assert "2 of them unusable" in capsys.readouterr().out
    assert (tmp_path / "bad.txt").read_text() == "a/1.jpg\n"


def test_train_and_test_images_are_distinguished(tmp_path, capsys):
    write(tmp_path / "train", {"a/1.jpg": picture(1), "b/1.jpg": b""})
    write(tmp_path / "test", {"a/1.jpg": b"", "b/1.jpg": picture(2)})
    assert check(tmp_path) == EXIT_FOUND
    assert "    train: b/1.jpg\n    test: a/1.jpg\n" in capsys.readouterr().out


def test_with_nothing_to_list_the_list_is_empty(tmp_path):
    assert check(write(tmp_path / "data", GOOD | HARMLESS), "--quarantine", tmp_path / "bad.txt") == 0
    assert (tmp_path / "bad.txt").read_bytes() == b""


def test_an_empty_list_may_be_overwritten_and_another_file_not(tmp_path, capsys):
    root = write(tmp_path / "data", GOOD | BAD)
    listed = tmp_path / "bad.txt"
    listed.touch()
    assert check(root, "--quarantine", listed) == EXIT_FOUND
    before = listed.read_bytes()
    assert check(root, "--quarantine", listed) == 2
    assert "bad.txt already exists; remove it or give the name of a new file" in capsys.readouterr().err
    assert listed.read_bytes() == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = write(tmp_path / "data", GOOD | BAD)
    monkeypatch.setattr(os, "fsync", full)
    assert check(root, "--quarantine", tmp_path / "bad.txt") == 2
    captured = capsys.readouterr()
    assert "bad.txt could not be written (No space left on device); give a file on a disk with room" in captured.err
    assert "a/empty.jpg" in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "unknown task for data ''"),
        (["chek"], "did you mean 'check'?"),
        (["check"], "root"),
        (["check", "no/such/folder"], "no/such/folder"),
        (["check", ".", "--workers", "0"], "--workers 0 was given; it must be at least 1"),
        (["check", ".", "--quarantine", "no/folder/bad.txt"], "no/folder must be a folder that can be written to"),
        (["check", ".", "--quarantin", "bad.txt"], "did you mean '--quarantine'?"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
