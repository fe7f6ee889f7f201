"""Untrusted checkpoint files: none runs code, takes more memory than its size, or hangs a run."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import resource
import shutil
import time
import zipfile

import pytest
import torch

from fastssl.cli import main
from fastssl.errors import ConfigError
from fastssl.train import checkpoint
from fastssl.train.checkpoint import Checkpoints, DamagedCheckpoint
from fastssl_pipelines.errors import MachineError
from tests.fastssl.test_runs import assert_same, final_state
from tests.faults.runs import sentence, train

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps; read-only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def newest(run):
    """The checkpoint that resume opens first."""
    return run / "checkpoints" / "step_000000004.pt"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/fastssl-evil",)


def sealed(path):
    """Append the matching checksum, as an attacker could."""
    content = path.read_bytes()
    path.write_bytes(content + checkpoint._trailer(hashlib.sha256(content).hexdigest()))


def with_other_pickle(path, content, *, compression=zipfile.ZIP_STORED):
    """A torch file whose pickle is replaced."""
    torch.save({"format": checkpoint.FORMAT, "step": 4}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else data)


def raw_pickle(path):
    path.write_bytes(pickle.dumps(Evil()))


def torch_pickle(path):
    torch.save(Evil(), path)


def old_torch_pickle(path):
    torch.save(Evil(), path, _use_new_zipfile_serialization=False)


def pickle_in_a_zip(path):
    with_other_pickle(path, pickle.dumps(Evil(), protocol=2))


def script(path):
    torch.jit.script(torch.nn.ReLU()).save(path)


def text(path):
    path.write_text("no checkpoint")


def empty(path):
    path.write_bytes(b"")


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def zip_bomb(path):
    with_other_pickle(path, bytes(300 * MEBIBYTE), compression=zipfile.ZIP_DEFLATED)


def bomb_that_lies(path):
    """Its directory claims that its one uncompressed entry has 8 GiB."""
    with_other_pickle(path, bytes(1000))
    with zipfile.ZipFile(path) as archive:
        (info, *_) = archive.infolist()
    content = path.read_bytes()
    size = info.file_size.to_bytes(4, "little")
    path.write_bytes(content.replace(size, (0x7FFFFFFF).to_bytes(4, "little")))


def deep_pickle(path):
    with_other_pickle(path, b"\x80\x02" + b"(" * 10 * MEBIBYTE + b".")


def many_keys(path):
    with_other_pickle(path, b"\x80\x02" + b"]" * 100_000 + b".")


CONTENTS = [raw_pickle, torch_pickle, old_torch_pickle, pickle_in_a_zip, script, text, empty, other_zip]
CONTENTS += [zip_bomb, bomb_that_lies, deep_pickle, many_keys]


@pytest.mark.slow
@pytest.mark.parametrize("seal", [False, True], ids=["as it is", "with a right checksum"])
@pytest.mark.parametrize("content", CONTENTS, ids=lambda f: f.__name__)
def test_an_untrusted_file_counts_as_damaged_and_runs_nothing(run, newest, finished, recwarn, content, seal):
    content(newest)
    if seal:
        sealed(newest)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedCheckpoint, match=r"step_000000004\.pt") as error:
        checkpoint.load(newest)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 256 * 1024
    assert not os.path.exists("/tmp/fastssl-evil")
    assert [str(warning.message) for warning in recwarn if "TorchScript" in str(warning.message)] == []
    assert main(["resume", str(run)]) == 0
    assert_same(final_state(run), final_state(finished))
    assert (run / "checkpoints" / "step_000000004.pt.damaged").exists()


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def device(path):
    path.symlink_to("/dev/zero")


def dead_link(path):
    path.symlink_to("/nowhere")


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("kind", [pipe, folder, device, dead_link, loop], ids=lambda f: f.__name__)
def test_anything_but_a_regular_file_is_moved_aside_at_once(run, newest, finished, kind):
    newest.unlink()
    kind(newest)
    started = time.monotonic()
    assert main(["resume", str(run)]) == 0
    assert time.monotonic() - started < 20
    assert_same(final_state(run), final_state(finished))
    assert main(["eval", "knn", str(run)]) == 0


@pytest.mark.parametrize("kind", [pipe, folder, device, dead_link, loop], ids=lambda f: f.__name__)
def test_evaluating_anything_but_a_regular_file_is_one_sentence(run, newest, capsys, kind):
    newest.unlink()
    kind(newest)
    capsys.readouterr()
    assert main(["eval", "knn", str(run), "--checkpoint", str(newest)]) == 2
    assert "step_000000004.pt" in sentence(capsys)


def fails(code, path):
    """An `os.open` that fails for this path."""
    real = os.open

    def function(name, *arguments, **options):
        if os.fspath(name) == os.fspath(path):
            raise OSError(code, os.strerror(code), name)
        return real(name, *arguments, **options)

    return function


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_failing_machine_does_not_move_a_good_checkpoint(run, newest, monkeypatch, capsys, code):
    before = newest.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails(code, newest))
        with pytest.raises(MachineError, match=os.strerror(code)):
            Checkpoints(newest.parent, keep=2).newest()
        capsys.readouterr()
        assert main(["resume", str(run)]) == 1
        assert os.strerror(code) in sentence(capsys)
    assert newest.read_bytes() == before
    assert main(["resume", str(run)]) == 0


def test_a_checkpoint_without_read_permission_is_not_moved(run, newest, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails(errno.EACCES, newest))
        with pytest.raises(ConfigError, match="may not be read") as error:
            Checkpoints(newest.parent, keep=2).newest()
        assert not isinstance(error.value, DamagedCheckpoint)
        capsys.readouterr()
        assert main(["resume", str(run)]) == 2
        assert "may not be read (Permission denied)" in sentence(capsys)
    assert newest.exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["anywhere", "header and trailer"])
def test_every_flipped_bit_of_a_real_checkpoint_is_detected(newest, where):
    good = newest.read_bytes()
    generator = random.Random(0)
    edges = [*range(64), *range(len(good) - 200, len(good))]
    for position in generator.sample(range(len(good)), 100) if where == "anywhere" else edges:
        data = bytearray(good)
        data[position] ^= 1 << generator.randrange(8)
        newest.write_bytes(data)
        with pytest.raises(DamagedCheckpoint):
            checkpoint.load(newest)


@pytest.mark.slow
def test_a_huge_sparse_file_is_detected_without_memory(run, newest, monkeypatch):
    """Half a GiB, as reading a TiB of zeros would take an hour; the point is that it is streamed."""
    newest.unlink()
    with newest.open("wb") as file:
        file.truncate(2**29)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedCheckpoint):
        checkpoint.load(newest)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 * 1024
