"""Runs of half a second for the tests of faults, and how their refusals are read."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastssl.cli import main

BATCH = 8
TINY = (
    f"--train.batch-size {BATCH} --train.device cpu --train.checkpoint-every 2 --train.log-every 1 --data.workers 0 "
    "--model.width 0.0625 --model.splits 2 --method.queue-size 32 --eval.every-epochs 100"
).split()
PICTURES = ["--data.pictures", "40"]


def train(folder, *more, steps=4, data=PICTURES, preset="quickstart"):
    """The exit code of a new tiny run in `folder`."""
    return main(["pretrain", preset, *TINY, *data, "--train.steps", str(steps), "--run.dir", str(folder), *more])


def refusal(capsys, arguments):
    """The one sentence with which a command refuses its arguments, exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    return sentence(capsys)


def sentence(capsys):
    """The one line that a command left on stderr."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = error.splitlines()
    assert line.startswith("fastssl")
    return line


def image_folder(folder, count=12, classes=("cat", "dog")):
    """Class folders of small PNG files; returns `folder`."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def contents(folder):
    """Every file under a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
