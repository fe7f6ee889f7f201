"""The learning table: the same budget for every method, and values from the runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import learning
from bench.__main__ import main
from fastssl.methods import METHODS

BUDGET = ["--epochs", "1", "--batch-size", "8", "--width", "0.0625", "--queue-size", "16", "--warmup-epochs", "0"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_every_method_is_in_the_table_with_one_budget(root: Path) -> None:
    options = learning.Options(root=root, fractions=(0.0, 0.5), runs=root / "runs")
    runs = list(learning.variants(options))
    assert {config.method.name for _, config in runs} == set(METHODS)
    assert len({str(config.run.dir) for _, config in runs}) == len(runs) == 13
    first = runs[0][1]
    for _, config in runs:
        assert (config.model, config.optim, config.train, config.eval) == (
            first.model,
            replace(first.optim, milestones=config.optim.milestones),
            replace(first.train, checkpoint_every=config.train.checkpoint_every),
            first.eval,
        )
        assert config.data == replace(first.data, label_fraction=config.data.label_fraction)
        assert (config.method.momentum, config.seed) == (0.98, 0)
        assert getattr(config.method, "queue_size", 512) == 512
    fractions = {name: config.data.label_fraction for name, config in runs if name == "unimoco"}
    assert fractions == {"unimoco": 0.5}


def test_the_table_has_the_values_of_the_runs_and_finished_runs_are_not_repeated(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["learning", "--root", str(root), "--methods", "mocov2", "unimoco", "--fractions", "1.0", *BUDGET]
    arguments += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("learning-*.json")
    result = json.loads(path.read_text())
    assert [(row["method"], row["label_fraction"]) for row in result["rows"]] == [("mocov2", None), ("unimoco", 1.0)]
    assert result["budget"]["epochs"] == 1
    log = (tmp_path / "runs" / "mocov2" / "metrics.jsonl").read_text()
    end = json.loads(log.splitlines()[-1])
    row = result["rows"][0]
    assert (row["knn_top1"], row["untrained_top1"], row["steps"]) == (end["knn_top1"], end["untrained_top1"], 3)
    linear = json.loads((tmp_path / "runs" / "mocov2" / "eval-linear.json").read_text())
    assert row["linear_top1"] == linear["top1"]
    assert row["epochs"] == {"0": end["untrained_top1"], "1": end["knn_top1"]}
    assert "unimoco" in capsys.readouterr().out
    assert main(arguments) == 0
    assert (tmp_path / "runs" / "mocov2" / "metrics.jsonl").read_text() == log


def test_an_unknown_method_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learning", "--root", str(root), "--methods", "mocov9"]) == 2
    assert "unknown method 'mocov9'" in capsys.readouterr().err
