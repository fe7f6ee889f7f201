"""Tiny runs of half a second for the fault tests, and how to read their errors."""

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
    """Train a new tiny run in `folder`; returns the exit code."""
    return main(["pretrain", preset, *TINY, *data, "--train.steps", str(steps), "--run.dir", str(folder), *more])


def refusal(capsys, arguments):
    """Run a command that must be refused with exit code 2; returns its one-sentence error."""
    capsys.readouterr()
    assert main(arguments) == 2
    return sentence(capsys)


def sentence(capsys):
    """The one line that a command printed to stderr."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = error.splitlines()
    assert line.startswith("fastssl")
    return line


def image_folder(folder, count=12, classes=("cat", "dog")):
    """Write class folders of small PNG files; returns `folder`."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def contents(folder):
    """The bytes of every file under a folder, by path."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
