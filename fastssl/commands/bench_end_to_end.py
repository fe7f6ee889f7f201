"""`fastssl bench e2e`: measure the real input and the real step, alone and together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fastssl.arguments import parse_known
from fastssl.benchmark import rates
from fastssl.benchmark.harness import require_file, torch_threads, write_json, write_trace
from fastssl.benchmark.peer_pipelines import Views
from fastssl.benchmark.step_variants import as_training, synthetic_batches
from fastssl.commands.bench_step import PARTS
from fastssl.commands.pretrain import parse
from fastssl.config import Config
from fastssl.data import open_splits
from fastssl.device import choose_device, set_numerics
from fastssl.environment import measured_on
from fastssl.executor import input_executor, worker_count
from fastssl.methods import TrainProgress
from fastssl.observe.meter import StepMeter
from fastssl.observe.notes import NoteQueue
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl.schedule import learning_rate
from fastssl.train.build import build_method, build_step, train_sampler
from fastssl.validation import Checked, Count, Seconds, Threads
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.names import printable

WARM_UPS, TRACED_STEPS = 3, 5
NAMES = ("input", "step", "both")
WITHIN = 0.05  # Waiting and slowdowns below this share of the time are ignored


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Measures input and step, alone and together; also accepts all options of `fastssl pretrain`."""

    seconds: Seconds = 10.0
    """length of each measurement"""
    repeats: Count = 3
    """rounds, each of which measures input, step and both once"""
    threads: Threads | None = None
    """CPU threads for the step; by default torch's choice"""
    json: Path | None = None
    """file for all results"""
    profile: Path | None = None
    """folder for a torch.profiler trace of a few steps on the real input"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_file("--json", self.json)


@dataclass
class Result:
    """Measurements of "input", "step" or "both", a value per round."""

    name: str
    images_per_s: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    """Shares of the time: "data" is waiting for input, the others are the parts of TrainStep.stopwatch."""

    @property
    def rate(self) -> float:
        """Median images/s."""
        return median(self.images_per_s)

    def share(self, name: str) -> float:
        """Median share of the time; 0 for a part that was not measured."""
        return median(self.shares.get(name, [0.0]))


class EndToEnd:
    """Input, method and step of a configuration, built as for a run."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, choose_device(config.train)
        self.numerics = set_numerics(config.train, self.device)
        dtype = self.numerics.dtype
        source = open_splits(config).train
        self.sampler = train_sampler(config, source)
        self.executor = input_executor(config.data, source, device=self.device, dtype=dtype)
        self.train_step = build_step(config, build_method(config, self.device), device=self.device, dtype=dtype)
        batches = synthetic_batches(config, self.device)
        self.synthetic = [as_training(batch, dtype, torch.channels_last) for batch in batches]
        self.results = {name: Result(name) for name in NAMES}

    def measure(self, name: str, seconds: float) -> None:
        """Run one round of "input", "step" or "both"."""
        if name == "input":
            group = max(1, self.executor.workers)
            self.results[name].images_per_s.append(rates.rate(self._views, group=group, seconds=seconds)[1])
        elif name == "step":
            self._train(cycle(self.synthetic), name, seconds)
        else:
            with closing(self.stream()) as stream:
                self._train(stream, name, seconds)

    def stream(self) -> Generator[Batch]:
        """The batches of a run from its first step, endless."""
        return self.executor.stream(self.sampler, 0, sys.maxsize)

    def train(self, batches: Iterator[Batch], meter: StepMeter) -> Iterator[None]:
        """Train one step per batch, as in a run."""
        optim, per_epoch = self.config.optim, self.sampler.steps_per_epoch
        total = self.config.train.steps or self.config.train.epochs * per_epoch
        for batch in meter.timed(batches):
            step = batch.step % total
            lr = learning_rate(optim, step, total_steps=total, steps_per_epoch=per_epoch)
            meter.add(batch, self.train_step(batch, TrainProgress(step, total, per_epoch), lr))
            yield

    def _train(self, batches: Iterator[Batch], name: str, seconds: float) -> None:
        meter = StepMeter(self.train_step.stopwatch, scaled=self.train_step.scaler.is_enabled())
        steps = self.train(batches, meter)
        for _ in islice(steps, WARM_UPS):
            pass
        meter.read()
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            next(steps)
        values, result = meter.read(), self.results[name]
        result.images_per_s.append(values["images_per_s"])
        for key, value in values.items():
            if key.startswith("share_"):
                result.shares.setdefault(key.removeprefix("share_"), []).append(value)

    def _views(self) -> Generator[Views]:
        with closing(self.stream()) as stream:
            for batch in stream:
                yield batch.views


def main(arguments: list[str]) -> int:
    """Run `fastssl bench e2e [PRESET] [--option VALUE ...] [--section.field VALUE ...]`."""
    options, rest = parse_known(Options, arguments, prog="fastssl bench e2e")
    return run(parse(rest), options)


def run(config: Config, options: Options) -> int:
    """Measure, print the table and write the files; ConfigError or DataError for impossible options."""
    with torch_threads(options.threads), NoteQueue() as notes:
        facts = measured_on(choose_device(config.train))  # Before this command adds load
        both = EndToEnd(config)
        for round_number in range(1, options.repeats + 1):
            for name in NAMES:
                print(f"round {round_number} of {options.repeats}: {name}", file=sys.stderr)
                both.measure(name, options.seconds)
        facts |= {**_facts(both, options), "notes": notes.take()}
        show(facts, both.results)
        if options.profile is not None:
            print(_trace(both, options.profile))
    if options.json is not None:
        write_json(options.json, {**facts, "results": [asdict(result) for result in both.results.values()]})
        print(printable(str(options.json)))
    return 0


def _facts(both: EndToEnd, options: Options) -> dict[str, Any]:
    config, results = both.config, both.results
    limit = min(results["input"].rate, results["step"].rate)
    settings = {
        "preset": config.preset,
        "batch_size": config.train.batch_size,
        "device": both.device.type,
        "numerics": both.numerics.text,
        "pipeline": both.executor.name,
        "workers": both.executor.workers,
    }
    return {
        "settings": {**asdict(options), **settings, "threads": torch.get_num_threads()},
        "images": {"source": both.executor.source.name, "count": len(both.executor.source)},
        "ceiling_images_per_s": limit,
        "gap": gap(results),
        "cause": cause(results, config, both.executor.name, both.device),
    }


def gap(results: dict[str, Result]) -> float:
    """By which fraction both together are slower than the slower of the two; compared per round, as load may vary."""
    rounds = zip(*(results[name].images_per_s for name in NAMES), strict=True)
    return median(1 - both / min(alone, step) for alone, step, both in rounds)


def cause(results: dict[str, Result], config: Config, pipeline: str, device: torch.device) -> str:
    """A sentence about what limits input and step together, and which option changes it."""
    alone, step, both = (results[name] for name in NAMES)
    alone_ms, together_ms = _step_ms(step, config), _step_ms(both, config)
    waiting = both.share("data")
    slowed = median((b - a) / b for a, b in zip(alone_ms, together_ms, strict=True)) * (1 - waiting)
    cores, workers = os.cpu_count(), worker_count(config.data, device)
    if max(waiting, slowed) < WITHIN:
        part = max((name for name in PARTS if name in both.shares), key=both.share)
        return (
            f"step-bound: the input keeps up, and {both.share(part):.0%} of the time goes to {PARTS[part]};"
            " `fastssl bench step` shows the limit that the encoder sets"
        )
    if waiting > slowed and alone.rate < step.rate:
        return (
            f"data-bound: the step waits {waiting:.0%} of the time for input; raise --data.workers (now {workers} for"
            f" {cores} cores) or change --data.pipeline (now {pipeline}), which `fastssl bench input` compares"
        )
    where = "the GPU's time" if device.type == "cuda" else f"the same {cores} cores"
    expected = 1 / (1 / alone.rate + 1 / step.rate)
    return (
        f"contention: a step takes {median(together_ms):.1f} ms while the input runs and {median(alone_ms):.1f} ms"
        f" alone, and waits {waiting:.0%} of the time; both need {where}, and run in turns they would reach"
        f" {expected:.0f} images/s"
    )


def _step_ms(result: Result, config: Config) -> list[float]:
    """Milliseconds per step by round, excluding waits for input."""
    rounds = zip(result.images_per_s, result.shares["data"], strict=True)
    return [1e3 * config.train.batch_size / rate * (1 - waiting) for rate, waiting in rounds]


def show(facts: dict[str, Any], results: dict[str, Result]) -> None:
    """Print the table, the ceiling, the gap and its cause, and how it was measured."""
    screen, settings = open_screen(least_width=120), facts["settings"]
    title = f"{settings['preset']}: batches of {settings['batch_size']} images of {facts['images']['source']}"
    parts = [part for part in PARTS if part in results["step"].shares]
    headings = ("", "images/s", "p20 p80", "of ceiling", "waiting", *parts)
    table = Table(headings, "l" + "r" * (len(headings) - 1), title)
    for result in results.values():
        low, middle, high = np.quantile(result.images_per_s, (0.2, 0.5, 0.8))
        shares = [f"{result.share(name):.1%}" if result.shares else "" for name in ("data", *parts)]
        of_ceiling = f"{middle / facts['ceiling_images_per_s']:.0%}"
        table.add_row(result.name, f"{middle:.0f}", f"{low:.0f} {high:.0f}", of_ceiling, *shares)
    screen.table(table)
    for line in [
        f"ceiling: the slower of the two alone, {facts['ceiling_images_per_s']:.0f} images/s; together they are"
        f" {facts['gap']:.0%} slower",
        facts["cause"],
        f"{settings['numerics']}, {settings['pipeline']} pipeline with {settings['workers']} workers;"
        f" {facts['device']}, {settings['threads']} threads on {facts['cores']} cores, load"
        f" {facts['load_average']:.2f} before; medians of {settings['repeats']} rounds of {settings['seconds']:g} s",
        *facts["notes"],
    ]:
        screen.line(f"  {line}")


def _trace(both: EndToEnd, folder: Path) -> Path:
    meter = StepMeter(both.train_step.stopwatch, scaled=both.train_step.scaler.is_enabled())
    with closing(both.stream()) as stream:
        steps = both.train(stream, meter)
        next(steps)
        return write_trace(folder, f"e2e-{both.config.preset}", lambda: list(islice(steps, TRACED_STEPS)))
