"""`fastssl bench input`: compare images/s of all input pipelines and conventional ones, on the same files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch

from fastssl.arguments import Positional, parse
from fastssl.benchmark import rates
from fastssl.benchmark.harness import require_file, write_json
from fastssl.benchmark.input_variants import Candidate, Result, candidates
from fastssl.config import Config
from fastssl.data import split_roots
from fastssl.device import choose_device, choose_dtype
from fastssl.environment import measured_on
from fastssl.errors import ConfigError
from fastssl.executor import worker_count
from fastssl.observe.screen import DelayedProgressBar, open_screen
from fastssl.observe.table import Table
from fastssl.presets import load
from fastssl.validation import Checked, Count, Images, Seconds, Threads
from fastssl_pipelines.executors.base import available_executors
from fastssl_pipelines.names import printable
from fastssl_pipelines.sources.base import Source, Subset
from fastssl_pipelines.sources.index import cache_folder
from fastssl_pipelines.sources.open import open_source
from fastssl_pipelines.synthetic.photos import write_photographs

IMAGES_AT_MOST = 50_000  # Of a large data set, so that its files fit into the page cache
SEED = 0

Pipeline = Literal["dali", "torchvision", "resident"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Compares images/s of the input pipelines with Pillow in a DataLoader and with DALI's own random operators."""

    preset: Annotated[str, Positional] = "mocov2-imagenet"
    """preset whose views and normalization are used"""
    root: Path | None = None
    """images, like --data.root of a run; by default, generated photographs in ImageNet's sizes"""
    images: Images = 512
    """photographs to generate if there is no --root; they are cached"""
    workers: Threads | None = None
    """threads or processes of every candidate; by default like --data.workers of a run"""
    batch_size: Images = 64
    """images per batch"""
    seconds: Seconds = 5.0
    """length of each measurement"""
    repeats: Count = 3
    """rounds, each of which measures every candidate once"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device for the views"""
    pipelines: tuple[Pipeline, ...] = ()
    """input pipelines to measure; by default all that work here"""
    json: Path | None = None
    """file for all results"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_file("--json", self.json)


def main(arguments: list[str]) -> int:
    """Run `fastssl bench input [PRESET] [--option VALUE ...]`."""
    return run(parse(Options, arguments, prog="fastssl bench input"))


def run(options: Options) -> int:
    """Measure, print the table and write the JSON; ConfigError or DataError for impossible options."""
    config = _configuration(options)
    pipelines = _pipelines(options.pipelines)
    device = choose_device(config.train)
    dtype = choose_dtype(config.train, device)
    facts = measured_on(device)  # Before this command adds load
    root = options.root or photographs(options.images)
    with DelayedProgressBar() as progress:
        source = _readable(open_source(split_roots(root)[0], progress=progress))
    if options.batch_size > len(source):
        raise ConfigError(
            f"--batch-size {options.batch_size} was given; it must be at most the {len(source)} images of {source.name}"
        )
    facts = {
        **facts,
        "settings": {
            **asdict(options),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "workers": worker_count(config.data, device),
        },
        "views": [asdict(view) for view in config.views],
        "images": {"source": source.name, "count": len(source), "mean_bytes": _read_all(source)},
        "plan_ms": {"views": rates.PLANNED_VIEWS, "median": rates.plan_ms(config, source)},
    }
    chosen = list(candidates(config, source, root, device, dtype, pipelines))
    results = _measured(chosen, repeats=options.repeats, seconds=options.seconds)
    show(facts, results)
    if options.json is not None:
        write_json(options.json, {**facts, "results": [asdict(result) for result in results]})
        print(printable(str(options.json)))
    return 0


def photographs(count: int) -> Path:
    """A folder of `count` generated photographs, cached between calls."""
    folder = cache_folder() / f"photographs-{count}-seed-{SEED}"
    if not folder.is_dir():
        print(f"generating {count} photographs in {folder}", file=sys.stderr)
        partial_folder = folder.with_suffix(".partial")
        write_photographs(partial_folder, count, seed=SEED, workers=torch.get_num_threads())
        partial_folder.rename(folder)
    return folder


def show(facts: dict[str, Any], results: list[Result]) -> None:
    """Print the table, how it was measured, and the notes."""
    screen = open_screen(least_width=120)
    settings, images, plan = (facts[name] for name in ("settings", "images", "plan_ms"))
    sizes = ", ".join(f"{view['size']} px" for view in facts["views"])
    headings = ("", "images/s", "p20 p80", "to Pillow", "augment off", "decode", "resize", "augment", "start s")
    table = Table(headings, "lrrrrrrrr", f"{settings['preset']}: views of {sizes}")
    for result in results:
        table.add_row(result.name, *_cells(result, results[0]))
    screen.table(table)
    lines = [
        f"{images['count']} images of {images['source']}, {images['mean_bytes'] / 1e3:.1f} KB each, in the page cache",
        f"{facts['device']}, views of fastssl in {settings['dtype']}, as training takes them here;"
        f" {facts['cores']} cores, load {facts['load_average']:.2f} before;"
        f" {settings['workers']} workers, batches of {settings['batch_size']}; medians of {settings['repeats']} rounds",
        "images/s count an image with all its views; decode, resize and augment are shares of the time of a single"
        " batch, on a CPU in one thread",
        f"planning {plan['views']} views takes {plan['median']:.2f} ms",
        *(f"{result.name}: {note}" for result in results for note in result.notes),
    ]
    for line in lines:
        screen.line(f"  {line}")


def _cells(result: Result, baseline: Result) -> list[str]:
    """The cells after the name; none if nothing was measured."""
    if not result.images_per_s:
        return []
    low, middle, high = np.quantile(result.images_per_s, (0.2, 0.5, 0.8))
    # Per round, since other load slows whole rounds
    ratio = median(ours / theirs for ours, theirs in zip(result.images_per_s, baseline.images_per_s, strict=True))
    start = f"{median(result.start_s):.1f}"
    if not result.stages_ms:
        return [f"{middle:.0f}", f"{low:.0f} {high:.0f}", f"{ratio:.2f}", "", "", "", "", start]
    decode, crops, batch = (median(result.stages_ms[stage]) for stage in rates.STAGES)
    shares = (f"{part / batch:.0%}" for part in (decode, crops - decode, batch - crops))
    off = f"{median(result.augment_off_images_per_s):.0f}"
    return [f"{middle:.0f}", f"{low:.0f} {high:.0f}", f"{ratio:.2f}", off, *shares, start]


def _pipelines(names: Sequence[str]) -> Sequence[str]:
    missing = available_executors()
    for name in names:
        if missing[name]:
            raise ConfigError(f"--pipelines {name} was given; it does not work here: {missing[name]}")
    return names or [name for name, reason in missing.items() if reason is None]


def _configuration(options: Options) -> Config:
    preset = load(options.preset)
    return replace(
        preset,
        seed=SEED,
        data=replace(preset.data, workers=options.workers, label_fraction=1.0),
        model=replace(preset.model, norm="local"),  # Allows any batch size
        train=replace(preset.train, batch_size=options.batch_size, device=options.device),
        odd_views=(),
    )


def _readable(source: Source) -> Source:
    """At most IMAGES_AT_MOST images without known defects, spread evenly over the source."""
    rows = np.setdiff1d(np.arange(len(source)), list(source.defects))
    kept = np.linspace(0, len(rows) - 1, min(len(rows), IMAGES_AT_MOST)).astype(np.int64)
    return source if len(kept) == len(source) else Subset(source, rows[kept])


def _read_all(source: Source) -> float:
    """Read all files into the page cache; returns their mean size in bytes."""
    return float(np.mean([len(source.encoded(index)) for index in range(len(source))]))


def _measured(chosen: Sequence[Candidate], *, repeats: int, seconds: float) -> list[Result]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As in the threads of a stream
    try:
        for round_number in range(1, repeats + 1):
            for candidate in chosen:
                print(f"round {round_number} of {repeats}: {candidate.result.name}", file=sys.stderr)
                candidate.measure(seconds)
    finally:
        torch.set_num_threads(threads)
    return [candidate.result for candidate in chosen]
