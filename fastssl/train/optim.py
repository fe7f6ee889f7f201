"""Optimisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastssl.config import OptimConfig
from fastssl.train.lars import LARS


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or LARS over every parameter that learns; the weight decay spares 1-D ones where the options ask for it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_norm_and_bias:
        weights = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    lr, momentum, weight_decay = config.lr, config.momentum, config.weight_decay
    if config.optimizer == "lars":
        return LARS(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, trust=config.trust)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
