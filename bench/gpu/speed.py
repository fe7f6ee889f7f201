"""Parts that measure: losses next to their peers, the training step next to its ceiling, and the input."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from bench import loss_timing
from fastssl import cli
from fastssl.benchmark.step_variants import CHOSEN, Variant, candidate, synthetic_batches
from fastssl.config import Config
from fastssl.presets import load
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.executors.base import available_executors

from .part_context import Failed, PartContext
from .targets import LARGE, SMALL

WAYS = ("eager", "compiled", "graph")
STRONG = ("fastssl", "matmuls", "eager-autocast", "compile-autocast", "sdpa-flash", "sdpa-cudnn")


def losses(context: PartContext) -> None:
    """Run `python -m bench losses`: the strong peers at every shape, then all peers at the first one."""
    if context.rehearsal:
        columns = ("fastssl", "matmuls", "eager", "eager-autocast", "sdpa-flash")
        context.once("64x1024x64", lambda: _losses(context, "64x1024x64", columns, "--repeats", "5"))
        return
    for shape in (SMALL, *LARGE):
        context.once(shape, partial(_losses, context, shape, STRONG))
    context.once(f"{SMALL}, all", lambda: _losses(context, SMALL, tuple(loss_timing.COLUMNS)))


def _losses(context: PartContext, shape: str, columns: tuple[str, ...], *more: str) -> dict[str, Any]:
    options = ["--shapes", shape, "--device", context.device.type, "--out", str(context.folder), *more]
    facts = json.loads(loss_timing.main([*options, "--columns", *columns]).read_text())
    return {"matmul_tflops": facts.get("matmul_tflops"), "rows": facts["rows"]}


def step(context: PartContext) -> None:
    """Measure a ResNet-50 at 224 px in several ways, next to the supervised step; on a CPU a small one at 32 px."""
    config, name = _resnet(context), "resnet18" if context.rehearsal else "resnet50"
    batches = synthetic_batches(config, context.device)
    eager, compiled = (replace(config.train, compile=choice) for choice in ("off", "on"))  # type: ignore[arg-type]
    ways = [Variant("eager", eager)]
    if not context.rehearsal:
        ways += [Variant("compiled", compiled), Variant("graph", replace(compiled, cuda_graph=True))]
    for way in ways:
        for supervised in (False, True) if way.name != "graph" else (False,):
            key = f"{way.name}, supervised" if supervised else way.name
            context.once(key, partial(_rate, config, way, batches, context, supervised=supervised))
            # Save now, as compiling the next may take the remaining time
            context.numbers[name] = ratios(context.numbers)
            context.write()


def _resnet(context: PartContext) -> Config:
    config = load("mocov2-imagenet")
    train = replace(config.train, batch_size=256, device="cuda", precision="auto")
    if not context.rehearsal:
        return replace(config, train=train)
    views = tuple(replace(view, size=32) for view in config.views)
    model = replace(config.model, encoder="resnet18", width=0.25)
    method = replace(config.method, queue_size=1024)  # type: ignore[call-arg]
    train = replace(train, batch_size=16, device="cpu")
    return replace(config, model=model, method=method, views=views, train=train)


def _rate(
    config: Config, way: Variant, batches: list[Batch], context: PartContext, *, supervised: bool
) -> dict[str, Any]:
    """Measure one way; it is named CHOSEN so that a step that does not run is an error and not a note."""
    started = time.perf_counter()
    measured = candidate(config, replace(way, name=CHOSEN), batches, supervised=supervised)
    prepared_s = time.perf_counter() - started
    for _ in range(2 if context.rehearsal else 4):
        measured.measure(2 if context.rehearsal else 10)
    result = measured.result
    return {
        "images/s": median(result.images_per_s),
        "step ms": 1e3 * config.train.batch_size / median(result.images_per_s),
        **{f"{part} ms": median(values) for part, values in result.parts_ms.items()},
        "MiB": result.peak_bytes / 2**20,
        "preparing s": prepared_s,
    }


def ratios(found: Mapping[str, Any]) -> dict[str, float | str]:
    """Speed of the fastest way over the fastest supervised one, and the cost of everything but the encoder.

    "beside" is loss, momentum encoder, queue and optimizer in percent of the fastest step, measured in the fastest way
    that times these parts separately. What has not been measured is left out.
    """
    ours = {name: found[name] for name in WAYS if name in found}
    theirs = [found[f"{name}, supervised"]["images/s"] for name in WAYS if f"{name}, supervised" in found]
    if not ours or not theirs:
        return {}
    best = max(ours, key=lambda name: ours[name]["images/s"])
    shares: dict[str, float | str] = {"fastest": best, "of supervised": ours[best]["images/s"] / max(theirs)}
    timed = [name for name, values in ours.items() if {"loss ms", "optimizer ms"} <= set(values)]
    if timed:
        source = max(timed, key=lambda name: ours[name]["images/s"])
        beside_ms = ours[source]["loss ms"] + ours[source]["optimizer ms"]
        shares |= {"beside": 100 * beside_ms / ours[best]["step ms"], "beside, measured in": source}
    return shares


def inputs(context: PartContext) -> None:
    """Run `fastssl bench input`: resident views of 32 px, then every pipeline that works here at ImageNet's sizes."""
    names = [name for name, reason in available_executors().items() if reason is None]
    sizes = ["--images", "24", "--batch-size", "8", "--seconds", "0.5", "--workers", "2"]
    if not context.rehearsal:
        sizes = ["--images", "512", "--batch-size", "128", "--seconds", "1.5", "--workers", "12"]
    context.once("mocov2-cifar10", lambda: _input(context, "mocov2-cifar10", ["resident"], sizes))
    context.once("mocov2-imagenet", lambda: _input(context, "mocov2-imagenet", names, sizes))


def _input(context: PartContext, preset: str, pipelines: list[str], sizes: list[str]) -> dict[str, Any]:
    path = context.folder / f"{preset}.json"
    options = ["--device", context.device.type, "--repeats", "1", "--json", str(path), "--pipelines", *pipelines]
    code = cli.main(["bench", "input", preset, *sizes, *options])
    if code:
        raise Failed(f"fastssl bench input ended with exit code {code}")
    results = json.loads(path.read_text())["results"]
    return {
        f"{row['name']} images/s": row["images_per_s"][0] if row["images_per_s"] else f"none: {'; '.join(row['notes'])}"
        for row in results
    }
