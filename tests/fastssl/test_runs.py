"""Complete runs through the command line: output files, stopping, resuming and bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.commands.pretrain import parse
from fastssl.data import open_splits

TINY = [
    "--data.pictures",
    "240",
    "--train.batch-size",
    "16",
    "--model.width",
    "0.0625",
    "--model.splits",
    "2",
    "--method.queue-size",
    "64",
    "--train.log-every",
    "1",
    "--train.checkpoint-every",
    "5",
    "--eval.every-epochs",
    "2",
]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder):
    return torch.load(sorted((folder / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def assert_same(a, b):
    """Assert that two checkpoints are equal bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same(a[key], b[key])
        elif isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(["pretrain", *TINY, "--run.dir", str(folder), "--train.steps", "40"]) == 0
    return folder


def test_a_run_writes_the_documented_files(undisturbed):
    lines = records(undisturbed)
    assert lines[0]["event"] == "start"
    assert lines[-1]["event"] == "end"
    train = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 41))
    assert all(line["loss"] > 0 and line["images_per_s"] > 0 for line in train)
    assert all(0 <= line["contrast_accuracy"] <= 1 for line in train)
    evaluations = [line for line in lines if line["event"] == "eval"]
    assert [line["step"] for line in evaluations] == [0, 30, 40]
    assert all(0 <= line["knn_top1"] <= 100 for line in evaluations)
    assert lines[-1]["knn_top1"] == evaluations[-1]["knn_top1"]
    assert lines[-1]["untrained_top1"] == evaluations[0]["knn_top1"]
    assert json.loads((undisturbed / "config.json").read_text())["train"]["steps"] == 40
    assert json.loads((undisturbed / "env.json").read_text())["torch"] == torch.__version__.split("+")[0]
    text = (undisturbed / "console.log").read_text()
    for word in ("contrast accuracy", "images/s", "left", "raw pixels", str(undisturbed)):
        assert word in text
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step_000000035.pt",
        "step_000000040.pt",
    ]


def interrupted(folder, signum, at_step):
    """Start the same run in a separate process and send it a signal once `at_step` is logged."""
    command = [
        sys.executable,
        "-m",
        "fastssl",
        "pretrain",
        *TINY,
        "--run.dir",
        str(folder),
        "--train.steps",
        "40",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and f'"step": {at_step},' in metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signum)
    process.wait(timeout=60)
    assert len([line for line in records(folder) if line["event"] == "train"]) < 40
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_stopped_run_ends_with_the_same_weights(undisturbed, tmp_path, signum):
    folder = tmp_path / "run"
    code = interrupted(folder, signum, at_step=8)
    assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 75)
    assert main(["resume", str(folder)]) == 0
    assert_same(final_state(folder), final_state(undisturbed))
    comparable = [
        [
            (line["event"], line["step"], line.get("loss"), line.get("knn_top1"))
            for line in records(run)
            if line["event"] != "start"
        ]
        for run in (folder, undisturbed)
    ]
    assert comparable[0] == comparable[1]


def test_a_run_stopped_before_its_first_checkpoint_starts_over(undisturbed, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((undisturbed / "config.json").read_text())
    (run / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "train", "step": 1, "loss": 9}\n{"eve')
    assert main(["resume", str(run)]) == 0
    assert_same(final_state(run), final_state(undisturbed))
    assert [line["event"] for line in records(run)].count("start") == 1


def test_resuming_a_finished_run_changes_nothing(undisturbed, capsys):
    before = final_state(undisturbed)
    assert main(["resume", str(undisturbed)]) == 0
    assert_same(final_state(undisturbed), before)
    assert [line["event"] for line in records(undisturbed)].count("end") == 1


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "data"


SMALL = [
    "--train.batch-size",
    "16",
    "--model.width",
    "0.0625",
    "--model.splits",
    "2",
    "--method.queue-size",
    "64",
    "--train.steps",
    "3",
    "--train.log-every",
    "1",
    "--data.workers",
    "0",
]


@pytest.mark.parametrize("pipeline", ["dali", "torchvision", "resident"])
@pytest.mark.parametrize("preset", ["mocov2-cifar10", "unimoco-cifar10"])
def test_presets_train_on_a_folder_with_every_pipeline(image_folder, tmp_path, preset, pipeline):
    folder = tmp_path / "run"
    arguments = ["--data.root", str(image_folder), "--data.pipeline", pipeline, "--run.dir", str(folder)]
    assert main(["pretrain", preset, *SMALL, *arguments]) == 0
    assert [line["event"] for line in records(folder)] == [
        "start",
        "eval",
        "train",
        "train",
        "train",
        "eval",
        "end",
    ]


def test_a_few_images_still_leave_one_for_testing(image_folder):
    small = image_folder / "test"
    for path in list((small / "dog").iterdir())[:4]:
        path.unlink()
    train, test = open_splits(parse(["mocov2-cifar10", "--data.root", str(small)]))
    assert (len(train), len(test)) == (7, 1)


def test_a_folder_without_a_test_split_is_tested_on_held_out_images(image_folder, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--data.root", str(image_folder / "train"), "--run.dir", str(folder)]
    assert main(["pretrain", "mocov2-cifar10", *SMALL, *arguments]) == 0
    assert records(folder)[0]["images"] == 48 - 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pretrain mocov2-cifar10", ["--data.root"]),
        ("pretrain mocov2-cifar10 --data.root /no/such/folder", ["/no/such/folder", "--data.root"]),
        (
            "pretrain mocov2-cifar10 --data.root {data} --train.batch-size 64",
            ["64", "48", "--train.batch-size"],
        ),
        ("pretrain mocov2-cifra10", ["mocov2-cifra10", "did you mean"]),
        ("pretrain --train.bath-size 5", ["--train.bath-size", "did you mean '--train.batch-size'"]),
        ("pretrain --model.encoder resnet19", ["resnet19", "did you mean 'resnet18'"]),
        ("pretrain --train.device cuda", ["cuda"]),
        ("pretrain --run.dir {data}", ["{data}", "already"]),
        ("pretrain --data.pictures 240 --run.dir {data}/config.json", ["{data}/config.json", "--run.dir"]),
        ("resume /no/such/run", ["/no/such/run"]),
        ("resume", ["RUN"]),
        ("pretrian", ["pretrian", "did you mean 'pretrain'"]),
        ("methods all", ["all"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, image_folder, capsys):
    if "--train.device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here, so asking for it is no mistake")
    (image_folder / "config.json").touch()
    assert main(arguments.format(data=image_folder).split()) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word.format(data=image_folder) in error


def test_of_two_runs_that_start_together_the_later_is_refused(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"

    class Slow:
        """Let another run take the folder while this trainer is built."""

        identity: ClassVar[dict] = {}

        def __init__(self, config, folder, notes):
            folder.mkdir()
            (folder / "config.json").write_text("theirs")

    monkeypatch.setattr("fastssl.train.trainer.Trainer", Slow)
    assert main(["pretrain", *TINY, "--run.dir", str(folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock"]
    assert (folder / "config.json").read_text() == "theirs"


@pytest.mark.parametrize("pipeline", ["dali", "torchvision", "resident"])
@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_an_unreadable_image_is_named(image_folder, tmp_path, capsys, pipeline, damage):
    (victim, *_) = sorted((image_folder / "train" / "cat").glob("*.jpg"))
    victim.write_bytes(b"no image" if damage == "garbage" else victim.read_bytes()[:-200])
    arguments = [
        "--data.root",
        str(image_folder),
        "--data.pipeline",
        pipeline,
        "--run.dir",
        str(tmp_path / "run"),
    ]
    assert main(["pretrain", "mocov2-cifar10", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert str(victim) in error
    assert len(error.splitlines()) == 1


def test_a_damaged_checkpoint_is_named(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text((undisturbed / "config.json").read_text())
    (run / "checkpoints" / "step_000000005.pt").write_bytes(b"torn")
    assert main(["resume", str(run)]) == 2
    assert "step_000000005.pt" in capsys.readouterr().err


def test_a_non_finite_loss_stops_the_run_and_keeps_the_good_checkpoints(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run.dir", str(folder), "--train.steps", "40", "--optim.lr", "1e30"]
    assert main(["pretrain", *arguments]) == 1
    assert "--optim.lr" in capsys.readouterr().err
    for path in (folder / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)["method"]
        assert all(torch.isfinite(value).all() for value in state.values())


def test_list_commands_and_help_show_names_and_options(capsys):
    assert main(["methods"]) == 0
    assert main(["presets"]) == 0
    assert main(["doctor"]) == 0
    assert main(["slurm"]) == 0
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "unimoco",
        "2103.10773",
        "mocov2-cifar10",
        "82.6",
        "torchvision",
        "blockwise",
        "triton",
        "resume RUN",
        "scontrol requeue",
    ):
        assert word in text
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--data.label-fraction" in text
    assert "Share of each class" in text
