"""`python -m bench step`: compare MoCo training steps of fastssl, lightly and a plain loop in one process."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch

from fastssl.arguments import parse
from fastssl.benchmark.harness import require_file, torch_threads, wait, write_json
from fastssl.benchmark.step_variants import as_training, synthetic_batches
from fastssl.config import Config, ModelConfig, OptimConfig, TrainConfig
from fastssl.device import choose_device, choose_dtype
from fastssl.errors import ConfigError
from fastssl.methods.moco import MoCoV2Config
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl.presets import load
from fastssl.validation import Count, Images, Range, Rows, Threads, check
from fastssl_pipelines.batch import Batch

from . import run_record
from .moco_steps import IMPLEMENTATIONS, LR, MOMENTUM, SETTINGS, TEMPERATURE, Setting, Step, ours
from .peers import Unavailable

BEST, SHIPPED = "fastssl, at its best", "lightly as shipped"
FIRST_STEPS = 3  # Untimed; their losses are shown
TARGET = 4.0  # Times the speed of lightly as shipped


@dataclass(frozen=True)
class Options:
    """Time and loss of a MoCo v2 step, ResNet-18 for 32 px, random views in memory; all implementations in turn."""

    batch_size: Images = 64
    queue_size: Rows = 4096
    width: Annotated[float, Range(above=0, most=16)] = 1.0
    """Of the ResNet-18."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Threads | None = None
    """CPU threads; by default torch's."""
    steps: Count = 5
    """Steps of a round."""
    repeats: Count = 5
    """Rounds; each measures every implementation once."""
    json: Path | None = None
    """JSON file for the settings and results."""


@dataclass
class Row:
    """Measurements of one implementation; the lists have a value per round."""

    name: str
    setting: str
    losses: list[float] = field(default_factory=list)
    """Of the first steps; all implementations start from the same weights and queue."""
    images_per_s: list[float] = field(default_factory=list)
    slower_than_best: list[float] = field(default_factory=list)
    """Speed of fastssl at its best over this one's, in the same round; a busy machine slows a whole round."""
    slower_than_equal: list[float] = field(default_factory=list)
    """The same for fastssl in the same setting."""
    note: str = ""


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and write the JSON; ConfigError for options that cannot be met."""
    options = parse(Options, arguments, prog="python -m bench step")
    check(options)
    require_file("--json", options.json)
    if options.queue_size % options.batch_size:
        raise ConfigError(
            f"--queue-size {options.queue_size} was given with --batch-size {options.batch_size}; it must be a multiple"
            " of it, as the other implementations cannot wrap around the end of their queue"
        )
    config = configuration(options)
    device = choose_device(config.train)
    torch.backends.cudnn.benchmark = True  # For all implementations; TF32 stays at torch's default
    with torch_threads(options.threads):
        facts = run_record.environment(["python", "-m", "bench", "step", *arguments], device)
        rows = measure(config, device, options)
    facts |= {"settings": asdict(options), "targets": targets(rows)}
    show(facts, rows)
    if options.json is not None:
        write_json(options.json, {**facts, "rows": [asdict(row) for row in rows]})
        print(options.json)


def configuration(options: Options) -> Config:
    """The shared configuration: plain SGD, batch norm over the batch, keys not shuffled, as in lightly's example."""
    preset = load("mocov2-cifar10")
    return replace(
        preset,
        model=ModelConfig(encoder="resnet18", stem="small", width=options.width, norm="local"),
        method=MoCoV2Config(
            temperature=TEMPERATURE, queue_size=options.queue_size, momentum=MOMENTUM, head="mlp", shuffle=False
        ),
        optim=OptimConfig(lr=LR, momentum=0, weight_decay=0),
        train=TrainConfig(batch_size=options.batch_size, device=options.device),
    )


def measure(config: Config, device: torch.device, options: Options) -> list[Row]:
    """A row per implementation and setting; the first is fastssl with the settings that a run chooses."""
    batches = synthetic_batches(config, device)
    chosen = Setting("chosen", choose_dtype(config.train, device), torch.channels_last)
    rows, running = [], []
    for setting, names in [(chosen, (BEST,)), *((setting, tuple(IMPLEMENTATIONS)) for setting in SETTINGS)]:
        own = [as_training(batch, setting.dtype, setting.layout) for batch in batches]
        for name in names:
            shown = SHIPPED if (name, setting.name) == ("lightly", "fp32") else name
            row = Row(shown, setting.name)
            rows.append(row)
            try:
                step = ours(config, device, setting) if name == BEST else IMPLEMENTATIONS[name](config, device, setting)
            except Unavailable as error:
                row.note = str(error)
                continue
            row.losses = [step(own[index % len(own)]).item() for index in range(FIRST_STEPS)]
            running.append((row, step, own))
    for turn in range(1, options.repeats + 1):
        print(f"round {turn} of {options.repeats}", file=sys.stderr)
        for row, step, own in running:
            row.images_per_s.append(rate(step, own, options.steps, device))
    _compare(rows)
    return rows


def rate(step: Step, batches: Sequence[Batch], steps: int, device: torch.device) -> float:
    """Images/s over `steps` steps, after an untimed one."""
    step(batches[-1])
    wait(device)
    started = time.perf_counter()
    for index in range(steps):
        step(batches[index % len(batches)])
    wait(device)
    return steps * len(batches[0].ids) / (time.perf_counter() - started)


def _compare(rows: Sequence[Row]) -> None:
    """Fill in the ratios."""

    def ratios(faster: Row, slower: Row) -> list[float]:
        return [a / b for a, b in zip(faster.images_per_s, slower.images_per_s, strict=True)]

    equal = {row.setting: row for row in rows if row.name == "fastssl"}
    for row in rows:
        if row.images_per_s:
            row.slower_than_best = ratios(rows[0], row)
            row.slower_than_equal = ratios(equal[row.setting], row) if row.setting in equal else []


def targets(rows: Sequence[Row]) -> list[str]:
    """A sentence per target: met or missed by the median over the rounds."""
    sentences = []
    for row in rows:
        if row.name == SHIPPED and row.slower_than_best:
            sentences.append(f"{TARGET:g} times the speed of {row.name}: {_verdict(row.slower_than_best, TARGET)}")
        if row.name not in (BEST, "fastssl") and row.slower_than_equal:
            sentences.append(f"not slower than {row.name} in {row.setting}: {_verdict(row.slower_than_equal, 1)}")
    return sentences


def _verdict(ratios: Sequence[float], target: float) -> str:
    low, middle, high = np.quantile(ratios, (0.2, 0.5, 0.8))
    return f"{'met' if middle >= target else 'missed'}, {middle:.3g} times (p20 {low:.3g}, p80 {high:.3g})"


def show(facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """Print the table, and below it the targets and the conditions."""
    screen, settings = open_screen(least_width=130), facts["settings"]
    title = f"MoCo v2 step, ResNet-18 of 32 px, {settings['batch_size']} images, {settings['queue_size']} keys"
    measured = ("images/s", "p20 p80", "ms", "fastssl", "at equal setting", f"losses of {FIRST_STEPS} steps")
    table = Table(("", "setting", *measured), "llrrrrrr", title)
    for row in rows:
        table.add_row(row.name, row.setting, *_cells(row, settings["batch_size"]))
    screen.table(table)
    for line in [
        *facts["targets"],
        "fp32: contiguous; bf16: autocast and channels_last; chosen: what a run of fastssl chooses here",
        "all start from the same weights and queue and use plain SGD; views are in memory",
        f"{facts['device']}, {facts['device_state']} before; medians of {settings['repeats']} rounds",
        *(f"{row.name}, {row.setting}: {row.note}" for row in rows if row.note),
    ]:
        screen.line(f"  {line}")


def _cells(row: Row, batch_size: int) -> list[str]:
    """Empty if nothing was measured."""
    if not row.images_per_s:
        return []
    low, middle, high = np.quantile(row.images_per_s, (0.2, 0.5, 0.8))
    return [
        f"{middle:.0f}",
        f"{low:.0f} {high:.0f}",
        f"{1e3 * batch_size / middle:.1f}",
        *(f"{median(ratios):.2f} x" if ratios else "" for ratios in (row.slower_than_best, row.slower_than_equal)),
        " ".join(f"{loss:.5f}" for loss in row.losses),
    ]
