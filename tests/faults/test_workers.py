"""Input that never arrives: dead disks, dead or stopped worker processes, no shared memory; each is one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastssl_pipelines import ArraySource, TrainSampler, available_executors, build_executor
from fastssl_pipelines.errors import InputError, MachineError
from tests.pipelines.photos import NORMALIZATION, photo, plan_of

COUNT = 40


class Faulty(ArraySource):
    """Reading the image `broken` makes the process sleep forever, raise or die."""

    def __init__(self, fault):
        images = np.stack([photo(24, 24, seed) for seed in range(COUNT)])
        super().__init__("faulty", images, np.arange(COUNT) % 4, ("a", "b", "c", "d"))
        self.fault, self.broken = fault, 17

    def _act(self, index):
        if index == self.broken:
            self.fault()

    def encoded(self, index):
        self._act(index)
        return super().encoded(index)

    def pixels(self, index):
        self._act(index)
        return super().pixels(index)


def sleep():
    time.sleep(1000)


def nothing():
    pass


def no_descriptor():
    raise MachineError("this machine failed (Too many open files); raise the limit")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def crashed():
    os.kill(os.getpid(), signal.SIGSEGV)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def build(name, fault, workers=0, timeout_s=60.0):
    if reason := available_executors()[name]:
        pytest.skip(f"{name}: {reason}")
    return build_executor(name, Faulty(fault), workers=workers, timeout_s=timeout_s, **NORMALIZATION)


def stream(executor):
    steps = TrainSampler(plan_of(executor.source), batch_size=8)
    return list(executor.stream(steps, 0, 5))


def one_line(raised):
    text = str(raised.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


ANSWER_S = 4.0  # Time for a worker process to deliver a batch, once the fork server has imported torch


@pytest.fixture(scope="module")
def fork_server():
    """Start the fork server, after which worker processes start in milliseconds instead of seconds."""
    assert len(stream(build("torchvision", nothing, workers=1))) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [("torchvision", 0), pytest.param("torchvision", 1, marks=pytest.mark.slow), ("dali", 1)],
)
def test_a_dead_disk_ends_a_stream_in_time(name, workers, request):
    if name == "torchvision" and workers:
        request.getfixturevalue("fork_server")
    executor = build(name, sleep, workers, timeout_s=ANSWER_S if workers else 2.0)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"the batch of step \d was not ready within .*--train\.timeout-s") as raised:
        stream(executor)
    assert time.monotonic() - started < ANSWER_S + 30
    assert ("worker process" in one_line(raised)) == (name == "torchvision" and workers > 0)


@pytest.mark.slow
def test_a_dead_disk_ends_the_decoding_of_resident_in_time():
    with pytest.raises(InputError, match=r"image 0 of faulty, to be kept decoded, was not ready within 1 s.*timeout-s"):
        build("resident", sleep, timeout_s=1.0)


@pytest.mark.slow
def test_slow_but_steady_input_is_not_aborted():
    executor = build("torchvision", lambda: None, timeout_s=3.0)
    assert len(stream(executor)) == 5  # With everything imported and opened
    calls = []
    executor.source._act = lambda index: (calls.append(index), time.sleep(0.12))
    assert len(stream(executor)) == 5
    assert len(calls) * 0.12 > 3.0 * 1.5


@pytest.mark.parametrize(("name", "workers"), [("torchvision", 0), ("dali", 1)])
def test_a_machine_error_excludes_no_image(name, workers):
    executor = build(name, no_descriptor, workers)
    with pytest.raises(MachineError, match="this machine failed") as raised:
        stream(executor)
    one_line(raised)
    assert executor.unreadable == {}


def test_a_machine_error_ends_the_decoding_of_resident():
    with pytest.raises(MachineError, match="this machine failed"):
        build("resident", no_descriptor)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "word"), [(killed, "signal 9, Killed"), (crashed, "signal 11, Segmentation fault")])
def test_a_dead_worker_process_is_one_sentence(fault, word, capfd):
    before = threading.enumerate()  # Other tests leave stuck threads behind, on purpose
    executor = build("torchvision", fault, workers=1)
    with pytest.raises(InputError, match=rf"a worker process .*{word}.*--data\.workers.*fastssl resume") as raised:
        stream(executor)
    one_line(raised)
    assert "Traceback" not in capfd.readouterr().err
    assert executor._processes == []
    assert not [thread.name for thread in set(threading.enumerate()) - set(before) if "fastssl" in thread.name]


@pytest.mark.slow
def test_a_stopped_worker_process_ends_a_stream_in_time(fork_server):
    executor = build("torchvision", stopped, workers=1, timeout_s=ANSWER_S)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"was not ready within 4 s: a disk or a worker process does not respond"):
        stream(executor)
    assert time.monotonic() - started < ANSWER_S + 30


END = """
import sys
sys.path.insert(0, {root!r})
from tests.faults.test_workers import *

if __name__ == "__main__":
    if {workers}:
        stream(build({name!r}, nothing, workers={workers}))  # Starts the fork server
    try:
        stream(build({name!r}, {fault}, workers={workers}, timeout_s=3.0))
    except InputError as error:
        print(error)
        sys.exit(1)
"""


STUCK = [("torchvision", "sleep", 0), ("torchvision", "sleep", 1), ("torchvision", "stopped", 1), ("dali", "sleep", 1)]


@pytest.fixture(scope="module")
def stuck_processes(tmp_path_factory):
    """A process for each case of STUCK; all run at once, because they mostly wait."""
    root, started = str(Path(__file__).parents[2]), {}
    for name, fault, workers in STUCK:
        script = tmp_path_factory.mktemp("stuck") / "script.py"
        script.write_text(END.format(root=root, name=name, fault=fault, workers=workers))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name, fault, workers] = subprocess.Popen([sys.executable, str(script)], **pipes)
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("case", STUCK)
def test_a_process_with_stuck_input_can_exit(stuck_processes, case):
    out, errors = stuck_processes[case].communicate(timeout=100)
    assert (stuck_processes[case].returncode, errors) == (1, "")
    assert re.fullmatch(r"the batch of step \d was not ready within .*\n", out)


SMALL = "mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {python} {script}"
ROOM = """
import sys
sys.path.insert(0, {root!r})
from fastssl.observe.notes import NoteQueue
from tests.faults.test_workers import *

if __name__ == "__main__":
    with NoteQueue() as notes:
        executor = build({name!r}, lambda: None, workers=2)
        steps = TrainSampler(plan_of(executor.source), batch_size=32)
        batches = list(executor.stream(steps, 0, 120))
    print(len(batches), *notes.take(), sep="|")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("torchvision", "100k"), ("resident", "1m")])
def test_too_little_shared_memory_is_noted(tmp_path, name, size):
    script = tmp_path / "script.py"
    script.write_text(ROOM.format(root=str(Path(__file__).parents[2]), name=name))
    command = SMALL.format(size=size, python=sys.executable, script=script)
    if subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"120\|/dev/shm has \d+ MB free and the workers need .*--shm-size.*in this process.*\n", done.stdout
    )


def test_auto_names_the_image_that_made_it_slow(notes):
    source = Faulty(lambda: None)
    source.heights[5], source.widths[5] = 13000, 12000
    executor = build_executor("auto", source, workers=0, resident_gib=1.0, **NORMALIZATION)
    (note,) = notes.take()
    assert executor.name == "torchvision"
    assert (
        "image 5 of faulty has 12000 x 13000 pixels and all 40 images at the size of the largest take 17.4 GiB" in note
    )
    assert "--data.resident-gib" in note
    source.heights[:], source.widths[:] = 13000, 12000
    build_executor("auto", source, workers=0, resident_gib=1.0, **NORMALIZATION)
    assert notes.take() == []
