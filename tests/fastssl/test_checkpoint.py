"""Checkpoints: saving, retention, damaged files and full disks."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
import zipfile

import pytest
import torch

from fastssl.errors import ConfigError, TrainingError
from fastssl.train import checkpoint
from fastssl.train.checkpoint import Checkpoints, DamagedCheckpoint
from tests.fastssl.test_runs import assert_same


def a_state(value=1.0):
    return {
        "method": {"weight": torch.full((3, 4), value), "labels": torch.arange(5)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(value), "mean": torch.full((2,), value, dtype=torch.bfloat16)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0], "name": "all", "fused": None}],
        },
    }


def steps(folder):
    return [int(path.stem.removeprefix("step_")) for path in checkpoint.checkpoints(folder)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def file(folder):
    return checkpoint.save(folder, a_state(), step=7, keep=2)


def fail(error=errno.ENOSPC):
    def function(*_arguments, **_options):
        raise OSError(error, os.strerror(error))

    return function


def test_a_state_is_restored_unchanged(folder, notes):
    Checkpoints(folder, keep=2).save(a_state(), step=7, wait=True)
    reader = Checkpoints(folder, keep=2)
    expected = {"format": checkpoint.FORMAT, "step": 7, **a_state()}
    assert_same(state := reader.newest(), expected)
    assert state["optimizer"]["state"][0]["mean"].dtype == torch.bfloat16
    assert notes.take() == []
    (path,) = checkpoint.checkpoints(folder)
    assert_same(checkpoint.load(path), expected)
    # Other programs can read it too
    assert_same(torch.load(path, weights_only=True), expected)
    assert_same(torch.load(path, weights_only=True, mmap=True), expected)
    assert zipfile.ZipFile(path).testzip() is None


def test_memory_format_and_views(folder):
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoints = Checkpoints(folder, keep=9)
    checkpoints.save({"image": image, "row": torch.randn(1000, 100)[3]}, step=2, wait=True)
    assert checkpoints.newest()["image"].is_contiguous(memory_format=torch.channels_last)
    assert checkpoint.checkpoints(folder)[0].stat().st_size < 10_000  # Saves the row without the rest of its storage


def test_newest_is_none_without_checkpoints(folder):
    assert Checkpoints(folder, keep=1).newest() is None
    folder.mkdir(parents=True)
    (folder / "step_000000004.tmp").touch()
    assert Checkpoints(folder, keep=1).newest() is None


@pytest.fixture
def gate(monkeypatch):
    """An event that writes wait for."""
    gate, fsync = threading.Event(), os.fsync

    def slow(descriptor):
        assert gate.wait(30)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    yield gate
    gate.set()


def test_changes_after_save_are_not_saved(folder, gate):
    checkpoints = Checkpoints(folder, keep=2)
    state = a_state(1.0)
    checkpoints.save(state, step=1)
    state["method"]["weight"].add_(5)
    state["optimizer"]["state"][0]["step"].add_(5)
    state["optimizer"]["param_groups"][0]["lr"] = 0.7
    assert steps(folder) == []  # Still being written
    gate.set()
    checkpoints.flush()
    assert_same(checkpoints.newest(), {"format": checkpoint.FORMAT, "step": 1, **a_state(1.0)})


def test_a_second_save_waits_for_the_first(folder, gate):
    checkpoints = Checkpoints(folder, keep=5)
    checkpoints.save(a_state(1.0), step=1)
    second = threading.Thread(target=checkpoints.save, args=(a_state(2.0),), kwargs={"step": 2})
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(30)
    checkpoints.flush()
    assert [checkpoint.load(path)["method"]["weight"][0, 0] for path in checkpoint.checkpoints(folder)] == [1.0, 2.0]


def test_only_tensors_and_plain_types_are_accepted(folder):
    with pytest.raises(TypeError, match=r"method\.path is of type .*Path"):
        Checkpoints(folder, keep=1).save({"method": {"path": folder}}, step=1)


@pytest.mark.parametrize(
    ("keep", "keep_every", "expected"),
    [(1, None, [10]), (3, None, [8, 9, 10]), (2, 4, [4, 8, 9, 10]), (1, 5, [5, 10]), (20, 3, list(range(1, 11)))],
)
def test_retention(folder, keep, keep_every, expected):
    checkpoints = Checkpoints(folder, keep=keep, keep_every=keep_every)
    for step in range(1, 11):
        checkpoints.save(a_state(), step=step)
    checkpoints.flush()
    assert steps(folder) == expected


def test_other_files_stay_and_leftovers_are_removed(folder):
    folder.mkdir(parents=True)
    for name in ("step_best.pt", "mine.pt", "step_000000009.tmp"):
        (folder / name).touch()
    Checkpoints(folder, keep=1).save(a_state(), step=3, wait=True)
    assert {path.name for path in folder.iterdir()} == {"step_best.pt", "mine.pt", "step_000000003.pt"}


def test_a_checkpoint_of_a_later_step_does_not_displace_the_new_one(folder):
    checkpoint.save(folder, a_state(), step=40, keep=1)
    checkpoint.save(folder, a_state(), step=25, keep=1)
    assert steps(folder) == [25, 40]


def test_every_flipped_bit_is_detected(file, tmp_path):
    generator = random.Random(0)
    good = file.read_bytes()
    path = tmp_path / "changed.pt"
    checksum = range(len(good) - 80, len(good))
    for position in (*generator.sample(range(len(good)), 800), *checksum):
        data = bytearray(good)
        data[position] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(DamagedCheckpoint):
            checkpoint.load(path)


def test_every_truncation_is_detected(file, tmp_path):
    good = file.read_bytes()
    path = tmp_path / "torn.pt"
    for length in (*range(0, len(good) - 300, 61), *range(len(good) - 300, len(good))):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedCheckpoint):
            checkpoint.load(path)


DAMAGE = {
    "torn": lambda good: good[: len(good) // 2],
    "flipped": lambda good: good[:200] + bytes([good[200] ^ 8]) + good[201:],
    "empty": lambda good: b"",
    "foreign": lambda good: b"not a checkpoint at all",
    "longer": lambda good: good + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used(folder, damage, notes):
    writer = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        writer.save(a_state(step), step=step)
    writer.flush()
    newest = checkpoint.checkpoints(folder)[-1]
    newest.write_bytes(bad := DAMAGE[damage](newest.read_bytes()))
    reader = Checkpoints(folder, keep=2)
    assert reader.newest()["step"] == 2
    (note,) = notes.take()
    assert "step_000000003.pt" in note
    assert "step_000000003.pt.damaged" in note
    assert (folder / "step_000000003.pt.damaged").read_bytes() == bad
    # It is not tried again, and does not count for retention
    again = Checkpoints(folder, keep=2)
    assert again.newest()["step"] == 2
    assert notes.take() == []
    again.save(a_state(3), step=3, wait=True)
    assert steps(folder) == [2, 3]


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(folder):
    for step in (1, 2):
        checkpoint.save(folder, a_state(), step=step, keep=2).write_bytes(b"torn")
    for _ in range(2):  # Nor at the second attempt
        with pytest.raises(ConfigError, match=r"step_000000001.*step_000000002"):
            Checkpoints(folder, keep=2).newest()


def test_an_unreadable_file_is_skipped(folder, notes):
    checkpoint.save(folder, a_state(), step=1, keep=2)
    (folder / "step_000000002.pt").symlink_to("nowhere")
    reader = Checkpoints(folder, keep=2)
    assert reader.newest()["step"] == 1
    (note,) = notes.take()
    assert "No such file" in note


@pytest.mark.parametrize("version", [2, 5])
def test_another_format_is_refused_and_kept(folder, version):
    folder.mkdir(parents=True)
    path = folder / "step_000000005.pt"
    torch.save({"format": version, "step": 5}, path)
    with pytest.raises(ConfigError, match=f"format {version}.*reads formats 3 and 4") as error:
        Checkpoints(folder, keep=1).newest()
    assert not isinstance(error.value, DamagedCheckpoint)
    assert path.exists()


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "fastssl_pipelines.files.new_file"])
def test_a_failed_write_interrupts_nothing_and_keeps_older_checkpoints(folder, monkeypatch, where, notes):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(a_state(1), step=1, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(where, fail())
        checkpoints.save(a_state(2), step=2)
        checkpoints.save(a_state(3), step=3)
        with pytest.raises(TrainingError, match=f"step 3 .*No space left.*fastssl resume {folder.parent}"):
            checkpoints.flush()
    assert [text.split(" (")[0] for text in notes.take()] == [
        f"the checkpoint after step {step} was not written" for step in (2, 3)
    ]
    assert [path.name for path in folder.iterdir()] == ["step_000000001.pt"]
    checkpoints.save(a_state(4), step=4, wait=True)
    assert steps(folder) == [4]


def test_a_failed_write_is_logged_once(folder, monkeypatch, notes):
    checkpoints = Checkpoints(folder, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(errno.EROFS))
        checkpoints.save(a_state(1), step=1)
        with pytest.raises(TrainingError):
            checkpoints.save(a_state(2), step=2, wait=True)
        checkpoints.save(a_state(3), step=3)
        checkpoints.close()
    first, third = notes.take()  # The second one is the error
    assert "step 1 was not written (Read-only file system" in first
    assert "step 3 was not written (Read-only file system" in third


@pytest.fixture
def room():
    """Limits the size of files that this process writes; the kernel shortens a longer write, then raises EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 500, 300_000, 800_000])
def test_a_disk_that_fills_up_in_the_middle_of_a_file(folder, room, size):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(a_state(1.0), step=1, wait=True)
    room(size)
    checkpoints.save({"weight": torch.zeros(100_000), "other": torch.zeros(100_000)}, step=2)
    with pytest.raises(TrainingError, match="step 2 was not written \\(File too large"):
        checkpoints.flush()
    room(resource.RLIM_INFINITY)
    assert [path.name for path in folder.iterdir()] == ["step_000000001.pt"]
    checkpoints.save(a_state(3.0), step=3, wait=True)
    assert steps(folder) == [3]


@pytest.mark.gpu
def test_a_state_on_a_gpu_is_copied_before_later_updates_and_into_the_same_memory(folder):
    checkpoints = Checkpoints(folder, keep=3)
    weight = torch.zeros(64, 1 << 18, device="cuda")
    addresses = set()
    for step in (1, 2, 3):
        weight.fill_(step)
        checkpoints.save({"weight": weight}, step=step)
        weight.fill_(-1)  # Queued behind the copy
        (buffer,) = checkpoints._pinned.values()
        assert buffer.is_pinned()
        addresses.add(buffer.data_ptr())
    checkpoints.flush()
    assert len(addresses) == 1
    for step, path in enumerate(checkpoint.checkpoints(folder), 1):
        assert torch.equal(checkpoint.load(path)["weight"], torch.full((64, 1 << 18), float(step)))
