"""`python -m bench learning`: accuracy of every method after the same short training on CIFAR-10 photographs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any

from fastssl import cli
from fastssl.arguments import parse
from fastssl.config import Config, RunConfig, to_json
from fastssl.device import choose_device
from fastssl.errors import TrainingError, unknown_name
from fastssl.methods import METHODS
from fastssl.methods.shared_options import HeadConfig
from fastssl.observe.metrics_log import MetricsLog
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl.presets import PRESETS, load

from . import run_record

DATA = "CIFAR-10"
BASE = "mocov2-cifar10"  # Recipe of the methods that have none on this data set
BUDGET = ("epochs", "batch_size", "width", "queue_size", "momentum", "lr", "warmup_epochs", "seed")


@dataclass(frozen=True)
class Options:
    """Train and evaluate each method on CIFAR-10 with the same small encoder, batch, length, optimizer and seed.

    Finished runs in --runs are not repeated, so a long list can be split into several calls.
    """

    root: Path
    """Folder with CIFAR-10 as train/ and test/, one folder per class."""
    methods: tuple[str, ...] = ()
    """Methods, or presets without "-cifar10"; by default all, including those of plug-ins."""
    fractions: tuple[float, ...] = (0.1,)
    """Label fractions for the methods that use labels."""
    epochs: int = 6
    batch_size: int = 128
    width: float = 0.25
    """Width of the ResNet-18, whose stem gets a max-pool."""
    queue_size: int = 512
    momentum: float = 0.98
    """Momentum of the momentum encoder."""
    lr: float = 0.2
    warmup_epochs: int = 1
    seed: int = 0
    runs: Path = Path("runs/learning")
    """Folder for the run folders."""
    out: Path = Path("bench/results")
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Row:
    """One run: top-1 in percent on the test images by kNN with k = 200 after each epoch, and by the linear probe."""

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
    """Run what is not finished yet, print the table, write the JSON file and return its path."""
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
    recipes = _recipes()
    for name in options.methods or recipes:
        if name not in recipes:
            raise unknown_name("method", name, recipes)
        labeled = _uses_labels(recipes[name])
        for fraction in options.fractions if labeled else (1.0,):
            folder = options.runs / (f"{name}-{fraction:g}" if labeled else name)
            yield name, _with_budget(recipes[name], options, folder, fraction)


def _recipes() -> dict[str, Config]:
    """The presets on CIFAR-10 by name; a method without one has the recipe of MoCo v2 if that has the right views."""
    recipes = {name.removesuffix("-cifar10"): load(name) for name, preset in PRESETS.items() if preset.data == DATA}
    without = METHODS.keys() - {config.method.name for config in recipes.values()}
    for name in sorted(without):
        if getattr(METHODS[name], "number_of_views", None) == len(load(BASE).views):
            recipes[name] = replace(load(BASE), method=METHODS[name].Config())
    return recipes


def _uses_labels(config: Config) -> bool:
    return METHODS[config.method.name].uses_labels


def _with_budget(preset: Config, options: Options, folder: Path, fraction: float) -> Config:
    """The method, views and temperatures of a preset; the rest is the same for every method."""
    budget: dict[str, Any] = {"momentum": options.momentum, "queue_size": options.queue_size}
    if isinstance(preset.method, HeadConfig):
        # Batch norm in the head gets a short run out of its initial collapse
        budget |= {"head": "mlp-bn", "hidden_dim": None}
    own = {field.name for field in fields(preset.method)}
    method = replace(preset.method, **{name: value for name, value in budget.items() if name in own})
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
        label_fraction=config.data.label_fraction if _uses_labels(config) else None,
        untrained_top1=end["untrained_top1"],
        knn_top1=end["knn_top1"],
        linear_top1=_linear_top1(config),
        raw_pixels_top1=end["raw_pixels_top1"],
        epochs={step // per_epoch: top1 for step, top1 in evaluations.items()},
        steps=end["step"],
        images_per_s=median(record["images_per_s"] for record in steps),
    )


def _finished(config: Config) -> list[dict[str, Any]]:
    """The records of a run, which is first run to its end if necessary."""
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
    """Accuracy of the cached protocol of `fastssl eval linear`, which is run if necessary."""
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
        accuracies = [f"{value:.2f}" for value in (row.untrained_top1, row.knn_top1, row.linear_top1)]
        table.add_row(row.method, labels, *accuracies, f"{row.images_per_s:.0f}")
    open_screen().table(table)
