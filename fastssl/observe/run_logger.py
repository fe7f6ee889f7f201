"""What a run tells: to the person at the console, to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.observe.console import Console
from fastssl.observe.meter import NonFiniteStep
from fastssl.observe.metrics_log import MetricsLog
from fastssl.observe.report import write_report
from fastssl.observe.tensorboard import TensorBoardMirror
from fastssl_pipelines.names import printable

_NAMES = {
    "raw_pixels_top1": "raw pixels",
    "untrained_top1": "encoder before training",
    "knn_top1": "encoder after training",
}


class Reporter:
    """Context manager around the output of a run; on ranks other than the first it is `quiet` and does nothing."""

    def __init__(self, folder: Path, config: Config, *, total_steps: int, quiet: bool = False):
        self.folder, self.config, self.total_steps, self.quiet = folder, config, total_steps, quiet
        self.log = MetricsLog(folder / "metrics.jsonl")
        self._mirror = TensorBoardMirror(folder) if config.run.tensorboard and not quiet else None

    def __enter__(self) -> Reporter:
        if not self.quiet:
            self.console = Console(self.folder / "console.log", total_steps=self.total_steps).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mirror:
            self._mirror.close()
        if not self.quiet:
            self._write_report()
            self.console.__exit__(kind, error, trace)

    def _write_report(self) -> None:
        """However the run ended."""
        try:
            write_report(self.folder)
        except (OSError, ConfigError) as error:
            self.say(f"note: report.html was not written ({error}); `fastssl report {self.folder}` makes it")

    def say(self, text: str) -> None:
        """A line for the person alone."""
        if not self.quiet:
            self.console.say(text)

    def start(self, *, step: int, **facts: Any) -> None:
        """The run begins, or goes on, after `step` steps; what was told of later ones is dropped."""
        if self.quiet:
            return
        self.log.rewind(step)
        self._write("start", step=step, total_steps=self.total_steps, **facts, time=time.time())
        if step:
            self.say(f"resumed after step {step}")

    def notes(self, step: int, texts: Iterable[str]) -> None:
        """What the input or the disk had to say."""
        for text in map(printable, texts):
            self.say(f"note: {text}")
            self._write("note", step=step, text=text)

    def train(self, step: int, values: dict[str, float], *, lr: float, unreadable: int) -> None:
        """The means of a window (see `StepMeter.read`), of which the console shows the most important."""
        self._write("train", step=step, lr=lr, **values, unreadable=unreadable)
        if self.quiet:
            return
        images_left = (self.total_steps - step) * self.config.train.batch_size
        # a line can tell of steps before a restart alone
        left_s = images_left / values["images_per_s"] if values["images_per_s"] else 0.0
        shares = {name.removeprefix("share_"): v for name, v in values.items() if name.startswith("share_")}
        others = {"images_per_s", "memory_gib", "loss", *(f"share_{name}" for name in shares)}
        self.console.progress(
            step=step,
            loss=values["loss"],
            metrics={name: value for name, value in values.items() if name not in others},
            images_per_s=values["images_per_s"],
            shares=shares,
            memory_gib=values["memory_gib"],
            left_s=left_s,
        )

    def evaluation(self, step: int, *, knn_top1: float, seconds: float) -> None:
        """kNN top-1 in percent."""
        self._write("eval", step=step, knn_top1=knn_top1, seconds=seconds)
        self.say(f"step {step}: kNN top-1 {knn_top1:.2f} %")

    def non_finite(self, broken: NonFiniteStep, *, back_to: int, action: str, ids: list[int], names: list[str]) -> None:
        """A step whose loss or gradient is not finite, with the images of its batch."""
        numbers = {name: str(value) for name, value in broken._asdict().items() if name != "step"}
        self._write(
            "non_finite",
            step=back_to,
            broken_step=broken.step + 1,
            **numbers,
            action=action,
            ids=ids,
            names=[*map(printable, names)],
        )

    def stopped(self, step: int) -> None:
        """The run ends before its time because it was asked to."""
        self._write("end", step=step, reason="stopped", time=time.time())
        self.say(f"stopped after step {step}; go on with: fastssl resume {self.folder}")

    def finished(self, **baselines: float) -> None:
        """The run is at its end."""
        if self.quiet:
            return
        evaluations = [record for record in self.log.read() if record["event"] == "eval"]
        result = dict(baselines)
        if evaluations:
            result["untrained_top1"] = evaluations[0]["knn_top1"]
            result["knn_top1"] = evaluations[-1]["knn_top1"]
            rows = [(_NAMES[name], f"{value:.2f} %") for name, value in result.items()]
            self.console.table(f"kNN top-1 (k = {self.config.eval.k})", rows)
        self._write("end", step=self.total_steps, reason="finished", **result, time=time.time())

    def _write(self, event: str, **values: Any) -> None:
        if self.quiet:
            return
        problem = self.log.write(event, **values)
        if self._mirror:
            self._mirror.write(event, values)
        if problem:
            self.say(f"note: {problem}")
