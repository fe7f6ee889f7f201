"""Run folders modified by others: links, pipes and devices in them, and folders that disappear."""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime

import pytest

from fastssl import run_folder as folders
from fastssl.cli import main
from fastssl.train.checkpoint import Checkpoints
from tests.fastssl.test_runs import final_state, records
from tests.faults.runs import PICTURES, TINY, contents, refusal, sentence, train

WRITTEN = (
    "lock",
    "config.json.tmp",
    "env.json",
    "env.json.tmp",
    "metrics.jsonl",
    "metrics.jsonl.tmp",
    "console.log",
    "report.html",
    "report.html.tmp",
    "eval-knn.json",
    "eval-knn.json.tmp",
    "checkpoints/step_000000004.tmp",
    "checkpoints/step_000000004.pt",
)
COMMANDS = {"resume": ["resume"], "report": ["report"], "eval": ["eval", "knn"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps; read-only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it without the last checkpoint, so that resume has something to write."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_000000004.pt").unlink()
    return tmp_path / "run"


def plant(path, kind, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "kind", ["link", "pipe", *(pytest.param(k, marks=pytest.mark.slow) for k in ("device", "folder"))]
)
@pytest.mark.parametrize("name", WRITTEN)
def test_links_and_devices_in_a_run_folder_are_not_followed(run, tmp_path, capsys, name, kind):
    """Every command ends soon, with success or one sentence, and does not change the target."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    plant(run / name, kind, victim)
    started = time.monotonic()
    for command in COMMANDS.values():
        capsys.readouterr()
        code = main([*command, str(run)])
        assert code in (0, 1, 2)
        if code:
            assert str(run) in sentence(capsys)
    assert time.monotonic() - started < 30
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["config.json", "checkpoints", "metrics.jsonl", "console.log", "lock"])
def test_a_new_run_follows_no_links_either(tmp_path, capsys, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    plant(tmp_path / "run" / name, "link", victim)
    code = train(tmp_path / "run")
    assert victim.read_text() == "precious"
    if name in ("metrics.jsonl", "console.log"):
        assert code == 0
    else:
        assert code in (1, 2)
        assert str(tmp_path / "run") in sentence(capsys)


@pytest.fixture
def at_checkpoint(monkeypatch):
    """Call a function when the checkpoint after a step has been submitted for writing."""

    def at(step, call):
        save = Checkpoints.save

        def and_then(self, state, **options):
            save(self, state, **options)
            if options["step"] == step:
                self.flush()
                monkeypatch.setattr(Checkpoints, "save", save)
                call()

        monkeypatch.setattr(Checkpoints, "save", and_then)

    return at


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 4))])
@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "without its configuration"])
def test_a_run_whose_folder_disappears_ends_with_one_sentence(tmp_path, capsys, at_checkpoint, how, step):
    run = tmp_path / "run"

    def strike():
        if how == "removed":
            shutil.rmtree(run)
        elif how == "without its configuration":
            (run / "config.json").unlink()
        else:
            run.rename(tmp_path / "elsewhere")
            if how == "replaced":
                shutil.copytree(tmp_path / "elsewhere", run)

    at_checkpoint(step, strike)
    assert train(run) == 1
    error = sentence(capsys)
    assert "was removed or replaced" in error
    assert str(run) in error
    if how == "moved":
        assert final_state(tmp_path / "elsewhere")["step"] == step
        assert main(["resume", str(tmp_path / "elsewhere")]) == 0


def test_two_runs_in_the_same_second_have_separate_folders(tmp_path, monkeypatch):
    class Midnight(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1)

    monkeypatch.setattr(folders, "datetime", Midnight)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert train_by_default() == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"quickstart-20260101-000000{end}" for end in ("", "-2", "-3")]
    assert all(records(tmp_path / "runs" / name)[-1]["reason"] == "finished" for name in names)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_by_default("--data.root", "/no/such/folder") == 2
    assert list((tmp_path / "runs").iterdir()) == []
    assert "/no/such/folder" in sentence(capsys)


def train_by_default(*more):
    return main(["pretrain", *TINY, *PICTURES, "--train.steps", "1", *more])


def test_a_folder_name_may_have_any_bytes(tmp_path, capsys):
    name = os.fsdecode(b"run $x_ \xe9\n\x1b[31m %s")
    run = tmp_path / name
    assert train(run, "--run.tensorboard") == 2
    assert "--run.tensorboard" in sentence(capsys)
    shutil.rmtree(run)
    assert train(run) == 0
    assert main(["resume", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["plot", str(run)]) == 0
    assert main(["eval", "knn", str(run)]) == 0
    capsys.readouterr()
    assert b"\x1b" not in b"".join(text for path, text in contents(run).items() if path.suffix in (".html", ".log"))
    shutil.rmtree(run / "checkpoints")
    assert r"\xe9\n\x1b[31m" in refusal(capsys, ["eval", "knn", str(run)])


def test_in_a_read_only_folder_an_evaluation_lacks_only_its_file(finished, monkeypatch, capsys):
    def fail(path, content):
        raise OSError(30, os.strerror(30), path)

    monkeypatch.setattr("fastssl.commands.evaluate.write_atomic", fail)
    assert main(["eval", "knn", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "could not be written (Read-only file system)" in out
