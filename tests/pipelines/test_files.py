from __future__ import annotations

import errno
import os
import resource
import socket

import pytest

from fastssl_pipelines.errors import MachineError
from fastssl_pipelines.files import new_file, open_regular, open_to_append, read_file, read_text, write_atomic


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert read_file(tmp_path / name, at_most_bytes=7) == b"content"


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "folder", "socket"])
def test_other_than_regular_files_are_refused_at_once(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.fspath(path))
    else:
        path = "/dev/zero"
    before = len(os.listdir("/proc/self/fd"))
    for read in (open_regular, lambda p: read_file(p, at_most_bytes=10)):
        with pytest.raises(OSError, match=r"regular|No such device") as error:
            read(path)
        assert not isinstance(error.value, MachineError)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_beyond_the_limit_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(2**42)  # Sparse
    with pytest.raises(OSError, match="at most 1000 are allowed") as error:
        read_file(tmp_path / "giant", at_most_bytes=1000)
    assert error.value.errno == errno.EFBIG


def test_descriptors_that_run_out_are_the_machines_fault(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(MachineError, match="says nothing about the file") as error:
            read_file(tmp_path / "a", at_most_bytes=10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_disk_that_fails_is_the_machines_fault(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(MachineError, match=os.strerror(number)):
        open_regular(tmp_path / "a")


def test_bytes_that_are_not_utf8_survive_reading_as_text(tmp_path):
    (tmp_path / "list").write_bytes(b"caf\xe9.jpg\n")
    assert os.fsencode(read_text(tmp_path / "list")) == b"caf\xe9.jpg\n"


def test_a_write_replaces_a_link_and_not_its_target(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("out", "out.tmp", "new"):
        (tmp_path / name).symlink_to(victim)
    write_atomic(tmp_path / "out", b"written")
    with new_file(tmp_path / "new") as file:
        file.write(b"written")
    assert victim.read_text() == "precious"
    assert (tmp_path / "out").read_text() == (tmp_path / "new").read_text() == "written"
    assert not (tmp_path / "out").is_symlink()
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(tmp_path / "log")
    assert victim.read_text() == "precious"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "out").write_text("before")
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "missing" / "out", b"x")
    os.mkdir(tmp_path / "folder")
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "folder", b"x")
    assert (tmp_path / "out").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]


def test_appending_creates_the_file_or_continues_at_its_end(tmp_path):
    for part in (b"one", b"two"):
        with open_to_append(tmp_path / "log") as file:
            file.write(part)
    assert (tmp_path / "log").read_bytes() == b"onetwo"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="regular"):
        open_to_append(tmp_path / "fifo")
