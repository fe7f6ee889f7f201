"""The content of a run's report: headline numbers and sentences, without HTML."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any, NamedTuple

from fastssl.observe.console import duration
from fastssl.observe.history import ACCURACY, KNN, LOSS, SPEED, History, Part, finite_number

SHOWN = 8  # Images listed for a non-finite step
LOST = 0.1  # Share of the time from which waiting for data is pointed out

_ENCODER = (
    "this is the encoder's own work, as it should be; --train.precision bf16, --train.compile on or a smaller "
    "--model.encoder make it faster."
)
ADVICE = {
    "data": "the device waits for images; `fastssl bench input` measures every pipeline on this machine, and "
    "--data.pipeline, --data.workers and --data.decode select one.",
    "forward": _ENCODER,
    "loss": "every image is compared with the whole queue; `fastssl doctor` shows whether the fastest loss backend "
    "works here, and a smaller --method.queue-size takes less time.",
    "backward": _ENCODER,
    "graph": _ENCODER,
    "optimizer": "this is a fixed cost per step; a larger --train.batch-size spreads it over more images.",
    "rest": "this time is spent outside the measured parts; a larger --train.batch-size makes fewer steps, and a "
    "larger --train.log-every fewer pauses between them.",
}
"""Advice for a part of the step that takes long, by the part's name."""


class Headline(NamedTuple):
    """A number at the top of the report: its title, its value and a remark."""

    title: str
    value: str
    remark: str = ""


class Entry(NamedTuple):
    """A note or warning of a run; `alarm` highlights it."""

    step: int | None
    text: str
    alarm: bool = False


def headlines(history: History) -> Iterator[Headline]:
    """The main numbers of a run, as far as it logged them."""
    loss, accuracy, knn, speed = (history.series(metric) for metric in (LOSS, ACCURACY, KNN, SPEED))
    if loss:
        yield Headline("loss", f"{loss[max(loss)]:,.4g}", f"{loss[min(loss)]:,.4g} at step {min(loss):,}")
    if accuracy:
        yield Headline("contrast accuracy", f"{accuracy[max(accuracy)]:.1f} %")
    if knn:
        before = [f"{knn[0]:.2f} % before training"] if 0 in knn and len(knn) > 1 else []
        raw = finite_number(_newest(history, "end", "raw_pixels_top1"))
        pixels = [] if raw is None else [f"{raw:.2f} % on raw pixels"]
        yield Headline("kNN top-1", f"{knn[max(knn)]:.2f} %", ", ".join(before + pixels))
    if speed:
        yield Headline("images/s", f"{median(speed.values()):,.0f}", "median over the run")
    if seconds := training_s(history):
        yield Headline("time", duration(seconds), "of steps and evaluations")
    memory = [gib for record in history.of("train") if (gib := finite_number(record.get("memory_gib"))) is not None]
    if memory:
        yield Headline("memory", f"{max(memory):,.1f} GiB", "peak")


def training_s(history: History) -> float:
    """Seconds of all steps, from their images/s, and of the evaluations; excludes pauses before a resume."""
    batch_size, seconds, before = finite_number(history.setting("train.batch_size")) or 0.0, 0.0, 0
    for step, images_per_s in history.series(SPEED).items():
        if images_per_s > 0:
            seconds += (step - before) * batch_size / images_per_s
        before = step
    return seconds + sum(finite_number(record.get("seconds")) or 0.0 for record in history.of("eval"))


def state(history: History) -> str:
    """A sentence about the progress of the run and whether it has ended."""
    completed_steps = max((record["step"] for record in history.records), default=0)
    total, images = (finite_number(_newest(history, "start", key)) for key in ("total_steps", "images"))
    batch_size = finite_number(history.setting("train.batch_size"))
    steps = f"{completed_steps:,} of {total:,.0f} steps" if total else f"{completed_steps:,} steps"
    epochs = f" ({completed_steps * batch_size / images:,.1f} epochs)" if batch_size and images else ""
    last = history.records[-1] if history.records else {"event": ""}
    if last["event"] != "end":
        return f"{steps}{epochs} are logged; the run is still going, or it was interrupted."
    return f"{steps}{epochs}; {'stopped before the end' if last.get('reason') == 'stopped' else 'finished'}."


def mean_shares(history: History) -> dict[Part, float]:
    """Mean share of the time by part, without the first log line, which includes compilation and filling queues."""
    return {part: fmean(list(series.values())[1:] or series.values()) for part, series in history.shares().items()}


def notable_parts(means: dict[Part, float]) -> list[Part]:
    """The largest part, and waiting for data from LOST on, since that time is pure loss."""
    largest = max(means, key=lambda part: means[part])
    return [part for part in means if part is largest or (part.name == "data" and means[part] >= LOST)]


def entries(history: History) -> list[Entry]:
    """Warnings, notes and non-finite steps in log order, without repetitions after a resume."""
    found = [Entry(None, text) for text in history.warnings]
    for record in history.records:
        if record["event"] == "note":
            found.append(Entry(record["step"], str(record.get("text", ""))))
        elif record["event"] == "non_finite":
            found.append(Entry(record["step"], _non_finite(record), alarm=True))
    return list({entry.text: entry for entry in reversed(found)}.values())[::-1]


def commands(history: History) -> list[tuple[str, str]]:
    """The commands that continue and repeat the run, each after its purpose."""
    finished = any(record.get("reason") == "finished" for record in history.of("end"))
    folder, config = (shlex.quote(str(path)) for path in (history.folder, history.folder / "config.json"))
    repeat = ("to repeat it in a new folder", f"fastssl pretrain --config {config}")
    return [repeat] if finished else [("to continue it", f"fastssl resume {folder}"), repeat]


def _non_finite(record: dict[str, Any]) -> str:
    images = record.get("names") or record.get("ids")
    shown = [str(image) for image in images] if isinstance(images, list) else []
    batch = f"; its images are {', '.join(shown[:SHOWN])}{' ...' if shown[SHOWN:] else ''}" if shown else ""
    action = f"; {record['action']}" if record.get("action") else ""
    return f"step {record.get('broken_step', '?')} was not finite: loss {record.get('loss', '?')}{action}{batch}"


def _newest(history: History, event: str, key: str) -> Any:
    """The last value logged; a run that goes back to a checkpoint does not log everything again."""
    return next((record[key] for record in reversed(history.of(event)) if key in record), None)
