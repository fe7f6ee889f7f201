"""`fastssl bench step`: measure variants of the training step, and the supervised step of the same encoder."""

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
from fastssl.benchmark.harness import require_file, torch_threads, write_json
from fastssl.benchmark.step_variants import Candidate, Passes, Result, candidates, encoder_passes, synthetic_batches
from fastssl.config import Config
from fastssl.device import choose_device, set_numerics
from fastssl.environment import measured_on
from fastssl.errors import ConfigError
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl.presets import load
from fastssl.train.build import build_method
from fastssl.validation import Checked, Count, Images, Threads
from fastssl_pipelines.names import printable

BATCH_ON_A_CPU = 64
TRACED_STEPS = 5
PARTS = {
    "forward": "the forward passes (encoder, head, shuffled keys)",
    "loss": "the loss",
    "backward": "the backward pass",
    "graph": "the graph of forward and backward",
    "optimizer": "optimizer, momentum encoder and queue",
}


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Measures the training step of a preset on random views, and compares it with the limit that its encoder sets."""

    preset: Annotated[str, Positional] = "mocov2-cifar10"
    """preset whose method, encoder and views are used"""
    batch_size: Images | None = None
    """images per step; by default the preset's on a GPU and 64 on a CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to train on"""
    threads: Threads | None = None
    """CPU threads; by default torch's choice"""
    steps: Count = 20
    """steps per round; every round starts from the same weights, and the loss shown is that of its last step"""
    repeats: Count = 5
    """rounds, each of which measures every variant once"""
    json: Path | None = None
    """file for all results"""
    profile: Path | None = None
    """folder for a torch.profiler trace of a few steps of the chosen variant"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_file("--json", self.json)


def main(arguments: list[str]) -> int:
    """Run `fastssl bench step [PRESET] [--option VALUE ...]`."""
    return run(parse(Options, arguments, prog="fastssl bench step"))


def run(options: Options) -> int:
    """Measure, print the table and write the files; ConfigError for impossible options."""
    config = configuration(options)
    device = choose_device(config.train)
    with torch_threads(options.threads):
        numerics = set_numerics(config.train, device)
        facts = measured_on(device)  # Before this command adds load
        batches = synthetic_batches(config, device)
        passes = encoder_passes(build_method(config, device), batches[0])
        chosen = candidates(config, device)
        _measure(chosen, options)
        settings = {"batch_size": config.train.batch_size, "device": device.type, "threads": torch.get_num_threads()}
        facts |= {"settings": {**asdict(options), **settings, "numerics": numerics.text}}
        facts |= {"sizes": [view.size for view in config.views], "method": config.method.name}
        results = [candidate.result for candidate in chosen]
        facts["ceiling"] = ceiling(results[-2], results[-1], passes, config.train.batch_size)
        show(facts, results)
        if options.profile is not None:
            print(chosen[-2].trace(options.profile, f"step-{options.preset}", TRACED_STEPS))
    if options.json is not None:
        write_json(options.json, {**facts, "results": [asdict(result) for result in results]})
        print(printable(str(options.json)))
    return 0


def configuration(options: Options) -> Config:
    """The preset with the requested batch size; ConfigError if that does not divide into its batch norm groups."""
    preset = load(options.preset)
    train = replace(preset.train, device=options.device)
    on_cpu = choose_device(train).type == "cpu"
    batch_size = options.batch_size or (BATCH_ON_A_CPU if on_cpu else train.batch_size)
    groups = preset.model.splits if preset.model.norm == "split" else 1
    multiple = groups * preset.method.batch_multiple
    if batch_size % multiple:
        raise ConfigError(
            f"--batch-size {batch_size} was given; {options.preset} needs a multiple of {multiple}, since its batch "
            f"norm has {groups} groups"
        )
    return replace(preset, train=replace(train, batch_size=batch_size))


def _measure(chosen: Sequence[Candidate], options: Options) -> None:
    for round_number in range(1, options.repeats + 1):
        for candidate in chosen:
            print(f"round {round_number} of {options.repeats}: {candidate.result.name}", file=sys.stderr)
            candidate.measure(options.steps)


def ceiling(chosen: Result, supervised: Result, passes: Passes, batch_size: int) -> dict[str, Any]:
    """The limit that the encoder sets, how much of it the chosen step reaches, and which part costs the most beyond it.

    `beyond_ms`: milliseconds per step and part beyond the supervised step's, scaled by the passes of the encoder.
    """
    share = passes.share_of_supervised
    images_per_s = share * median(supervised.images_per_s)
    parts, own = _parts_ms(chosen), _parts_ms(supervised)
    encoder, with_gradient = sum(passes), passes.with_gradient
    times = {"forward": encoder, "backward": with_gradient, "graph": 1 / share, "loss": 0, "optimizer": 1}
    beyond = {part: ms - times[part] * own.get(part, 0) for part, ms in parts.items()}
    return {
        "encoder_passes": passes._asdict(),
        "share_of_supervised": share,
        "supervised_images_per_s": median(supervised.images_per_s),
        "images_per_s": images_per_s,
        "step_ms": 1e3 * batch_size / images_per_s,
        # Per round, since other load slows whole rounds
        "reached": median(
            ours / (share * theirs) for ours, theirs in zip(chosen.images_per_s, supervised.images_per_s, strict=True)
        ),
        "beyond_ms": beyond,
        "cause": max(beyond, key=lambda part: beyond[part]),
        "supervised_forward_share": own["forward"] / (own["forward"] + own["backward"]) if "forward" in own else None,
    }


def _parts_ms(result: Result) -> dict[str, float]:
    return {part: median(values) for part, values in result.parts_ms.items()}


def show(facts: dict[str, Any], results: list[Result]) -> None:
    """Print the table, the ceiling, the gap and its cause, and how it was measured."""
    screen, settings = open_screen(least_width=140), facts["settings"]
    sizes = ", ".join(f"{size} px" for size in facts["sizes"])
    title = f"{settings['preset']}: a training step of {settings['batch_size']} images, random views of {sizes}"
    parts = [part for part in PARTS if any(part in result.parts_ms for result in results)]
    loss = f"loss, step {settings['steps']}"
    headings = ("", "images/s", "p20 p80", "to eager", "ms", *parts, "MiB", loss)
    table = Table(headings, "l" + "r" * (len(headings) - 1), title)
    for result in results:
        table.add_row(result.name, *_cells(result, results[0], parts, settings["batch_size"]))
    screen.table(table)
    for line in [*_sentences(facts, results[-2]), *_circumstances(facts, results)]:
        screen.line(f"  {line}")


def _cells(result: Result, baseline: Result, parts: Sequence[str], batch_size: int) -> list[str]:
    """The cells after the name; none if nothing was measured."""
    if not result.images_per_s:
        return []
    low, middle, high = np.quantile(result.images_per_s, (0.2, 0.5, 0.8))
    ratios = [ours / theirs for ours, theirs in zip(result.images_per_s, baseline.images_per_s, strict=False)]
    step_ms, taken = 1e3 * batch_size / middle, _parts_ms(result)
    return [
        f"{middle:.0f}",
        f"{low:.0f} {high:.0f}",
        f"{median(ratios):.2f}" if ratios else "",
        f"{step_ms:.1f}",
        *(f"{taken[part] / step_ms:.1%}" if part in taken else "" for part in parts),
        f"{result.peak_bytes / 2**20:.0f}",
        f"{median(result.losses):.4f}",
    ]


def _sentences(facts: dict[str, Any], chosen: Result) -> list[str]:
    limit, batch_size = facts["ceiling"], facts["settings"]["batch_size"]
    with_gradient, without = limit["encoder_passes"].values()
    step_ms, cause = 1e3 * batch_size / median(chosen.images_per_s), limit["cause"]
    taken = _parts_ms(chosen)
    extra = [f"{PARTS[part]} {taken[part] / step_ms:.1%}" for part in ("loss", "optimizer") if part in taken]
    forward = limit["supervised_forward_share"]
    here = f" (measured: forward is {forward:.0%} of both)" if forward else ""
    return [
        f"ceiling: a supervised step of the encoder processes {limit['supervised_images_per_s']:.0f} images/s;"
        f" {facts['method']} makes {with_gradient:g} passes with gradient and {without:g} without, which cost a third"
        f"{here}, so the limit is {limit['share_of_supervised']:.2f} of that: {limit['images_per_s']:.0f} images/s,"
        f" {limit['step_ms']:.1f} ms",
        f"gap: the chosen step takes {step_ms:.1f} ms and reaches {limit['reached']:.0%} of the ceiling, with "
        + " and ".join(extra),
        f"cause: {PARTS[cause]}, with {limit['beyond_ms'][cause]:.1f} ms more than expected from the supervised step"
        if limit["beyond_ms"][cause] > 0
        else "cause: no part takes longer than expected from the supervised step",
    ]


def _circumstances(facts: dict[str, Any], results: Sequence[Result]) -> list[str]:
    settings = facts["settings"]
    return [
        f"chosen: {settings['numerics']}; {facts['device']}, {settings['threads']} threads on {facts['cores']} cores,"
        f" load {facts['load_average']:.2f} before; medians of {settings['repeats']} rounds of {settings['steps']}"
        " steps",
        "percentages are shares of the step's time; MiB: weights, optimizer, queue and what a step needs",
        *(f"{result.name}: {result.note}" for result in results if result.note),
    ]
