"""Few descriptors and special files: a limit is reported as the machine's, and no file blocks a reader."""

from __future__ import annotations

import os
import resource

import pytest

from fastssl_pipelines import DataError, ImageFolder, open_source
from fastssl_pipelines.errors import MachineError
from tests.pipelines.test_shards import png, shard

GIB = 2**30


def test_100_shards_with_64_descriptors(tmp_path):
    for number in range(100):
        shard(tmp_path / f"{number:03}.tar", {"a/1.png": png(number), "a/2.png": png(number)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, len(os.listdir("/proc/self/fd")) + 20), hard))
    try:
        source, other = open_source(tmp_path), open_source(tmp_path)
        assert (len(source), len(source.defects)) == (200, 0)
        for i in range(200):
            assert source.pixels(i)[0, 0, 0] == other.pixels(i)[0, 0, 0] == i // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_no_descriptor_left_is_the_machines_fault(tmp_path, kind):
    if kind == "folder":
        (tmp_path / "1.png").write_bytes(png(1))
        (tmp_path / "2.png").write_bytes(png(2))
    else:
        shard(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2)})
    source = open_source(tmp_path)
    assert source.encoded(0) == png(1)
    if kind == "shards":  # Read through a descriptor that stays open
        source = open_source(tmp_path)
        source._listing.archives.__init__(str(tmp_path), source._listing.files)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(MachineError, match=r"this machine failed \(Too many open files.*ulimit -n"):
            source.encoded(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert source.encoded(1) == png(2)


def test_special_files_count_as_unreadable_images(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c.png").symlink_to("/dev/tty")
    (tmp_path / "d.png").symlink_to("d.png")
    (tmp_path / "e.png").symlink_to("nowhere")
    with (tmp_path / "f.png").open("wb") as file:
        file.truncate(6 * GIB)
    source = ImageFolder(tmp_path)
    assert sorted(source.name_of(i) for i in source.defects) == [f"{name}.png" for name in "abcdef"]
    assert ["it is not a regular file" in source.defects[row] for row in (3, 4)] == [True, True]
    # A file that was an image when it was listed
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"0\.png cannot be read \(it is not a regular file\)"):
        source.encoded(0)
