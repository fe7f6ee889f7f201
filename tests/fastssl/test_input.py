"""Runs with bad images and with options of the input path."""

from __future__ import annotations

import json

import pytest

from fastssl.cli import main
from tests.pipelines.photos import save_photos

TINY = (
    "--model.width 0.0625 --model.splits 2 --model.stem small-pool --method.queue-size 64 --train.batch-size 16"
    " --train.log-every 1 --train.steps 9"
)


@pytest.fixture
def root(tmp_path):
    """Two classes of 120 images each; one training image is cut, another is not an image."""
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        paths = save_photos(folder, 120, height=40, width=40, seed=label)
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[: len(content) // 2])
    paths[4].write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("pipeline", ["resident", "torchvision", "dali"])
def test_a_run_continues_past_bad_images_and_logs_them(pipeline, root, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = f"mocov2-cifar10 {TINY} --data.root {root} --data.pipeline {pipeline} --run.dir {run}"
    assert main(["pretrain", *arguments.split()]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    notes = [record["text"] for record in records if record["event"] == "note"]
    assert len(notes) == 2
    for name in ("003.jpg", "004.jpg"):
        assert any(name in note and "takes its place" in note for note in notes)
        assert name in (run / "console.log").read_text()
    assert [record["unreadable"] for record in records if record["event"] == "train"][-1] == 2


def test_data_check_finds_them_and_a_run_without_them_logs_nothing(root, tmp_path, capsys):
    listed, run = tmp_path / "bad.txt", tmp_path / "run"
    assert main(["data", "check", str(root), "--quarantine", str(listed)]) == 1
    assert listed.read_text().split() == ["dog/003.jpg", "dog/004.jpg"]
    arguments = f"mocov2-cifar10 {TINY} --data.root {root} --data.quarantine {listed} --run.dir {run}"
    assert main(["pretrain", *arguments.split()]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not any(record["event"] == "note" for record in records)
    assert next(record for record in records if record["event"] == "start")["images"] == 214


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.prefetch 0", "--data.prefetch 0 was given; it must be at least 1"),
        ("--data.resident-gib -1", "--data.resident-gib -1.0 was given; it must be at least 0"),
        ("--data.decode gpu --data.pipeline dali --train.batch-size 16", "--data.decode gpu was given with device cpu"),
        ("--data.decode fast", "--data.decode"),
    ],
)
def test_unusable_options_are_one_sentence(option, words, root, capsys):
    assert main(["pretrain", "mocov2-cifar10", "--train.device", "cpu", "--data.root", str(root), *option.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
