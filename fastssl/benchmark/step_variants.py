"""The training steps that `fastssl bench` measures on random views: several variants, and a supervised baseline."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastssl.benchmark.harness import peak_bytes, wait, write_trace
from fastssl.config import Config, TrainConfig
from fastssl.device import choose_dtype
from fastssl.errors import TrainingError
from fastssl.methods import Method, MethodConfig, MethodOutput, TrainProgress
from fastssl.models.encoders import Encoder
from fastssl.train.build import build_method, build_step
from fastssl.train.step import TrainStep
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec

CHOSEN, SUPERVISED = "chosen", "supervised encoder"
DIFFERENT_BATCHES, WARM_UPS = 4, 3
CLASSES = 1000  # Of the supervised step
NO_END = 2**40  # Steps of an epoch, so that schedules stay at their start


@dataclass(frozen=True)
class Variant:
    """One way to run the training step of a configuration."""

    name: str
    train: TrainConfig
    channels_last: bool = True


def variants(config: Config, device: torch.device) -> list[Variant]:
    """Variants that each add one feature to the one before, and last what a run of `config` uses on this device."""
    own = config.train
    plain = replace(own, precision="fp32", compile="off", cuda_graph=False)
    lower = replace(plain, precision="auto")
    dtype = choose_dtype(lower, device)
    autocast = f"{dtype}".removeprefix("torch.") + " autocast, " if dtype != torch.float32 else ""
    compiled = replace(lower, compile="on")
    graph = [Variant("+ cuda graph", replace(compiled, cuda_graph=True))] if device.type == "cuda" else []
    return [
        Variant("eager", plain, channels_last=False),
        Variant(f"{autocast}channels_last", lower),
        Variant("+ compile", compiled),
        *graph,
        Variant(CHOSEN, own),
    ]


@dataclass
class Result:
    """Measurements of one candidate, a value per round; all empty if it does not work here."""

    name: str
    images_per_s: list[float] = field(default_factory=list)
    parts_ms: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds per step, by the names of TrainStep.stopwatch."""
    losses: list[float] = field(default_factory=list)
    """The loss of the last step of each round; every round starts from the same weights, queue and batches."""
    peak_bytes: int = 0
    """Peak memory of its tensors: weights, optimizer, queue and what a step needs, without the batches."""
    note: str = ""


class Candidate:
    """A training step that is measured round by round; `build` creates it with its initial weights.

    If the step does not run here (no compiler, too little memory), the result gets a note; for CHOSEN and SUPERVISED it
    is a TrainingError.
    """

    def __init__(self, name: str, build: Callable[[], TrainStep], batches: Sequence[Batch], lr: float) -> None:
        self.result = Result(name)
        self._batches, self._lr, self._build = batches, lr, build
        self._device = batches[0].ids.device
        print(f"preparing {name}", file=sys.stderr)
        try:
            self.result.peak_bytes = peak_bytes(self._warm_up, self._device)
        except RuntimeError as error:  # Includes out of memory and the errors of torch.compile
            reason = f"does not run here: {next(iter(str(error).splitlines()), type(error).__name__)}"
            if name in (CHOSEN, SUPERVISED):
                raise TrainingError(f"{name}: the step {reason}; try a smaller --batch-size") from error
            self.result.note = reason
        else:
            # From a second instance, as a copy would count as the step's memory
            self._start = [part.state_dict() for part in _stateful(build())]

    def _warm_up(self) -> None:
        self._step = self._build()
        self._run(WARM_UPS)

    def measure(self, steps: int) -> None:
        """Run one round of `steps` steps from the initial state."""
        if self.result.note:
            return
        self._reset()
        self._step.stopwatch.read()
        wait(self._device)
        started = time.perf_counter()
        output = self._run(steps)
        wait(self._device)
        seconds, result = time.perf_counter() - started, self.result
        result.images_per_s.append(steps * len(self._batches[0].ids) / seconds)
        for part, part_s in self._step.stopwatch.read().items():
            result.parts_ms.setdefault(part, []).append(1e3 * part_s / steps)
        result.losses.append(output.loss.item())

    def trace(self, folder: Path, name: str, steps: int) -> Path:
        """Write a torch.profiler trace of `steps` steps from the initial state; returns its path."""
        self._reset()
        return write_trace(folder, name, lambda: self._run(steps))

    def _reset(self) -> None:
        for part, start in zip(_stateful(self._step), self._start, strict=True):
            part.load_state_dict(start)

    def _run(self, steps: int) -> MethodOutput:
        for step in range(steps):
            batch = self._batches[step % len(self._batches)]
            output = self._step(batch, TrainProgress(step, NO_END, NO_END), self._lr)
        return output


def _stateful(step: TrainStep) -> tuple[Any, ...]:
    return step.method, step.optimizer, step.scaler


def candidates(config: Config, device: torch.device) -> list[Candidate]:
    """All variants of the step, ending with the chosen one, and then the supervised step in the chosen variant."""
    all_variants = variants(config, device)
    batches = synthetic_batches(config, device)
    methods = [candidate(config, variant, batches) for variant in all_variants]
    return [*methods, candidate(config, all_variants[-1], batches, supervised=True)]


def candidate(config: Config, variant: Variant, batches: Sequence[Batch], *, supervised: bool = False) -> Candidate:
    """A variant of the method's step, or of its encoder's `supervised` step, on the device of the batches."""
    device = batches[0].ids.device
    dtype = choose_dtype(variant.train, device)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    own = replace(config, train=variant.train)

    def build() -> TrainStep:
        method = build_method(own, device)
        if supervised:
            method = Supervised(method.encoder(), config.views[0]).to(device)
        method = method.to(memory_format=layout)  # type: ignore[call-overload]
        return build_step(own, method, device=device, dtype=dtype)

    name = SUPERVISED if supervised else variant.name
    return Candidate(name, build, [as_training(batch, dtype, layout) for batch in batches], config.optim.lr)


class Supervised(Method):
    """Cross-entropy of a linear classifier on the encoder, on the first view: the cost of supervised training."""

    number_of_views = 1

    def __init__(self, encoder: nn.Module, view: ViewSpec) -> None:
        encoder = cast(Encoder, encoder)
        super().__init__(encoder, MethodConfig(), (view,))
        self.classifier = nn.Sequential(encoder, nn.Linear(encoder.feature_dim, CLASSES))

    def forward(self, batch: Batch) -> MethodOutput:
        return MethodOutput(cross_entropy(self.classifier(batch.views[0]).float(), batch.labels), {}, ())

    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        """Nothing to update."""

    def encoder(self) -> nn.Module:
        return self.classifier[0]


def synthetic_batches(config: Config, device: torch.device) -> list[Batch]:
    """A few batches of normally distributed float32 views, with random labels."""
    size, generator = config.train.batch_size, torch.Generator(device).manual_seed(config.seed)
    return [
        Batch(
            views=tuple(
                torch.randn(size, 3, view.size, view.size, device=device, generator=generator) for view in config.views
            ),
            labels=torch.randint(10, (size,), device=device, generator=generator),
            ids=torch.arange(size, device=device),
            step=step,
        )
        for step in range(DIFFERENT_BATCHES)
    ]


def as_training(batch: Batch, dtype: torch.dtype, layout: torch.memory_format) -> Batch:
    """The batch, with its views in `dtype` and `layout`."""
    views = tuple(view.to(dtype).contiguous(memory_format=layout) for view in batch.views)
    return Batch(views=views, labels=batch.labels, ids=batch.ids, step=batch.step)


class Passes(NamedTuple):
    """Pixels that a step sends through encoders, relative to the pixels of its first view."""

    with_gradient: float
    without_gradient: float

    @property
    def share_of_supervised(self) -> float:
        """Expected images/s relative to a supervised step, if the forward pass is a third of forward and backward."""
        return 3 / (3 * self.with_gradient + self.without_gradient)


def encoder_passes(method: Method, batch: Batch) -> Passes:
    """Count the passes in one forward of `method`."""
    pixels = {True: 0, False: 0}

    def count(_: nn.Module, images: tuple[torch.Tensor, ...]) -> None:
        pixels[torch.is_grad_enabled()] += images[0].numel()

    hooks = [module.register_forward_pre_hook(count) for module in method.modules() if isinstance(module, Encoder)]
    method(batch)
    for hook in hooks:
        hook.remove()
    return Passes(pixels[True] / batch.views[0].numel(), pixels[False] / batch.views[0].numel())
