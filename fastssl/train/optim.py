"""Optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastssl.apex import apex_optimizer
from fastssl.config import OptimConfig
from fastssl.train.lars import LARS


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters; without `decay_norm_and_bias`, 1-D ones have no weight decay.

    Its state exists from the start and stays in the same tensors, as CUDA graphs require; loaded state is copied into
    them. This does not apply to optimizers of NVIDIA apex. ConfigError if apex is requested and not installed.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_norm_and_bias:
        weights = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.impl == "apex":
        return _of_apex(groups, config, common)
    return _with_fixed_state(_of_torch(groups, config, common))


def _of_torch(groups: list[dict[str, Any]], config: OptimConfig, common: dict[str, Any]) -> torch.optim.Optimizer:
    if config.optimizer == "lars":
        return LARS(groups, momentum=config.momentum, trust=config.trust, **common)
    if config.optimizer == "adamw":
        # A captured AdamW must be `capturable`; the fused kernel is the same
        on_gpu = groups[0]["params"][0].is_cuda
        return torch.optim.AdamW(groups, betas=config.betas, fused=True, capturable=on_gpu, **common)
    return torch.optim.SGD(groups, momentum=config.momentum, fused=True, **common)


def _with_fixed_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Create the state of all parameters now, as zeros; torch's SGD leaves it unset if the first step overflows."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # This step must change no weight
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state = {p: dict(optimizer.state.get(p, {})) for p in parameters}
    for p, own in state.items():
        p.grad = None
        for value in own.values():
            value.zero_()

    @torch.no_grad()
    def into_own_tensors(optimizer: torch.optim.Optimizer) -> None:
        for p, own in state.items():
            for name, value in own.items():
                loaded = optimizer.state[p].get(name, torch.zeros_like(value))
                if loaded.shape == value.shape:  # Else the caller rejects it
                    optimizer.state[p][name] = value.copy_(loaded)

    optimizer.register_load_state_dict_post_hook(into_own_tensors)
    return optimizer


def _of_apex(groups: list[dict[str, Any]], config: OptimConfig, common: dict[str, Any]) -> torch.optim.Optimizer:
    option = f"--optim.impl apex with --optim.optimizer {config.optimizer}"
    if config.optimizer == "sgd":
        return apex_optimizer("FusedSGD", groups, option, momentum=config.momentum, **common)
    name = {"adamw": "FusedAdam", "lamb": "FusedLAMB", "novograd": "FusedNovoGrad"}[config.optimizer]
    return apex_optimizer(name, groups, option, betas=config.betas, **common)
