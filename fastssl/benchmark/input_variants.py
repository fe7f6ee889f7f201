"""The input pipelines that `fastssl bench input` compares, and their measurements."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from fastssl.benchmark import rates
from fastssl.benchmark.peer_pipelines import Views, dali_batches, pil_batches
from fastssl.config import Config, DataConfig
from fastssl.data import split_roots
from fastssl.executor import input_executor, worker_count
from fastssl.observe.notes import NoteQueue
from fastssl.train.build import train_sampler
from fastssl_pipelines.errors import DataError
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.sources.base import Source


@dataclass
class Result:
    """Measurements of one candidate, a value per round; `images_per_s` is empty if the candidate does not work here."""

    name: str
    images_per_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    """From construction to the first batch."""
    augment_off_images_per_s: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds per image for each of rates.STAGES: medians over the batches of a round."""
    notes: list[str] = field(default_factory=list)


class Candidate(Protocol):
    """An input pipeline to measure."""

    result: Result

    def measure(self, seconds: float) -> None:
        """Run one round, in which each measurement takes about `seconds`."""


class PeerPipeline:
    """A pipeline as written without fastssl; `batches` starts it from scratch."""

    def __init__(self, name: str, batches: Callable[[], Generator[Views]], workers: int, *notes: str) -> None:
        self.result = Result(name, notes=list(notes))
        self._batches, self._workers = batches, workers

    def measure(self, seconds: float) -> None:
        start_s, images_per_s = rates.rate(self._batches, group=self._workers, seconds=seconds)
        self.result.start_s.append(start_s)
        self.result.images_per_s.append(images_per_s)


class ExecutorVariant:
    """A fastssl executor, rebuilt in every round; if it cannot read the images, a note says why."""

    def __init__(self, config: Config, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        data = config.data
        self.result = Result(f"fastssl {data.pipeline}" + f" {data.decode}" * (data.pipeline == "dali"))
        self._data, self._sampler = data, train_sampler(config, source)
        self._build: Callable[[DataConfig], Executor] = partial(
            input_executor, source=source, device=device, dtype=dtype
        )
        self._works = True

    def measure(self, seconds: float) -> None:
        """Measure with augmentation, without it, and stage by stage."""
        if self._works:
            try:
                self._measure(seconds)
            except DataError as error:
                self._works = False
                self.result.notes.append(str(error))

    def _measure(self, seconds: float) -> None:
        with NoteQueue() as notes:
            self._measure_round(seconds)
        self.result.notes = list(dict.fromkeys([*self.result.notes, *notes.take()]))

    def _measure_round(self, seconds: float) -> None:
        result, started = self.result, time.perf_counter()
        executor = self._build(self._data)
        built_s = time.perf_counter() - started
        batches, group = partial(self._batches, executor), executor.workers
        first_s, images_per_s = rates.rate(batches, group=group, seconds=seconds)
        result.start_s.append(built_s + first_s)
        result.images_per_s.append(images_per_s)
        augmentation = executor.augmentation
        executor.augmentation = rates.NoAugmentation(**(asdict(augmentation) | {"dtype": torch.uint8}))
        result.augment_off_images_per_s.append(rates.rate(batches, group=group, seconds=seconds)[1])
        executor.augmentation = augmentation
        # On a CPU in one thread, since only DALI has several for some stages
        threaded = executor.name == "dali" and executor.device.type == "cpu"
        staged = self._build(replace(self._data, workers=0)) if threaded else executor
        for stage, times in rates.stage_times(staged, self._sampler, seconds=seconds).items():
            before_the_first_batch = stage == "decode" and executor.name == "resident"
            result.stages_ms.setdefault(stage, []).append(0.0 if before_the_first_batch else median(times))

    def _batches(self, executor: Executor) -> Generator[Views]:
        with closing(executor.stream(self._sampler, 0, sys.maxsize)) as stream:
            for batch in stream:
                yield batch.views


def candidates(
    config: Config, source: Source, root: Path, device: torch.device, dtype: torch.dtype, pipelines: Sequence[str]
) -> Iterator[Candidate]:
    """The Pillow peer, the DALI peer if "dali" is among `pipelines`, and the executors that `pipelines` names.

    `source` has the training images under `root`.
    """
    workers = worker_count(config.data, device)
    yield PeerPipeline("Pillow DataLoader", lambda: pil_batches(config, source, device), workers)
    if "dali" in pipelines and (files := _files(source, split_roots(root)[0])):
        note = "its colors are not torchvision's: fixed order, contrast about 128, hue in YIQ, no solarization"
        yield PeerPipeline("DALI, own random ops", lambda: dali_batches(config, files, device), workers, note)
    for name in pipelines:
        for decode in _decodes(name, device):
            data = replace(config.data, pipeline=name, decode=decode)  # type: ignore[arg-type]
            yield ExecutorVariant(replace(config, data=data), source, device, dtype)


def _decodes(pipeline: str, device: torch.device) -> tuple[str, ...]:
    if pipeline != "dali":
        return ("auto",)
    return ("gpu", "gpu-region", "cpu", "cpu-region") if device.type == "cuda" else ("cpu", "cpu-region")


def _files(source: Source, root: Path) -> list[Path]:
    """The image files, for DALI's reader; [] if the images are not plain files."""
    files = [root / source.name_of(index) for index in range(len(source))]
    return files if all(path.is_file() for path in files) else []
