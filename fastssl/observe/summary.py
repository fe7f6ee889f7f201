"""What a run comes to, in numbers and sentences: the content of its report, without the page around it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any, NamedTuple

from fastssl.observe.console import duration
from fastssl.observe.history import ACCURACY, KNN, LOSS, SPEED, History, Part, number

SHOWN = 8  # images of a step that broke
LOST = 0.1  # share of the time from which on waiting for data is worth a look

_ENCODER = (
    "the encoder itself takes this time, as it should; --train.precision bf16 and --train.compile on make it faster, "
    "and so does a smaller --model.encoder."
)
ADVICE = {
    "data": "the device waits for images; `fastssl bench input` shows what each pipeline reaches on this machine, and "
    "--data.pipeline, --data.workers and --data.decode choose.",
    "forward": _ENCODER,
    "loss": "the queue is read for every image; `fastssl doctor` tells whether the fastest backend of the loss works "
    "here, and a smaller --method.queue-size is read in less time.",
    "backward": _ENCODER,
    "graph": _ENCODER,
    "optimizer": "this is done once a step, however large the step is; a larger --train.batch-size spreads it over "
    "more images.",
    "rest": "none of the measured parts takes this time, so it is spent around them; a larger --train.batch-size "
    "makes steps fewer, and a larger --train.log-every the pauses between them.",
}
"""What to do about a part of the step that takes long, by the part's name."""


class Headline(NamedTuple):
    """A number that stands at the top, what it is, and a remark."""

    title: str
    value: str
    remark: str = ""


class Entry(NamedTuple):
    """Something that a run has to tell; an alarm is not to be overlooked."""

    step: int | None
    text: str
    alarm: bool = False


def headlines(history: History) -> Iterator[Headline]:
    """The numbers that sum a run up, those of them that it logged."""
    loss, accuracy, knn, speed = (history.series(metric) for metric in (LOSS, ACCURACY, KNN, SPEED))
    if loss:
        yield Headline("loss", f"{loss[max(loss)]:,.4g}", f"{loss[min(loss)]:,.4g} at step {min(loss):,}")
    if accuracy:
        yield Headline("contrast accuracy", f"{accuracy[max(accuracy)]:.1f} %")
    if knn:
        before = [f"{knn[0]:.2f} % before training"] if 0 in knn and len(knn) > 1 else []
        raw = number(_newest(history, "end", "raw_pixels_top1"))
        pixels = [] if raw is None else [f"{raw:.2f} % on raw pixels"]
        yield Headline("kNN top-1", f"{knn[max(knn)]:.2f} %", ", ".join(before + pixels))
    if speed:
        yield Headline("images/s", f"{median(speed.values()):,.0f}", "median over the run")
    if seconds := training_s(history):
        yield Headline("time", duration(seconds), "of steps and evaluations")
    memory = [gib for record in history.of("train") if (gib := number(record.get("memory_gib"))) is not None]
    if memory:
        yield Headline("memory", f"{max(memory):,.1f} GiB", "most at a time")


def training_s(history: History) -> float:
    """Seconds of all steps, from their images/s, and of the evaluations; pauses before a resume do not count."""
    batch_size, seconds, before = number(history.setting("train.batch_size")) or 0.0, 0.0, 0
    for step, images_per_s in history.series(SPEED).items():
        if images_per_s > 0:
            seconds += (step - before) * batch_size / images_per_s
        before = step
    return seconds + sum(number(record.get("seconds")) or 0.0 for record in history.of("eval"))


def state(history: History) -> str:
    """How far the run is and whether it has ended, as a sentence."""
    done = max((record["step"] for record in history.records), default=0)
    total, images = (number(_newest(history, "start", key)) for key in ("total_steps", "images"))
    batch_size = number(history.setting("train.batch_size"))
    steps = f"{done:,} of {total:,.0f} steps" if total else f"{done:,} steps"
    epochs = f" ({done * batch_size / images:,.1f} epochs)" if batch_size and images else ""
    last = history.records[-1] if history.records else {"event": ""}
    if last["event"] != "end":
        return f"{steps}{epochs} are logged; the run goes on, or it was broken off."
    return f"{steps}{epochs}; {'stopped before the end' if last.get('reason') == 'stopped' else 'finished'}."


def mean_shares(history: History) -> dict[Part, float]:
    """Mean share of the time by part, without the first log line: a run starts with compiling and filling queues."""
    return {part: fmean(list(series.values())[1:] or series.values()) for part, series in history.shares().items()}


def worth_a_look(means: dict[Part, float]) -> list[Part]:
    """The largest part, and waiting for data where that is no trifle: it is the one that nothing is gained by."""
    largest = max(means, key=lambda part: means[part])
    return [part for part in means if part is largest or (part.name == "data" and means[part] >= LOST)]


def entries(history: History) -> list[Entry]:
    """Warnings, notes and steps that broke, in the order of the log; what is said again after a resume stands once."""
    found = [Entry(None, text) for text in history.warnings]
    for record in history.records:
        if record["event"] == "note":
            found.append(Entry(record["step"], str(record.get("text", ""))))
        elif record["event"] == "non_finite":
            found.append(Entry(record["step"], _broken(record), alarm=True))
    return list({entry.text: entry for entry in reversed(found)}.values())[::-1]


def commands(history: History) -> list[tuple[str, str]]:
    """What to type to continue the run and to repeat it: purposes and commands."""
    finished = any(record.get("reason") == "finished" for record in history.of("end"))
    folder, config = (shlex.quote(str(path)) for path in (history.folder, history.folder / "config.json"))
    repeat = ("to repeat it in a new folder", f"fastssl pretrain --config {config}")
    return [repeat] if finished else [("to go on with it", f"fastssl resume {folder}"), repeat]


def _broken(record: dict[str, Any]) -> str:
    images = record.get("names") or record.get("ids")
    shown = [str(image) for image in images] if isinstance(images, list) else []
    batch = f"; its images are {', '.join(shown[:SHOWN])}{' ...' if shown[SHOWN:] else ''}" if shown else ""
    action = f"; {record['action']}" if record.get("action") else ""
    return f"step {record.get('broken_step', '?')} was not finite: loss {record.get('loss', '?')}{action}{batch}"


def _newest(history: History, event: str, key: str) -> Any:
    """The last that was told; a run that goes back to a checkpoint does not tell everything again."""
    return next((record[key] for record in reversed(history.of(event)) if key in record), None)
