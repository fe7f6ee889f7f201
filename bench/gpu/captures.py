"""Part: capture CUDA graphs repeatedly while an input pipeline prepares batches on the same GPU."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from fastssl.commands.bench_end_to_end import EndToEnd
from fastssl.config import Config
from fastssl.methods import TrainProgress
from fastssl.presets import load
from fastssl.train.build import build_method, build_step
from fastssl_pipelines.synthetic.photos import write_photographs

from .part_context import Failed, PartContext, Skipped

CAPTURES, STEPS = 20, 3


def captures(context: PartContext) -> None:
    """Check that no thread of the input makes a call that would break a capture."""
    photographs = context.folder / "photographs"
    write_photographs(photographs, 20 if context.rehearsal else 256, seed=0, workers=8)
    for pipeline in ("resident", "torchvision"):
        context.once(pipeline, partial(_captured, context, pipeline, photographs))
    if context.rehearsal and not context.errors:
        raise Skipped("a CPU has no CUDA graph; the loop was rehearsed with plain steps")


def _captured(context: PartContext, pipeline: Literal["resident", "torchvision"], root: Path) -> dict[str, float]:
    config = _config(context, pipeline, root)
    ends = EndToEnd(config)
    losses = []
    with closing(ends.stream()) as batches:
        for _ in range(2 if context.rehearsal else CAPTURES):
            method = build_method(config, ends.device)
            step = build_step(config, method, device=ends.device, dtype=ends.numerics.dtype)
            for index, batch in enumerate(islice(batches, STEPS)):
                output = step(batch, TrainProgress(index, 2**20, 2**10), config.optim.lr)
            losses.append(output.loss.item())
    if not all(abs(loss) < 1e3 for loss in losses):  # Also true for NaN
        raise Failed(f"the losses after {STEPS} steps were {losses}")
    return {"captures": len(losses), "least loss": min(losses), "largest": max(losses)}


def _config(context: PartContext, pipeline: Literal["resident", "torchvision"], root: Path) -> Config:
    preset = load("quickstart")
    return replace(
        preset,
        data=replace(preset.data, root=root, pictures=0, pipeline=pipeline, prefetch=8, workers=2, label_fraction=1.0),
        train=replace(
            preset.train,
            batch_size=8 if context.rehearsal else 64,
            device=context.device.type,  # type: ignore[arg-type]
            compile="off",
            cuda_graph=not context.rehearsal,
        ),
    )
