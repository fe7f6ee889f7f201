"""The training loop."""

from __future__ import annotations

import math
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from fastssl.config import Config
from fastssl.errors import ConfigError, TrainingError
from fastssl.evaluate.online import OnlineKNN
from fastssl.methods import METHODS, Clock, Method, MethodOutput
from fastssl.models.encoders import build_encoder
from fastssl.models.norm import norm_layer
from fastssl.observe.console import Console
from fastssl.observe.log import MetricsLog
from fastssl.observe.window import Window
from fastssl.train import checkpoint
from fastssl.train.data import known_labels, open_splits
from fastssl.train.input import input_executor
from fastssl.train.interrupt import EXIT_STOPPED, StopRequest
from fastssl.train.optim import build_optimizer
from fastssl.train.schedule import learning_rate
from fastssl.train.step import TrainStep, choose_device, choose_dtype, seed_step
from fastssl_pipelines.plan import SamplePlan
from fastssl_pipelines.sources import Source
from fastssl_pipelines.steps import TrainingSteps

RAW_PIXELS_AT_MOST = 100_000  # images; beyond that the baseline costs more than it tells


def build_method(config: Config, device: torch.device) -> Method:
    """The method of a configuration with freshly drawn weights, a pure function of the seed."""
    torch.manual_seed(config.seed)
    model = config.model
    encoder = build_encoder(
        model.encoder, width=model.width, stem=model.stem, norm_layer=norm_layer(model.norm, model.splits)
    )
    method = METHODS[config.method.name](encoder, config.method, config.views)
    # torch 2.11 does not declare this overload
    return method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def training_steps(config: Config, source: Source, warn: Callable[[str], object] = warnings.warn) -> TrainingSteps:
    """The sample plan of a run; the method sees the labels of `known_labels`, which explains `warn`."""
    plan = SamplePlan(
        widths=source.widths,
        heights=source.heights,
        labels=known_labels(config, source, warn),
        views=config.views,
        odd_views=config.odd_views,
        seed=config.seed,
    )
    return TrainingSteps(plan, batch_size=config.train.batch_size)


class Trainer:
    """One run: everything that a configuration builds, and the loop over it.

    The run folder is the only memory: with a checkpoint in it, training goes on from there.
    """

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self.device = choose_device(config.train)
        self.dtype = choose_dtype(config.train, self.device)
        splits = open_splits(config)
        self.notes = [*splits.train.notes, *splits.test.notes]
        self.steps = training_steps(config, splits.train, self.notes.append)
        self.total_steps = config.train.steps or config.train.epochs * self.steps.steps_per_epoch
        self.executor, self.test_executor = (
            input_executor(config.data, source, device=self.device, dtype=self.dtype) for source in splits
        )
        self.knn = OnlineKNN(config, self.executor, self.test_executor, dtype=self.dtype)
        self.method = build_method(config, self.device)
        self.optimizer = build_optimizer(self.method, config.optim)
        on_gpu = self.device.type == "cuda"
        self.train_step = TrainStep(
            self.method,
            self.optimizer,
            seed=config.seed,
            device=self.device,
            dtype=self.dtype,
            compile=config.train.compile == "on" or (config.train.compile == "auto" and on_gpu),
        )
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.first_step = self._restore()

    def train(self) -> int:
        """Train to the end or to a stop signal; returns the exit code."""
        config, first, total = self.config.train, self.first_step, self.total_steps
        eval_every = self.config.eval.every_epochs * self.steps.steps_per_epoch
        with StopRequest() as stop, Console(self.folder / "console.log", total_steps=total) as self.console:
            self._begin()
            window = Window()
            for batch in window.timed(self.executor.stream(self.steps, first, total)):
                clock = Clock(batch.step, total, self.steps.steps_per_epoch)
                output = self.train_step(batch, clock, self._learning_rate(batch.step))
                window.add(output)
                done = batch.step + 1
                last = done == total
                if last or done % config.log_every == 0:
                    self._report(done, window)
                if last or done % eval_every == 0:
                    self._evaluate(done)
                if last or done % config.checkpoint_every == 0 or stop.received:
                    self._save(done, output)
                if stop.received and not last:
                    self.log.write("end", step=done, reason="stopped")
                    self.console.say(f"stopped after step {done}; go on with: fastssl resume {self.folder}")
                    return EXIT_STOPPED
            self._finish()
        return 0

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config.optim,
            step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps.steps_per_epoch,
        )

    def _begin(self) -> None:
        plan, first = self.steps.plan, self.first_step
        known = int((plan.labels >= 0).sum()) if self.method.uses_labels else 0
        self.console.say(
            f"{self.config.method.name} on {plan.num_samples} images ({known} labels used), "
            f"{self.total_steps} steps of {self.steps.batch_size}, {self.device} {self.dtype}, "
            f"{self.executor.name} pipeline; run folder {self.folder}"
        )
        for note in self.notes:
            self.console.say(f"warning: {note}")
        digest = zlib.crc32(plan.labels.tobytes())
        self._require_the_labels_of_the_start(known, digest)
        self.log.rewind(first)
        self.log.write(
            "start",
            step=first,
            total_steps=self.total_steps,
            images=plan.num_samples,
            labels=known,
            labels_crc32=digest,
        )
        if first == 0:
            self._evaluate(0)
            seed_step(self.config.seed, -1)
            with self.train_step.autocast:
                self.method.prepare(self.executor.stream(self.steps, 0, self.steps.steps_per_epoch))
        else:
            self.console.say(f"resumed after step {first}")

    def _require_the_labels_of_the_start(self, known: int, digest: int) -> None:
        starts = [record for record in self.log.read() if record["event"] == "start"]
        if not (self.first_step and self.method.uses_labels and starts):
            return
        if starts[-1].get("labels_crc32", digest) != digest:
            raise ConfigError(
                f"the run in {self.folder} began with other labels ({starts[-1]['labels']} known then, {known} now); "
                "put the file of --data.label-list and the images of --data.root back, or start a new run"
            )

    def _tell_what_the_input_found(self, done: int) -> None:
        for executor in (self.executor, self.test_executor):
            notes, executor.notes = executor.notes, []
            for note in notes:
                self.console.say(f"note: {note}")
                self.log.write("note", step=done, text=note)

    def _report(self, done: int, window: Window) -> None:
        self._tell_what_the_input_found(done)
        values = window.read()
        self._require_finite(values["loss"], done)
        speed = {name: values.pop(name) for name in ("images_per_s", "data_wait")}
        left_s = (self.total_steps - done) * self.steps.batch_size / speed["images_per_s"]
        unreadable = len(self.executor.unreadable)
        self.log.write("train", step=done, lr=self._learning_rate(done - 1), **values, **speed, unreadable=unreadable)
        self.console.progress(
            step=done,
            loss=values.pop("loss"),
            metrics=values,
            images_per_s=speed["images_per_s"],
            left_s=left_s,
        )

    def _require_finite(self, loss: float, done: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {done}; the last checkpoint in {self.folder} is from before: "
                "lower --optim.lr or try --train.precision fp32"
            )

    def _evaluate(self, done: int) -> None:
        if not self.knn.possible:
            return
        started = time.perf_counter()
        top1 = self.knn.top1(self.method.encoder())
        self.log.write("eval", step=done, knn_top1=top1, seconds=time.perf_counter() - started)
        self._tell_what_the_input_found(done)
        self.console.say(f"step {done}: kNN top-1 {top1:.2f} %")

    def _save(self, done: int, output: MethodOutput) -> None:
        # a checkpoint of broken weights would push the good ones out
        self._require_finite(float(output.loss.detach()), done)
        state = {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(self.folder / "checkpoints", state, step=done, keep=self.config.train.keep_checkpoints)

    def _restore(self) -> int:
        """Load the newest checkpoint, if any, and return the number of steps that it has behind it."""
        paths = checkpoint.checkpoints(self.folder / "checkpoints")
        if not paths:
            return 0
        state = checkpoint.load(paths[-1])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def _finish(self) -> None:
        evaluations = [record for record in self.log.read() if record["event"] == "eval"]
        result: dict[str, float] = {}
        if evaluations:
            if self.steps.plan.num_samples <= RAW_PIXELS_AT_MOST:
                result["raw_pixels_top1"] = self.knn.raw_pixels_top1()
            result["untrained_top1"] = evaluations[0]["knn_top1"]
            result["knn_top1"] = evaluations[-1]["knn_top1"]
            names = {
                "raw_pixels_top1": "raw pixels",
                "untrained_top1": "encoder before training",
                "knn_top1": "encoder after training",
            }
            rows = [(names[name], f"{value:.2f} %") for name, value in result.items()]
            self.console.table(f"kNN top-1 (k = {self.config.eval.k})", rows)
        self.log.write("end", step=self.total_steps, reason="finished", **result)
        self.console.say(f"the run is in {self.folder}")
