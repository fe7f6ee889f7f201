"""Optimisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastssl.apex import apex_optimizer
from fastssl.config import OptimConfig
from fastssl.train.lars import LARS


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of every parameter that learns; weight decay spares 1-D ones where the options ask for it.

    ConfigError where NVIDIA apex was asked for and is not here.
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
    if config.optimizer == "lars":
        return LARS(groups, momentum=config.momentum, trust=config.trust, **common)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, fused=True, **common)
    return torch.optim.SGD(groups, momentum=config.momentum, fused=True, **common)


def _of_apex(groups: list[dict[str, Any]], config: OptimConfig, common: dict[str, Any]) -> torch.optim.Optimizer:
    option = f"--optim.impl apex with --optim.optimizer {config.optimizer}"
    if config.optimizer == "sgd":
        return apex_optimizer("FusedSGD", groups, option, momentum=config.momentum, **common)
    name = {"adamw": "FusedAdam", "lamb": "FusedLAMB", "novograd": "FusedNovoGrad"}[config.optimizer]
    return apex_optimizer(name, groups, option, betas=config.betas, **common)
