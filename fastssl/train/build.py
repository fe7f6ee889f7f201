"""Build the method, the sampler and the training step of a configuration."""

from __future__ import annotations

import torch

from fastssl.config import Config
from fastssl.data import known_labels
from fastssl.device import choose_dtype
from fastssl.distributed import rank, world_size
from fastssl.errors import ConfigError
from fastssl.methods import METHODS, Method
from fastssl.models.encoders import build_encoder
from fastssl.models.norm import convert_to_sync, norm_layer
from fastssl.train.optim import build_optimizer
from fastssl.train.step import TrainStep
from fastssl_pipelines.plan import SamplePlan
from fastssl_pipelines.sampler import TrainSampler
from fastssl_pipelines.sources.base import Source


def build_method(config: Config, device: torch.device) -> Method:
    """The method of a configuration with initial weights that only depend on the seed."""
    torch.manual_seed(config.seed)
    model = config.model
    splits = model.splits // (world_size() * config.train.accumulate) or 1
    encoder = build_encoder(
        model.encoder, width=model.width, stem=model.stem, norm_layer=norm_layer(model.norm, splits)
    )
    bank_dtype = config.method.bank_dtype(device, choose_dtype(config.train, device))
    method = METHODS[config.method.name](encoder, config.method, config.views, bank_dtype)
    if model.norm == "sync":
        convert_to_sync(method)  # Including the heads
    # torch 2.11 does not declare this overload
    return method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_step(config: Config, method: Method, *, device: torch.device, dtype: torch.dtype) -> TrainStep:
    """The training step of a configuration."""
    train = config.train
    if train.cuda_graph and (device.type != "cuda" or world_size() > 1):
        given = f"{world_size()} processes" if world_size() > 1 else f"device {device}"
        raise ConfigError(f"--train.cuda-graph was given with {given}; it works with one process on a GPU: drop it")
    if train.cuda_graph and config.optim.impl == "apex":
        raise ConfigError(
            "--train.cuda-graph was given with --optim.impl apex, whose optimizers cannot be part of a graph; drop one"
        )
    return TrainStep(
        method,
        build_optimizer(method, config.optim),
        seed=config.seed,
        device=device,
        dtype=dtype,
        compile=compiles(config, device),
        accumulate=train.accumulate,
        clip_norm=config.optim.clip_norm,
        cuda_graph=train.cuda_graph,
    )


def compiles(config: Config, device: torch.device) -> bool:
    """Whether to use torch.compile; "auto" uses it only on a GPU, as it gained nothing on a CPU (`bench step`)."""
    return config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")


def train_sampler(config: Config, source: Source) -> TrainSampler:
    """This rank's part of the sample plan, with the labels of `known_labels`."""
    _check_parts(config)
    plan = SamplePlan(
        widths=source.widths,
        heights=source.heights,
        labels=known_labels(config, source),
        views=config.views,
        odd_views=config.odd_views,
        seed=config.seed,
    )
    ranks = world_size()
    return TrainSampler(plan, batch_size=config.train.batch_size // ranks, rank=rank(), world_size=ranks)


def _check_parts(config: Config) -> None:
    """Check that a step splits evenly into ranks, accumulated parts and groups of batch norm."""
    ranks, train, model = world_size(), config.train, config.model
    parts = ranks * train.accumulate
    given = f"{ranks} processes and --train.accumulate {train.accumulate}"
    multiple = parts * config.method.batch_multiple
    if train.batch_size % multiple:
        raise ConfigError(
            f"--train.batch-size {train.batch_size} was given with {given}; it must be a multiple of {multiple}"
        )
    if model.norm == "split" and model.splits % parts:
        raise ConfigError(
            f"--model.splits {model.splits} was given with {given}; it counts the groups on all of them together and "
            f"must be a multiple of {parts}: change it or use --model.norm local or sync"
        )
    if model.norm == "local" and train.batch_size < 2 * parts:
        raise ConfigError(
            f"--train.batch-size {train.batch_size} was given with {given}, one image for each batch norm, which needs "
            "at least 2: raise it or use --model.norm sync or group"
        )
