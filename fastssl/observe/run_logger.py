"""The output of a run: the console, metrics.jsonl, TensorBoard and the final report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.observe.console import Console
from fastssl.observe.html_report import write_report
from fastssl.observe.meter import NonFiniteStep
from fastssl.observe.metrics_log import MetricsLog
from fastssl.observe.tensorboard import TensorBoardMirror
from fastssl_pipelines.names import printable

_NAMES = {
    "raw_pixels_top1": "raw pixels",
    "untrained_top1": "encoder before training",
    "knn_top1": "encoder after training",
}


class RunLogger:
    """Context manager around the output of a run; `quiet`, as on all ranks but the first, it writes nothing."""

    def __init__(self, folder: Path, config: Config, *, total_steps: int, quiet: bool = False):
        self.folder, self.config, self.total_steps, self.quiet = folder, config, total_steps, quiet
        self.log = MetricsLog(folder / "metrics.jsonl")
        self._mirror = TensorBoardMirror(folder) if config.run.tensorboard and not quiet else None

    def __enter__(self) -> RunLogger:
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
        """Write report.html, however the run ended."""
        try:
            write_report(self.folder)
        except (OSError, ConfigError) as error:
            self.info(f"note: report.html was not written ({error}); `fastssl report {self.folder}` writes it")

    def info(self, text: str) -> None:
        """Print a line to the console and console.log only."""
        if not self.quiet:
            self.console.info(text)

    def start(self, *, step: int, **facts: Any) -> None:
        """Record that the run starts or resumes after `step` steps; drops the records of later steps."""
        if self.quiet:
            return
        self.log.rewind(step)
        self._write("start", step=step, total_steps=self.total_steps, **facts, time=time.time())
        if step:
            self.info(f"resumed after step {step}")

    def notes(self, step: int, texts: Iterable[str]) -> None:
        """Log messages about the input or the disk."""
        for text in map(printable, texts):
            self.info(f"note: {text}")
            self._write("note", step=step, text=text)

    def train(self, step: int, values: dict[str, float], *, lr: float, unreadable: int) -> None:
        """Log means over steps (see `StepMeter.read`); the console shows the most important."""
        self._write("train", step=step, lr=lr, **values, unreadable=unreadable)
        if self.quiet:
            return
        images_left = (self.total_steps - step) * self.config.train.batch_size
        # The rate is 0 if the line has only steps from before a restart
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
        """Log an evaluation; `knn_top1` in percent."""
        self._write("eval", step=step, knn_top1=knn_top1, seconds=seconds)
        self.info(f"step {step}: kNN top-1 {knn_top1:.2f} %")

    def non_finite(self, failed: NonFiniteStep, *, back_to: int, action: str, ids: list[int], names: list[str]) -> None:
        """Record a step with a non-finite loss or gradient, with the images of its batch."""
        values = {name: str(value) for name, value in failed._asdict().items() if name != "step"}
        self._write(
            "non_finite",
            step=back_to,
            broken_step=failed.step + 1,
            **values,
            action=action,
            ids=ids,
            names=[*map(printable, names)],
        )

    def stopped(self, step: int) -> None:
        """Record that the run stops early because it was asked to."""
        self._write("end", step=step, reason="stopped", time=time.time())
        self.info(f"stopped after step {step}; continue with: fastssl resume {self.folder}")

    def finished(self, **baselines: float) -> None:
        """Record the end of the run, with `baselines` in percent, and print the kNN results."""
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
            self.info(f"note: {problem}")
