"""Part: small images, where launches and input matter more than the encoder, next to lightly's loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch

from bench import moco_steps, training_step
from bench.peers import Unavailable
from fastssl.benchmark.harness import wait
from fastssl.benchmark.peer_pipelines import pil_batches
from fastssl.commands.bench_end_to_end import EndToEnd
from fastssl.config import Config
from fastssl.presets import load
from fastssl_pipelines.batch import Batch

from .part_context import PartContext, Skipped
from .training_runs import photographs

OURS = ("fastssl", "fastssl with a CUDA graph")


def small(context: PartContext) -> None:
    """Measure MoCo v2 with a ResNet-18 at 32 px: input and step together, then steps alone.

    End to end: fastssl with resident images, and lightly's loop with Pillow in a DataLoader. Without lightly a plain
    loop takes its place, in fp32 like lightly's example.
    """
    config, seconds = _config(context), 1.0 if context.rehearsal else 6.0
    graph = replace(config, train=replace(config.train, cuda_graph=True))
    context.once("lightly's loop", lambda: _lightly_like(config, EndToEnd(config), seconds))
    for name, own in zip(OURS, (config, graph), strict=True):
        if name == OURS[0] or not context.rehearsal:
            context.once(name, partial(_ours, own, seconds))
            context.numbers["end to end"] = compared(context.numbers)
            context.write()
    context.once("steps", lambda: _beside_others(context))


def compared(found: Mapping[str, Any]) -> dict[str, float]:
    """Speed of the faster fastssl loop over lightly's, if both have been measured."""
    ours = [found[name]["images/s"] for name in OURS if name in found]
    if not ours or "lightly's loop" not in found:
        return {}
    return {"times faster": max(ours) / found["lightly's loop"]["images/s"]}


def _ours(config: Config, seconds: float) -> dict[str, float]:
    both = EndToEnd(config)
    both.measure("both", seconds)
    return {"images/s": both.results["both"].rate, "waiting": both.results["both"].share("data")}


def _beside_others(context: PartContext) -> list[dict[str, Any]]:
    """Run `python -m bench step`: training steps of fastssl, a plain loop and, if installed, lightly."""
    path = context.folder / "step.json"
    sizes = ["--batch-size", "16", "--queue-size", "1024", "--width", "0.25", "--steps", "2", "--repeats", "2"]
    if not context.rehearsal:
        sizes = ["--batch-size", "512", "--queue-size", "65536", "--steps", "20", "--repeats", "3"]
    training_step.main([*sizes, "--device", context.device.type, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    return [{**row, "images/s": median(row["images_per_s"]) if row["images_per_s"] else None} for row in rows]


def _config(context: PartContext) -> Config:
    preset = load("mocov2-cifar10")
    data = replace(preset.data, workers=2 if context.rehearsal else 12, prefetch=4, **_images(context))
    train = replace(preset.train, batch_size=32 if context.rehearsal else 512, device=context.device.type)  # type: ignore[arg-type]
    model = replace(preset.model, norm="local", width=0.25 if context.rehearsal else 1.0)
    method = replace(preset.method, shuffle=False)  # type: ignore[call-arg]
    return replace(preset, data=data, train=train, model=model, method=method)


def _images(context: PartContext) -> dict[str, Any]:
    """Photographs if there are any, else procedural pictures."""
    if not context.rehearsal:
        try:
            return {"root": photographs(context), "pictures": 0}
        except Skipped as reason:
            print(reason)
    return {"pictures": 600 if context.rehearsal else 20_000}


def _lightly_like(config: Config, both: EndToEnd, seconds: float) -> dict[str, Any]:
    fp32 = moco_steps.SETTINGS[0]
    try:
        name, train_step = "lightly", moco_steps.lightly(config, both.device, fp32)
    except Unavailable:
        name, train_step = "plain loop", moco_steps.plain(config, both.device, fp32)
    batches = _pil(config, both)
    for batch in islice(batches, 3):
        train_step(batch)
    wait(both.device)
    started, images = time.perf_counter(), 0
    for batch in batches:
        train_step(batch)
        images += len(batch.ids)
        if time.perf_counter() - started > seconds:
            break
    wait(both.device)
    return {"loop": name, "images/s": images / (time.perf_counter() - started)}


def _pil(config: Config, both: EndToEnd) -> Iterator[Batch]:
    labels = torch.zeros(config.train.batch_size, dtype=torch.int64, device=both.device)
    for step, views in enumerate(pil_batches(config, both.executor.source, both.device)):
        yield Batch(views=views, labels=labels, ids=labels, step=step)
