"""The same MoCo training step three times: by fastssl, as a plain loop, and from lightly's example."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastssl.benchmark.step_variants import NO_END
from fastssl.config import Config
from fastssl.methods import TrainProgress
from fastssl.methods.moco import MoCoV2
from fastssl.models.encoders import Encoder
from fastssl.train.build import build_method, build_step
from fastssl_pipelines.batch import Batch

from .peers import Unavailable

LR, MOMENTUM, TEMPERATURE = 0.06, 0.99, 0.2

Step = Callable[[Batch], Tensor]


class Setting(NamedTuple):
    """Dtype and memory layout of a step, the same for all implementations."""

    name: str
    dtype: torch.dtype
    layout: torch.memory_format


SETTINGS = (
    Setting("fp32", torch.float32, torch.contiguous_format),
    Setting("bf16", torch.bfloat16, torch.channels_last),
)


def ours(config: Config, device: torch.device, setting: Setting) -> Step:
    """fastssl's step; compiled only if the setting is "chosen" and a run would compile."""
    precision = {"fp32": "fp32", "bf16": "bf16", "chosen": "auto"}[setting.name]
    compile_ = "auto" if setting.name == "chosen" else "off"
    config = replace(config, train=replace(config.train, precision=precision, compile=compile_))  # type: ignore[arg-type]
    method = build_method(config, device).to(memory_format=setting.layout)  # type: ignore[call-overload]
    train_step = build_step(config, method, device=device, dtype=setting.dtype)
    done = 0

    def step(batch: Batch) -> Tensor:
        nonlocal done
        output = train_step(batch, TrainProgress(done, NO_END, NO_END), LR)
        done += 1
        return output.loss

    return step


def plain(config: Config, device: torch.device, setting: Setting) -> Step:
    """A step written after the paper and the official code: all logits in one tensor, momentum in a loop."""
    method = cast(MoCoV2, build_method(config, device).to(memory_format=setting.layout))  # type: ignore[call-overload]
    query_encoder, key_encoder = method.query_encoder, method.key_encoder
    queue, place = method.queue.keys.T.float().clone(), 0
    optimizer = torch.optim.SGD(query_encoder.parameters(), lr=LR)

    def step(batch: Batch) -> Tensor:
        nonlocal place
        first, second = batch.views
        with _autocast(device, setting):
            query = normalize(query_encoder(first), dim=1)
            with torch.no_grad():
                for source, target in zip(query_encoder.parameters(), key_encoder.parameters(), strict=True):
                    target.data = target.data * MOMENTUM + source.data * (1 - MOMENTUM)
                key = normalize(key_encoder(second), dim=1)
            positive = torch.einsum("nc,nc->n", query, key)[:, None]
            negative = torch.einsum("nc,ck->nk", query, queue.clone().detach())
            logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
            loss = cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, place : place + len(key)] = key.T
        place = (place + len(key)) % queue.shape[1]
        return loss.detach()

    return step


def lightly(config: Config, device: torch.device, setting: Setting) -> Step:
    """The loop of lightly's MoCo example with lightly's parts, our encoder and weights; Unavailable without lightly."""
    losses, modules, utils = (_lightly(name) for name in ("loss", "models.modules", "models.utils"))
    method = cast(MoCoV2, build_method(config, device))
    backbone, own_head = cast(Encoder, method.encoder()), method.query_encoder[1]
    queue = method.queue.keys.float()  # Ours may have 16 bits
    head = modules.MoCoProjectionHead(backbone.feature_dim, backbone.feature_dim, queue.shape[1]).to(device)
    with torch.no_grad():
        for theirs, weights in zip(head.parameters(), own_head.parameters(), strict=True):
            theirs.copy_(weights)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    model.update({f"{name}_momentum": deepcopy(part) for name, part in list(model.items())})
    for name in ("backbone_momentum", "head_momentum"):
        utils.deactivate_requires_grad(model[name])
    model.to(memory_format=setting.layout)  # type: ignore[call-overload]
    criterion = losses.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape)).to(device)
    criterion.memory_bank.bank = queue.clone()  # Instead of lightly's noise
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step(batch: Batch) -> Tensor:
        for name in ("backbone", "head"):
            utils.update_momentum(model[name], model[f"{name}_momentum"], m=MOMENTUM)
        with _autocast(device, setting):
            query = model["head"](model["backbone"](batch.views[0]).flatten(start_dim=1))
            key = model["head_momentum"](model["backbone_momentum"](batch.views[1]).flatten(start_dim=1)).detach()
            loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


IMPLEMENTATIONS: dict[str, Callable[[Config, torch.device, Setting], Step]] = {
    "fastssl": ours,
    "plain loop": plain,
    "lightly": lightly,
}


def _autocast(device: torch.device, setting: Setting) -> torch.autocast:
    return torch.autocast(device.type, setting.dtype, enabled=setting.dtype != torch.float32)


def _lightly(module: str) -> Any:
    try:
        return importlib.import_module(f"lightly.{module}")
    except ImportError as error:
        raise Unavailable(f'{error}; the extra "peers" installs it') from None
