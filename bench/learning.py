"""`python -m bench learning`: what every method learns from CIFAR-10 photographs within one small budget."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any

from fastssl import cli
from fastssl.arguments import parse
from fastssl.config import Config, RunConfig, to_json
from fastssl.device import choose_device
from fastssl.errors import TrainingError, unknown_name
from fastssl.methods.moco import MoCoV1Config
from fastssl.methods.queue_method import MomentumConfig
from fastssl.observe.metrics_log import MetricsLog
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl.presets import load

from . import run_record

LABELED = ("supcon", "unimoco")
METHODS = ("mocov1", "mocov2", "mocov2-symmetric", "mixco", "unmix", "co2", "ressl", "msvq", "smog", *LABELED)
BUDGET = ("epochs", "batch_size", "width", "queue_size", "momentum", "lr", "warmup_epochs", "seed")


@dataclass(frozen=True)
class Options:
    """Train each method's CIFAR-10 preset with the same small encoder, batch, length, optimizer and seed; evaluate it.

    Finished runs in --runs are taken as they are, so that a long list can be cut into several calls.
    """

    root: Path
    """Folder with CIFAR-10 as train/ and test/, a folder a class."""
    methods: tuple[str, ...] = METHODS
    fractions: tuple[float, ...] = (0.1,)
    """Label fractions, for the methods that use labels."""
    epochs: int = 6
    batch_size: int = 128
    width: float = 0.25
    """Of the ResNet-18, whose stem gets a max-pool."""
    queue_size: int = 512
    momentum: float = 0.98
    """Of the momentum encoder."""
    lr: float = 0.2
    warmup_epochs: int = 1
    seed: int = 0
    runs: Path = Path("runs/learning")
    """Folder for the run folders."""
    out: Path = Path("bench/results")
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Row:
    """One run: top-1 in percent on the test images, by kNN with k = 200 after each epoch, and of the linear probe."""

    method: str
    label_fraction: float | None
    """None for a method that uses no labels."""
    untrained_top1: float
    knn_top1: float
    linear_top1: float
    raw_pixels_top1: float
    epochs: dict[int, float]
    steps: int
    images_per_s: float
    """Median over the log lines."""


def main(arguments: Sequence[str]) -> Path:
    """Run what the arguments ask for and has not been run yet; print the table, write the JSON, return its path."""
    options = parse(Options, arguments, prog="python -m bench learning")
    runs = list(variants(options))
    facts = run_record.environment(["python -m bench learning", shlex.join(arguments)], choose_device(runs[0][1].train))
    rows = [_row(name, config) for name, config in runs]
    _show(rows)
    budget = {field: getattr(options, field) for field in BUDGET}
    path = run_record.write(options.out, "learning", {**facts, "budget": budget}, rows)
    print(path)
    return path


def variants(options: Options) -> Iterator[tuple[str, Config]]:
    """Name and configuration of every run."""
    for name in options.methods:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
        for fraction in options.fractions if name in LABELED else (1.0,):
            folder = options.runs / (f"{name}-{fraction:g}" if name in LABELED else name)
            yield name, _cut(_preset(name), options, folder, fraction)


def _preset(name: str) -> Config:
    if name == "mocov1":  # which its authors have for ImageNet alone
        return replace(load("mocov2-cifar10"), method=MoCoV1Config())
    return load(f"{name}-cifar10")


def _cut(preset: Config, options: Options, folder: Path, fraction: float) -> Config:
    """The method, views and temperatures of a preset; all else is the same for every method."""
    method = replace(preset.method, momentum=options.momentum)  # type: ignore[call-arg]
    if isinstance(method, MomentumConfig):
        # batch norm in the head gets a short run out of the collapse it starts in
        method = replace(method, queue_size=options.queue_size, head="mlp-bn", hidden_dim=None)
    return replace(
        preset,
        seed=options.seed,
        run=RunConfig(dir=folder),
        data=replace(preset.data, root=options.root.absolute(), label_fraction=fraction),
        model=replace(preset.model, width=options.width, stem="small-pool", norm="local"),
        method=method,
        optim=replace(preset.optim, lr=options.lr, schedule="cosine", warmup_epochs=options.warmup_epochs),
        train=replace(preset.train, epochs=options.epochs, batch_size=options.batch_size),
        eval=replace(preset.eval, every_epochs=1),
    )


def _row(name: str, config: Config) -> Row:
    records = _finished(config)
    end, steps = records[-1], [record for record in records if record["event"] == "train"]
    evaluations = {record["step"]: record["knn_top1"] for record in records if record["event"] == "eval"}
    per_epoch = end["step"] // config.train.epochs
    return Row(
        method=name,
        label_fraction=config.data.label_fraction if name in LABELED else None,
        untrained_top1=end["untrained_top1"],
        knn_top1=end["knn_top1"],
        linear_top1=_linear_top1(config),
        raw_pixels_top1=end["raw_pixels_top1"],
        epochs={step // per_epoch: top1 for step, top1 in evaluations.items()},
        steps=end["step"],
        images_per_s=median(record["images_per_s"] for record in steps),
    )


def _finished(config: Config) -> list[dict[str, Any]]:
    """The records of a run that has come to its end, now or in an earlier call."""
    folder = config.run.dir
    assert folder is not None
    log = MetricsLog(folder / "metrics.jsonl")
    if not (records := log.read()) or records[-1].get("reason") != "finished":
        with NamedTemporaryFile("w", suffix=".json") as file:
            file.write(to_json(config))
            file.flush()
            started = (folder / "config.json").exists()
            new = ["pretrain", "--config", file.name, "--run.dir", str(folder)]
            code = cli.main(["resume", str(folder)] if started else new)
        if code:
            raise TrainingError(f"the run in {folder} ended with exit code {code}; call again to resume it")
    return log.read()


def _linear_top1(config: Config) -> float:
    """Of the cached protocol of `fastssl eval linear`, measured now or in an earlier call."""
    assert config.run.dir is not None
    path = config.run.dir / "eval-linear.json"
    if not path.exists() and (code := cli.main(["eval", "linear", str(config.run.dir)])):
        raise TrainingError(f"the linear evaluation of {config.run.dir} ended with exit code {code}")
    return json.loads(path.read_text(encoding="utf-8"))["top1"]


def _show(rows: Sequence[Row]) -> None:
    headings = ("method", "labels", "kNN untrained", "kNN", "linear", "images/s")
    table = Table(headings, "lrrrrr", "top-1 on the test images, %")
    for row in rows:
        labels = "" if row.label_fraction is None else f"{row.label_fraction:.0%}"
        numbers = [f"{value:.2f}" for value in (row.untrained_top1, row.knn_top1, row.linear_top1)]
        table.add_row(row.method, labels, *numbers, f"{row.images_per_s:.0f}")
    open_screen().table(table)
