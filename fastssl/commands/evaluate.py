"""`fastssl eval knn|linear`: evaluate the frozen encoder of a run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import nn

from fastssl.arguments import Positional, parse
from fastssl.config import Config, from_json
from fastssl.data import open_splits
from fastssl.device import choose_device, choose_dtype
from fastssl.errors import ConfigError, unknown_name
from fastssl.evaluate.accuracy import Accuracy, percent
from fastssl.evaluate.features import extract_features
from fastssl.evaluate.knn import knn_of_encoder
from fastssl.evaluate.linear import RATES, Classifiers, Recipe, Schedule, train_probe
from fastssl.evaluate.linear_crops import train_on_crops
from fastssl.evaluate.online import number_of_classes
from fastssl.executor import input_executor
from fastssl.run_folder import read_config
from fastssl.train import checkpoint
from fastssl.train.build import build_method
from fastssl.train.identity import facts_of_images, require_same_options
from fastssl.train.state import load_method, require_whole
from fastssl.validation import Checked, Count, Images, Rate, Temperature
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.files import write_atomic
from fastssl_pipelines.names import printable

MOCO_RATE = 30.0


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of both protocols."""

    run: Annotated[Path, Positional]
    """run folder"""
    checkpoint: Path | None = None
    """checkpoint file to evaluate; None: the run's newest"""
    data: Path | None = None
    """folder of the images; None: the run's --data.root"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a GPU"""


@dataclass(frozen=True, kw_only=True)
class KNNOptions(Options):
    """Accuracy by a weighted vote of the nearest training images, using all training labels."""

    k: Count | None = None
    """neighbors that vote; None: the run's --eval.k"""
    temperature: Temperature | None = None
    """temperature of the vote's weights; None: the run's --eval.temperature"""


@dataclass(frozen=True, kw_only=True)
class LinearOptions(Options):
    """Accuracy of a linear classifier on the frozen encoder, trained with all training labels; tests the last epoch."""

    protocol: Literal["cached", "full"] = "cached"
    """cached: on features computed once, without augmentation; full: on new random crops in each epoch, as in MoCo"""
    lr: tuple[Rate, ...] = ()
    """cached: rates to choose from on held-out training images, by default 0.03 to 30; full: one rate, by default 30"""
    schedule: Schedule | None = None
    """step: times 0.1 at 60 and 80 % of the epochs; cosine: to 0; None: cosine for cached, step for full"""
    epochs: Count = 100
    """passes over the training images"""
    batch_size: Images = 256
    """images per step"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "full" and len(self.lr) > 1:
            raise ConfigError(
                f"{len(self.lr)} rates were given with --protocol full, which trains at one rate; give one --lr, or "
                "let --protocol cached choose"
            )


class FrozenRun(NamedTuple):
    """The encoder of a checkpoint, and the training and test images for a classifier."""

    config: Config
    encoder: nn.Module
    step: int
    train: Executor
    test: Executor
    dtype: torch.dtype


def main(arguments: list[str]) -> int:
    """Run `fastssl eval knn|linear RUN [--option VALUE ...]`."""
    protocol, *rest = arguments or [""]
    if protocol == "knn":
        return eval_knn(parse(KNNOptions, rest, prog="fastssl eval knn"))
    if protocol == "linear":
        return eval_linear(parse(LinearOptions, rest, prog="fastssl eval linear"))
    raise unknown_name("evaluation", protocol, ["knn", "linear"])


def eval_knn(options: KNNOptions) -> int:
    """Print the kNN accuracy of a run and write it to the run's eval-knn.json."""
    started = time.perf_counter()
    run = open_run(options)
    k, temperature = options.k or run.config.eval.k, options.temperature or run.config.eval.temperature
    view = run.config.eval_view
    accuracy = knn_of_encoder(run.encoder, run.train, run.test, view, k=k, temperature=temperature, dtype=run.dtype)
    result = _summary(run, accuracy, started) | {"k": k, "temperature": temperature}
    _write(options.run / "eval-knn.json", result)
    print(f"kNN {_sentence(result)}; k = {k}, temperature {temperature:g}")
    return 0


def eval_linear(options: LinearOptions) -> int:
    """Print the accuracy of a linear classifier on the encoder of a run and write it to the run's eval-linear.json."""
    started = time.perf_counter()
    run, cached = open_run(options), options.protocol == "cached"
    schedule: Schedule = options.schedule or ("cosine" if cached else "step")
    # At most all images
    batch_size = min(options.batch_size, _labeled(run.train))
    recipe = Recipe(epochs=options.epochs, batch_size=batch_size, schedule=schedule, seed=run.config.seed)
    accuracy, chosen = (_cached if cached else _full)(run, options, recipe)
    result = _summary(run, accuracy, started) | {"protocol": options.protocol} | asdict(recipe) | chosen
    _write(options.run / "eval-linear.json", result)
    print(f"linear {_sentence(result)}; {options.protocol} protocol, {_rate(result)}")
    return 0


def _cached(run: FrozenRun, options: LinearOptions, recipe: Recipe) -> tuple[Accuracy, dict[str, Any]]:
    view = run.config.eval_view
    train = extract_features(run.encoder, run.train, view, dtype=run.dtype)
    probe = train_probe(train, options.lr or RATES, recipe)
    accuracy = probe.test(extract_features(run.encoder, run.test, view, dtype=run.dtype))
    tried = {f"{rate:g}": top1 for rate, top1 in probe.held_out_top1.items()}
    return accuracy, {"lr": probe.lr, "held_out_top1": tried, "feature_scale": probe.scale}


def _full(run: FrozenRun, options: LinearOptions, recipe: Recipe) -> tuple[Accuracy, dict[str, Any]]:
    lr = options.lr[0] if options.lr else MOCO_RATE
    view = run.config.eval_view
    layer = train_on_crops(run.encoder, run.train, size=view.size, lr=lr, recipe=recipe, dtype=run.dtype, info=print)
    test = extract_features(run.encoder, run.test, view, dtype=run.dtype)
    hits = Classifiers(layer.weight.detach()[None], layer.bias.detach()[None]).hits(test)
    return percent(hits[:, 0], len(test.labels)), {"lr": lr}


def open_run(options: Options) -> FrozenRun:
    """Open the newest or given checkpoint of a run and the images; ConfigError for what is missing or does not fit."""
    config, path = _configuration(options), _checkpoint(options)
    device = choose_device(config.train)
    dtype = choose_dtype(config.train, device)
    state = checkpoint.load(path)
    require_whole(state, path)
    require_same_options(state["facts"], config, path)
    method = build_method(config, device)
    load_method(method, state, path)
    train, test = open_splits(config)
    if options.data is None and not state["facts"].items() >= facts_of_images("images", train).items():
        print("note: these are not the training images of the run, or not all of them; their labels may differ too")
    for name, source in (("training", train), ("test", test)):
        if not number_of_classes(source):
            raise ConfigError(
                f"the {name} images ({source.name}) have no labels, and an evaluation needs labels; give class folders "
                "with --data DIR"
            )
    if number_of_classes(train) < 2:
        raise ConfigError(
            f"the training images ({train.name}) are all of one class, and an evaluation needs two; give class "
            "folders with --data DIR"
        )
    executors = [
        input_executor(config.data, source, device=device, dtype=dtype, timeout_s=config.train.timeout_s)
        for source in (train, test)
    ]
    return FrozenRun(
        config=config,
        encoder=method.encoder(),
        step=state["step"],
        train=executors[0],
        test=executors[1],
        dtype=dtype,
    )


def _configuration(options: Options) -> Config:
    """The run's configuration, with the folder and device of the options."""
    config = from_json(read_config(options.run))
    root = options.data or config.data.root
    if root is not None and not root.exists():
        raise ConfigError(f"the folder of the images, {root}, does not exist; give their folder with --data DIR")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was given and torch finds no GPU here; `fastssl doctor` shows details")
    # Unlabeled images would be decoded for nothing
    data = replace(config.data, root=root, unlabeled=None)
    return replace(config, data=data, train=replace(config.train, device=options.device))


def _checkpoint(options: Options) -> Path:
    if options.checkpoint is not None:
        return options.checkpoint
    paths = checkpoint.checkpoints(options.run / "checkpoints")
    if not paths:
        raise ConfigError(
            f"{options.run} has no checkpoint yet; continue training with `fastssl resume {options.run}`, or give a "
            "checkpoint with --checkpoint FILE"
        )
    return paths[-1]


def _summary(run: FrozenRun, accuracy: Accuracy, started: float) -> dict[str, Any]:
    return {
        **accuracy._asdict(),
        "step": run.step,
        "train_images": _labeled(run.train),
        "test_images": _labeled(run.test),
        "seconds": time.perf_counter() - started,
    }


def _labeled(executor: Executor) -> int:
    return int((executor.source.labels >= 0).sum())


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        write_atomic(path, json.dumps(result, indent=2).encode())
    except OSError as error:
        # The accuracy is printed anyway, and matters more than the file
        print(printable(f"note: {path} could not be written ({error.strerror}); make {path.parent} writable"))


def _sentence(result: dict[str, Any]) -> str:
    return (
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % after step {result['step']}: "
        f"{result['train_images']} training and {result['test_images']} test images, {result['seconds']:.1f} s"
    )


def _rate(result: dict[str, Any]) -> str:
    rates = list(result.get("held_out_top1", ()))
    text = f"rate {result['lr']:g}"
    if not rates:
        return text
    text += f", the best of {rates[0]} to {rates[-1]} on held-out training images"
    edge = f"{result['lr']:g}" in (rates[0], rates[-1])
    return text + (" (at the edge of the range; try others with --lr)" if edge else "")
