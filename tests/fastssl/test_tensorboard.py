"""TensorBoard shows the values of a run's records, every step once."""

from __future__ import annotations

import errno
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter

from fastssl.errors import ConfigError
from fastssl.observe.tensorboard import TensorBoardMirror


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch):
    """TensorBoard reads files in name order; names end in a global counter, and 10 would come before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def shown(folder) -> dict[str, dict[int, float]]:
    """Values by name and step, as TensorBoard loads them; asserts that no step appears twice."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert all(len({value.step for value in values}) == len(values) for values in scalars.values())
    return {name: {value.step: value.value for value in values} for name, values in scalars.items()}


def write(mirror: TensorBoardMirror, start: int, steps: range, loss: float) -> None:
    mirror.write("start", {"step": start, "total_steps": 100})
    for step in steps:
        mirror.write("train", {"step": step, "loss": loss, "ids": [1], "action": "none"})


def slowed(function):
    def later(*arguments):
        time.sleep(0.02)
        return function(*arguments)

    return later


def test_values_are_on_disk_when_write_returns(tmp_path, monkeypatch):
    monkeypatch.setattr(RecordWriter, "write", slowed(RecordWriter.write))
    mirror = TensorBoardMirror(tmp_path)
    write(mirror, 0, range(1, 3), 0.5)
    mirror.write("eval", {"step": 2, "knn_top1": 62.5, "seconds": 1.0})
    mirror.write("note", {"step": 2, "text": "a note"})
    found = shown(tmp_path)
    mirror.close()
    assert found == {"train/loss": {1: 0.5, 2: 0.5}, "eval/knn_top1": {2: 62.5}, "eval/seconds": {2: 1.0}}


def test_a_resumed_run_shows_every_step_once(tmp_path):
    first = TensorBoardMirror(tmp_path)
    write(first, 0, range(1, 9), 1.0)
    first.close()
    second = TensorBoardMirror(tmp_path)
    write(second, 5, range(6, 11), 2.0)
    second.close()
    assert shown(tmp_path)["train/loss"] == {**dict.fromkeys(range(1, 6), 1.0), **dict.fromkeys(range(6, 11), 2.0)}


def test_a_restarted_run_hides_the_first_attempt(tmp_path):
    for top1 in (1.0, 2.0):
        mirror = TensorBoardMirror(tmp_path)
        mirror.write("start", {"step": 0})
        mirror.write("eval", {"step": 0, "knn_top1": top1})
        mirror.close()
    assert shown(tmp_path)["eval/knn_top1"] == {0: 2.0}


def test_a_run_that_goes_back_to_a_checkpoint_hides_the_discarded_steps(tmp_path):
    mirror = TensorBoardMirror(tmp_path)
    write(mirror, 0, range(1, 9), 1.0)
    mirror.write("non_finite", {"step": 5, "broken_step": 8, "loss": float("nan"), "ids": [1]})
    for step in range(6, 9):
        mirror.write("train", {"step": step, "loss": 2.0})
    mirror.close()
    assert shown(tmp_path)["train/loss"] == {**dict.fromkeys(range(1, 6), 1.0), **dict.fromkeys(range(6, 9), 2.0)}


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    mirror = TensorBoardMirror(tmp_path)
    write(mirror, 0, range(1, 3), 1.0)
    (tmp_path / "tensorboard").unlink()
    mirror.write("train", {"step": 3, "loss": 1.0})
    assert shown(tmp_path)["train/loss"] == {3: 1.0}
    mirror.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Of TensorBoard's thread
def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    mirror = TensorBoardMirror(tmp_path)
    write(mirror, 0, range(1, 3), 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        for step in range(3, 6):
            mirror.write("train", {"step": step, "loss": 1.0})
    # TensorBoard can report a failure one record later
    for step in range(6, 8):
        mirror.write("train", {"step": step, "loss": 1.0})
    assert {1, 2, 7} <= set(shown(tmp_path)["train/loss"]) <= {1, 2, 6, 7}
    monkeypatch.setattr(RecordWriter, "flush", full)
    mirror.close()


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"fastssl-pretrain\[tensorboard\]"):
        TensorBoardMirror(tmp_path)
    assert list(tmp_path.iterdir()) == []
